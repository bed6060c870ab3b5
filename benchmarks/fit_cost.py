"""Fits the constants of the cost model (`launchers/cost.py`) to what was measured, and says how well it then predicts.

    python benchmarks/fit_cost.py                # the constants, and each row measured, predicted, and predicted without it
    python benchmarks/fit_cost.py write=true     # and puts them into launchers/cost.py

Reads `train_gpu.json`, `micro_batch.json` and `neva_gpu.json` of `benchmarks/results/`. Least squares of the logarithms, so
that every row counts by its relative error; of micro batches on one GPU also the seconds of products and of attention, which
separates the two. "Left out" is the error of constants that are fitted without the row and without all others of the same
model, precision and layout: what to expect of one that was not measured, but is like those. Rows with a reason at their end are
of an older program, or of a changed one, and not fitted to. Needs scipy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launchers import cost  # noqa: E402
from launchers.cost import Constants  # noqa: E402
from launchers.memory import Layout, Request  # noqa: E402
from nemo_ext import adapters, gpus  # noqa: E402
from nemo_ext.architecture import Architecture  # noqa: E402
from recipes.keys import fields  # noqa: E402
from recipes.models import size  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
# Since then products add weight gradients themselves (4 bytes less a parameter and micro batch), the host waits no more for the
# GPU in every micro batch, and the last pipeline stage has fewer layers.
CURRENT = "2026-11-23"
STAGES = "pipeline_model_parallel_layout"  # those layers by hand, as they were measured first
# Keys of a case and changes of a micro batch that the model knows: others make another program.
KEYS = set("recipe size gpus tp pp vp cp seq micro_batch global_batch precision lr pack gpu_memory recompute profile".split())
KEYS |= {"balance_stages", "cuda_graphs", "output_layer", f"trainer.strategy.{STAGES}"}
OUTPUTS = {"fused-output": "fused", "fp8-output": "fp8"}  # output_layer= in a change's words
CHANGES = {"tp", "pp", "vp", "cp", "micro", "graphs", "unfused-gradients", "waiting-loss", "joint-rotary", STAGES, *OUTPUTS}
ONE_BY_ONE = "adapters one by one"  # each with products, a scaling and a sum of its own (`nemo_ext/adapters/low_rank.py`)
# Where the search begins, by hand, and how strongly it is pulled back there: as if a row were 2 % off for each factor of e.
PULL = 0.02
START = Constants(
    products=0.7, fp8=0.7, attention_64=0.4, attention_128=0.4, memory=0.5, link=0.5, adapter=4.0, handover=0.005,
    host_layer=0.005, host_weights=0.005, host_adapter=0.005,
)  # fmt: skip
PACKED = 8  # conversations in a row of `8b-lora-packed-bf16`


@dataclass(frozen=True)
class Row:
    """One measurement of a step."""

    name: str
    architecture: Architecture
    request: Request
    layout: Layout
    seconds: float
    optimizer: bool = True  # whether it has one, or forward and backward passes alone
    fused: bool = True
    products: float | None = None  # seconds of a micro batch on the last pipeline stage
    attention: float | None = None
    left_out: str = ""  # why it is not fitted to

    def predict(self, c: Constants) -> dict[str, float]:
        """The same by the model."""
        a, r, layout = self.architecture, self.request, self.layout
        layer, output = cost.layer_parts(a, r, layout, c), cost.output_parts(a, r, layout, c)
        layers, seconds = a.num_layers / layout.pp, cost.step_seconds(a, r, layout, c)
        if not self.optimizer:
            seconds -= cost.update_seconds(a, r, layout, c)
        if not self.fused and r.trainable == 1:
            parameters = sum(cost.stage_parameters(a, layout, layout.pp - 1))
            seconds += 4 * parameters * layout.num_microbatches / cost.rates(a, r, c).memory
        found = {"seconds": seconds, "products": layers * layer["products"] + output["products"]}
        return {**found, "attention": layers * layer["attention"]}

    def errors(self, c: Constants) -> list[float]:
        """Logarithms of predicted over measured: of the whole, and of its parts where they were measured."""
        predicted = self.predict(c)
        measured = {"seconds": self.seconds, "products": self.products, "attention": self.attention}
        return [math.log(predicted[name] / value) for name, value in measured.items() if value is not None]

    def like(self, other: Row) -> bool:
        """Whether two are of the same model, precision and layout, on whichever GPU."""

        def what(row: Row) -> tuple:
            layout = dataclasses.replace(row.layout, num_microbatches=0)
            return row.architecture, row.request.precision, row.request.seq, row.request.trainable, row.request.attended, layout

        return what(self) == what(other)


def rows() -> list[Row]:
    """Everything measured that the model is for."""
    return [*_steps(), *_micro_batches(), *_senses()]


def _request(gpu: str, shape: Architecture, case: dict, **more) -> Request:
    names = ("gpus", "seq", "global_batch", "micro_batch", "precision")
    known = {name: case[name] for name in names} | {"cuda_graphs": str(case.get("cuda_graphs")).lower() == "true"}
    known["cross_entropy"] = case.get("output_layer", "te")
    return Request(nodes=1, gpu_memory=float(gpus.KINDS[gpu].memory), device="gpu", gpu=gpu, **{**known, **more})


def _layout(case: dict, recompute: str = "none", balanced: bool = False) -> Layout:
    tp, pp = case["tp"], case["pp"]
    vp = case["vp"] if case.get("vp", 1) > 1 else None
    cp = case.get("cp", 1)
    dp = case["gpus"] // (tp * pp * cp)
    microbatches = case["global_batch"] // (case["micro_batch"] * dp)
    return Layout(tp, pp, vp, cp, dp, tp > 1, case["micro_batch"], microbatches, recompute, balanced=balanced and pp > 1)


def _kind(gpu: str) -> str:
    return next(name for name, kind in gpus.KINDS.items() if kind.title in gpu)


def _steps() -> list[Row]:
    found = []
    for name, row in json.loads((RESULTS / "train_gpu.json").read_text()).items():
        if "step_seconds" not in row.get("ours", {}):
            continue
        case, shape, more = row["case"], size("llama3", row["case"]["size"]).architecture, {}
        if "recipe" in case:
            linears = adapters.targets(shape.family, "all-linear")
            trained = adapters.num_parameters(shape, linears, fields()["rank"].default)
            attended = case["seq"] // PACKED if case["pack"] == "true" else None
            more = dict(trainable=trained / shape.num_parameters(), nf4=case["recipe"].startswith("qlora"), attended=attended)
        if "cuda_graphs" in row["ours"]:  # else there was one where it was asked for
            case = {**case, "cuda_graphs": row["ours"]["cuda_graphs"]}
        older = row["date"] < CURRENT
        recompute = case.get("recompute") or ("selective" if case.get("gpu_memory") == 24 else "none")  # what was planned for 24
        balanced = not older and case.get("balance_stages") != "false"
        request, layout = _request(_kind(row["gpu"]), shape, case, **more), _layout(case, recompute, balanced)
        reason = ", ".join(sorted(set(case) - KEYS))
        if more and older:
            reason = ONE_BY_ONE
        elif more and more["nf4"]:
            reason = "dequantization"
        elif older:
            reason = f"before {CURRENT}"
        found.append(Row(name, shape, request, layout, row["ours"]["step_seconds"], fused=not older, left_out=reason))
    return found


def _micro_batches() -> list[Row]:
    """Of `benchmarks/micro_batch.py`, as far as the recipes run with those settings."""
    found = []
    for name, got in json.loads((RESULTS / "micro_batch.json").read_text()).items():
        precision, *changes = name.split()[1].split(",")
        values = dict(change.partition("=")[::2] for change in changes)
        if "ms" not in got or precision not in ("bf16", "fp8") or set(values) - CHANGES or values.get("graphs") == "layers":
            continue
        shape = size("llama3", got["size"]).architecture
        shape = dataclasses.replace(shape, num_layers=got["layers"] or shape.num_layers)
        sizes = {key: int(values.get(key, 1)) for key in ("tp", "pp", "vp", "cp")}
        micro, world = int(values.get("micro", 1)), got.get("gpus", 1)
        dp = world // (sizes["tp"] * sizes["pp"] * sizes["cp"])
        count = got["count"] if "gpus" not in got else got["count"] // micro  # of micro batches
        case = dict(sizes, gpus=world, seq=got["seq"], micro_batch=micro, global_batch=count * micro * dp, precision=precision)
        case["cuda_graphs"] = "true" if "graphs" in values else "false"
        case["output_layer"] = next((OUTPUTS[word] for word in values if word in OUTPUTS), "te")
        alone, short = world == 1, re.sub(rf"{STAGES}=\S+", "balanced", name.replace(" with optimizer", ", step"))
        found.append(
            Row(
                f"micro batch {short}", shape, _request(_kind(got["gpu"]), shape, case),
                _layout(case, balanced=STAGES in values), got["ms"] / 1000 * count,
                bool(got.get("optimizer")), "unfused-gradients" not in values,
                got["attributed"]["GEMM"] / 1000 if alone else None, got["attributed"]["attention"] / 1000 if alone else None,
            )
        )  # fmt: skip
    return found


def _senses() -> list[Row]:
    """Models with eyes, without the share of their towers."""
    found, shape = [], size("llama3", "8b").architecture
    for name, got in json.loads((RESULTS / "neva_gpu.json").read_text()).items():
        options, ours = got["options"], got["ours"]
        case = {**options, "global_batch": options["rows"], "precision": "bf16"}
        trained = adapters.num_parameters(shape, adapters.targets(shape.family, "all-linear"), 16)
        share = {"align": 0.0, "lora": trained / shape.num_parameters(), "instruct": 1.0}[name.split("-")[0]]
        recompute = "full" if options["recompute"] else "none"
        seconds = ours["step_seconds"] * (1 - ours["tower_share"])
        request = _request(_kind(got["gpu"]), shape, case, trainable=share)
        reason = ONE_BY_ONE if 0 < share < 1 else ""
        found.append(Row(f"neva {name}", shape, request, _layout(case, recompute), seconds, left_out=reason))
    return found


def fit(measured: list[Row]) -> Constants:
    """The constants with the smallest squares of relative errors."""
    import numpy as np
    from scipy.optimize import least_squares

    names = [field.name for field in dataclasses.fields(Constants)]

    def constants(logarithms) -> Constants:
        return Constants(**{name: float(value) for name, value in zip(names, np.exp(logarithms), strict=True)})

    start = np.log([getattr(START, name) for name in names])

    def errors(x) -> list[float]:
        return [error for row in measured for error in row.errors(constants(x))] + list(PULL * (x - start))

    return constants(least_squares(errors, start).x)


def square(errors: list[float]) -> float:
    """The root of the mean square."""
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def put(values: dict[str, str]) -> None:
    """Write constants into launchers/cost.py, where each has a line of its own."""
    file = Path(cost.__file__)
    text = file.read_text()
    for name, value in values.items():
        line = rf"^({name} = )[0-9.e-]+" if name.isupper() else rf"^(    {name}=)[0-9.e-]+(?=,$)"
        text, count = re.subn(line, rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count == 1, name
    file.write_text(text)


def main(arguments: list[str]) -> None:
    measured = rows()
    fitted = [row for row in measured if not row.left_out]
    best = fit(fitted)
    values = {field.name: f"{getattr(best, field.name):.3g}" for field in dataclasses.fields(Constants)}
    print(f"{'row':<56}{'GPU':<6}{'measured':>10}{'predicted':>11}{'error':>8}{'left out':>10}")
    errors: dict[tuple[str, str], list[float]] = {}
    for row in measured:
        seconds = row.predict(best)["seconds"]
        others = fit([other for other in fitted if not other.like(row)])
        inside, outside = (seconds / row.seconds - 1, row.predict(others)["seconds"] / row.seconds - 1)
        if not row.left_out:
            name = "HOST_ERROR" if cost.waits_for_python(row.architecture, row.request, row.layout, best) else "ERROR"
            errors.setdefault((name, "fitted"), []).append(inside)
            errors.setdefault((name, "left out"), []).append(outside)
        figures = f"{row.seconds:>8.3f} s{seconds:>9.3f} s{inside:>8.1%}{outside:>10.1%}"
        print(f"{row.name:<56}{row.request.gpu:<6}{figures}  {row.left_out}".rstrip())
    for (name, how), found in sorted(errors.items()):
        what = "Python" if name == "HOST_ERROR" else "the GPU"
        figures = f"{len(found)} rows, root mean square {square(found):.1%}, largest {max(map(abs, found)):.1%}"
        print(f"where {what} takes the time, {how}: {figures}")
        if how == "left out":
            values[name] = f"{math.ceil(100 * square(found)) / 100:.2f}"
    print("\n" + "\n".join(f"{name} = {value}" for name, value in values.items()))
    if "write=true" in arguments:
        put(values)


if __name__ == "__main__":
    main(sys.argv[1:])
