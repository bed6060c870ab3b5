"""Trains small models under several layouts in the same processes; each case writes a run's folder.

`train_all` is called in every process of a group. Between cases the model-parallel groups are built anew.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

from nemo_processes import run_group

# Of all cases, which change them.
KEYS = dict(device="cpu", seq=64, global_batch=8, micro_batch=4, steps=6, lr=1e-3, warmup=2, val_every=3, val_batches=1,
            every=100, precision="fp32", tensorboard=False)  # fmt: skip


def train(cases: list[dict], processes: int, out: Path, models: dict[str, dict], tokenizer: Path | str, blend: list) -> None:
    """`train_all` in that many new processes; `models` are those that cases name, `blend` is the data of cases without one."""
    plan = {"out": str(out), "keys": KEYS, "cases": cases, "models": models, "tokenizer": str(tokenizer), "blend": blend}
    run_group(processes, train_all, plan, log=out / f"processes{processes}.log")


def train_all(plan: dict) -> None:
    """Train `plan`'s cases one after the other; it has their common keys and paths too."""
    import fiddle as fdl
    import injected_faults
    import nemo_run as run
    import torch

    import recipes
    from nemo_ext import run_folder
    from nemo_ext.architecture import Architecture

    torch.set_num_threads(1)
    set_up_again()
    for case in plan["cases"]:
        out = Path(plan["out"]) / case["name"]
        keys = {**plan["keys"], "gpus": int(os.environ["WORLD_SIZE"]), **case.get("keys", {})}
        if "recipe" in case and "model" not in case:  # random weights
            shape, weights, senses = None, None, None
        else:
            model = plan["models"][case.get("model", "tied")]
            shape, weights, senses = Architecture(**model["architecture"]), model["weights"], model.get("senses")
        recipe = recipes.load(
            case.get("recipe", "pretrain_custom"), shape=shape, senses=senses, overrides=case.get("overrides"), **keys
        )
        if source := case.get("continue_copy_of"):
            copy(Path(plan["out"]) / source, out)
        newest = run_folder.newest_checkpoint(out / run_folder.CHECKPOINTS)
        recipes.bind(
            recipe, run_dir=str(out), tokenizer=plan["tokenizer"], blend=case.get("blend", plan["blend"]), weights=weights,
            checkpoint=str(newest[1]) if newest else None,
        )  # fmt: skip
        if stop := case.get("stop_at"):
            recipe.trainer.callbacks.append(stop_at(stop))
        if case.get("probe"):
            recipe.trainer.callbacks.append(probe(out))
        for name, arguments in case.get("callbacks", {}).items():  # of injected_faults.py
            recipe.trainer.callbacks.append(run.Config(getattr(injected_faults, name), **arguments))
        fdl.build(recipe)()
        for name in [n for n in os.environ if n.startswith("NVTE_")]:
            del os.environ[name]  # Megatron notes one model's attention backend there and refuses another's
        reset()
        gc.collect()
    torch.distributed.destroy_process_group()


def copy(source: Path, out: Path) -> None:
    """Rank 0 copies a run's folder; the others wait for the complete copy to appear."""
    if int(os.environ["RANK"]) == 0:
        beside = out.with_name(out.name + ".copying")
        shutil.copytree(source, beside)
        beside.rename(out)
    while not out.exists():
        time.sleep(0.05)


def stop_at(step: int):
    """A callback that ends training after `step`, as a signal does."""
    import nemo_run as run
    from lightning.pytorch.callbacks import Callback

    class StopAt(Callback):
        def __init__(self, step: int):
            self.step = step

        def on_train_batch_end(self, trainer, *unused):
            trainer.should_stop = trainer.should_stop or trainer.global_step == self.step

    return run.Config(StopAt, step=step)


