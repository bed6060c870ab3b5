"""Trains one small model with eyes under several layouts in the same processes; each case writes a run's folder.

`train_all` is called in every process of a group (tests/training/test_neva.py).
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

from layouts import copy, reset, set_up_again, stop_at


def train_all(plan: dict) -> None:
    """Train `plan`'s cases one after the other; it has their common keys and paths too."""
    import fiddle as fdl
    import torch

    import recipes
    from nemo_ext import run_folder
    from nemo_ext.architecture import Architecture

    torch.set_num_threads(1)
    set_up_again()
    for case in plan["cases"]:
        out = Path(plan["out"]) / case["name"]
        keys = {**plan["keys"], "gpus": int(os.environ["WORLD_SIZE"]), **case.get("keys", {})}
        shape, senses = Architecture(**plan["architecture"]), plan["senses"]
        recipe = recipes.load("neva_llama3", shape=shape, senses=senses, **keys)
        if source := case.get("continue_copy_of"):
            copy(Path(plan["out"]) / source, out)
        newest = run_folder.newest_checkpoint(out / run_folder.CHECKPOINTS)
        recipes.bind(recipe, run_dir=str(out), tokenizer=plan["tokenizer"], blend=plan["blend"], weights=plan["weights"],
                     checkpoint=str(newest[1]) if newest else None)  # fmt: skip
        if stop := case.get("stop_at"):
            recipe.trainer.callbacks.append(stop_at(stop))
        recipe.trainer.callbacks.append(probe(out))
        fdl.build(recipe)()
        for name in [n for n in os.environ if n.startswith("NVTE_")]:
            del os.environ[name]  # Megatron notes one model's attention backend there and refuses another's
        reset()
        gc.collect()
    torch.distributed.destroy_process_group()


def probe(out: Path):
    """A callback that writes out/probeN.pt: what of this rank's model changed, what has gradients, buffers, optimizer states."""
    import nemo_run as run
    import torch
    from lightning.pytorch.callbacks import Callback

    class Probe(Callback):
        def __init__(self, out: str):
            self.out = Path(out)

        def parameters(self, trainer):
            return [(n, p) for chunk in trainer.strategy.megatron_parallel for n, p in chunk.module.module.named_parameters()]

        def on_train_start(self, trainer, *unused):
            self.began = {name: p.detach().clone() for name, p in self.parameters(trainer)}

        def on_train_end(self, trainer, *unused):
            chunks, optimizer = trainer.strategy.megatron_parallel, trainer.optimizers[0].mcore_optimizer
            real = [each for each in optimizer.chained_optimizers if not each.is_stub_optimizer]
            states = [value for each in real for state in each.optimizer.state.values() for value in state.values()]
            found = {
                "began": {name: p for name, p in self.began.items() if ".adapter." in name},
                "names": set(self.began),
                "changed": {name for name, p in self.parameters(trainer) if not torch.equal(p, self.began[name])},
                "with_gradient": {name for name, p in self.parameters(trainer) if p.requires_grad},
                "sizes": {name: p.numel() for name, p in self.parameters(trainer)},
                "gradient_elements": sum(buffer.numel for chunk in chunks for buffer in chunk.module.buffers),
                "optimizer_elements": sum(value.numel() for value in states if isinstance(value, torch.Tensor)),
                "encoder_trains": [m.training for n, m in chunks[0].named_modules() if n.endswith("vision.encoder")],
            }
            self.out.mkdir(parents=True, exist_ok=True)
            torch.save(found, self.out / f"probe{os.environ['RANK']}.pt")

    return run.Config(Probe, out=str(out))