def probe(out: Path):
    """A callback that writes out/probeRANK.pt: an adapter as it began, what of this rank's model changed, has gradients, buffers
    and optimizer states, what was not in training mode, and the trained model's logits."""
    import nemo_run as run
    import torch
    from lightning.pytorch.callbacks import Callback

    class Probe(Callback):
        def __init__(self, out: str):
            self.out = Path(out)

        def on_train_start(self, trainer, *unused):
            self.began = {name: p.detach().clone() for name, p in self.parameters(trainer)}

        def on_train_batch_start(self, trainer, *unused):
            named = (each for chunk in trainer.strategy.megatron_parallel for each in chunk.module.module.named_modules())
            self.in_use = {name for name, module in named if not module.training}

        def on_train_end(self, trainer, *unused):
            trained = {name for name, p in self.parameters(trainer) if not torch.equal(p, self.began[name])}
            chunks = trainer.strategy.megatron_parallel
            buffers = sum(buffer.numel for chunk in chunks for buffer in chunk.module.buffers)
            optimizers = [each for each in trainer.optimizers[0].mcore_optimizer.chained_optimizers if not each.is_stub_optimizer]
            states = [value for each in optimizers for state in each.optimizer.state.values() for value in state.values()]
            found = {
                "began": {name: p for name, p in self.began.items() if ".adapter." in name},
                "trained": trained,
                "sizes": {name: p.numel() for name, p in self.began.items()},
                "with_gradient": {name for name, p in self.parameters(trainer) if p.requires_grad},
                "gradient_elements": buffers,
                "optimizer_elements": sum(value.numel() for value in states if isinstance(value, torch.Tensor)),
                "in_use": self.in_use,
            }
            if trainer.strategy.pipeline_model_parallel_size == trainer.strategy.tensor_model_parallel_size == 1:
                tokens = torch.arange(2 * 32).reshape(2, 32) * 7 % 500
                with torch.no_grad():
                    found["logits"] = chunks[0].module(tokens, torch.arange(32).expand(2, -1), None)
            self.out.mkdir(parents=True, exist_ok=True)
            torch.save(found, self.out / f"probe{trainer.global_rank}.pt")

        def parameters(self, trainer):
            chunks = enumerate(trainer.strategy.megatron_parallel)
            return [(f"{i}.{n}", p) for i, chunk in chunks for n, p in chunk.module.module.named_parameters()]

    return run.Config(Probe, out=str(out))


class Groups:
    """torch's process groups, of which a case takes those that cases before it have made, one for each that it asks for.

    The threads of a gloo group wake up a hundred times a second as long as the process lives, closed or not: left to pile up,
    those of thirty cases take more time than the cases.
    """

    def __init__(self) -> None:
        self.made: dict[tuple, list] = defaultdict(list)
        self.taken: dict[tuple, int] = defaultdict(int)

    def install(self) -> None:
        import torch

        self.new_group, torch.distributed.new_group = torch.distributed.new_group, self.take

    def take(self, ranks=None, *unused, backend=None, **options):
        """As torch.distributed.new_group, which all ranks call in the same order."""
        kind = (tuple(ranks) if ranks is not None else None, backend)
        if self.taken[kind] == len(self.made[kind]):
            self.made[kind].append(self.new_group(ranks, *unused, backend=backend, **options))
        self.taken[kind] += 1
        return self.made[kind][self.taken[kind] - 1]

    def begin_case(self) -> None:
        self.taken.clear()


GROUPS = Groups()


def set_up_again() -> None:
    """Make NeMo's strategy build its model-parallel groups also where the world exists already, from the last case."""
    import torch
    from nemo.lightning import MegatronStrategy
    from nemo.lightning._strategy_lib import init_model_parallel

    GROUPS.install()
    first_time = MegatronStrategy.setup_distributed

    def setup_distributed(self):
        existed = torch.distributed.is_initialized()
        first_time(self)
        if existed:
            init_model_parallel(self.model)
            if self.data_sampler:
                self.data_sampler.setup(self.cluster_environment.global_rank())

    MegatronStrategy.setup_distributed = setup_distributed


def reset() -> None:
    """Forget the model-parallel groups and NeMo's record of them. The world and torch's groups stay."""
    import megatron.core.num_microbatches_calculator as calculator
    import torch
    from megatron.core import parallel_state
    from nemo.utils import AppState
    from nemo.utils.metaclasses import Singleton

    torch.distributed.barrier()
    with mock.patch.object(torch.distributed, "destroy_process_group"):
        parallel_state.destroy_model_parallel()
    GROUPS.begin_case()
    calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR = None
    Singleton._Singleton__instances.pop(AppState, None)
