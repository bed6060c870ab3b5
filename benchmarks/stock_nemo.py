"""The stock NeMo 2 recipe at given shapes on mock data, timed: the reference of benchmarks/train_gpu.py. Run by torchrun.

torchrun --nproc-per-node=2 benchmarks/stock_nemo.py '{"recipe": "llama3_8b", "seq": 8192, ...}' OUT.json

With "run", the folder of one of our runs, it has that run's shape, tokens and optimizer, and nothing else of it: the reference of
benchmarks/same_losses.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(shape: dict, out: str) -> None:
    started = time.time()
    import torch

    if on_cpu := not torch.cuda.is_available():  # a GPU's patches are ours, not stock
        from nemo_ext import platform

        platform.activate()
    import fiddle as fdl
    import nemo_run as run
    from lightning.pytorch.callbacks import Callback
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed, bf16_with_fp8_mixed

    imported = time.time()
    world = int(os.environ["WORLD_SIZE"])
    folder = os.path.join(os.path.dirname(out), "stock")
    recipe = getattr(llm, shape["recipe"]).pretrain_recipe(name="stock", dir=folder, num_nodes=1, num_gpus_per_node=world)
    recipe.data.tokenizer = run.Config(AutoTokenizer, shape["tokenizer"])  # its default is downloaded
    recipe.data.seq_length = recipe.model.config.seq_length = shape["seq"]
    recipe.model.config.vocab_size = shape["vocab"]  # the model's own; else the tokenizer's
    recipe.data.global_batch_size, recipe.data.micro_batch_size = shape["global_batch"], shape["micro_batch"]
    recipe.trainer.strategy.tensor_model_parallel_size = shape["tp"]
    recipe.trainer.strategy.pipeline_model_parallel_size = shape["pp"]
    recipe.trainer.strategy.virtual_pipeline_model_parallel_size = shape.get("vp")
    recipe.trainer.strategy.context_parallel_size = 1
    recipe.trainer.strategy.sequence_parallel = shape["tp"] > 1
    recipe.trainer.plugins = bf16_with_fp8_mixed() if shape["precision"] == "fp8" else bf16_mixed()
    recipe.trainer.max_steps, recipe.trainer.limit_val_batches, recipe.trainer.val_check_interval = shape["steps"], 0, None
    recipe.trainer.enable_checkpointing, recipe.trainer.logger = False, False
    recipe.log.ckpt, recipe.log.tensorboard = None, None
    recipe.resume = None
    if "run" in shape:
        _follow(recipe, Path(shape["run"]))
        recipe.trainer.accelerator = "cpu" if on_cpu else "gpu"

    class Clock(Callback):
        """Times the steps, and at the last one writes the result and ends the process: Lightning would go on to copy model and
        optimizer to the host."""

        def __init__(self):
            self.times, self.losses = [], []

        def on_train_batch_end(self, trainer, *unused):
            torch.cuda.synchronize()
            self.times.append(time.time())
            self.losses.append(float(trainer.callback_metrics.get("reduced_train_loss", "nan")))

        def on_train_end(self, *unused):
            peaks = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device="cuda")
            torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
            if torch.distributed.get_rank() == 0:
                result = {
                    "step_times": [b - a for a, b in zip(self.times, self.times[1:], strict=False)],
                    "memory_gib": peaks[0].item() / 2**30,
                    "reserved_gib": peaks[1].item() / 2**30,
                    "import_seconds": imported - started,
                    "first_step_at": self.times[0],
                    "losses": self.losses,
                }
                with open(out, "w") as file:
                    json.dump(result, file)
            torch.distributed.barrier()
            os._exit(0)

    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(Clock)]
    fdl.build(recipe)()


def _follow(recipe, folder: Path) -> None:
    """Give NeMo's recipe the shape, the data and the optimizer of one of our runs."""
    import recipes
    from nemo_ext.architecture import Architecture
    from nemo_ext.modeling import COMMON_FIELDS

    job = json.loads((folder / "job.json").read_text())
    shape = Architecture(**job["architecture"])
    ours = recipes.load(job["recipe"], shape=shape, overrides=job["overrides"], **job["keys"])
    recipes.bind(ours, run_dir=str(folder), tokenizer=job["tokenizer"], blend=job["blend"], weights=None, checkpoint=None)
    recipe.data, recipe.optim = ours.data, ours.optim
    for name in COMMON_FIELDS:
        setattr(recipe.model.config, name, getattr(shape, name))
    if shape.rope_scaling is None:
        recipe.model.config.scale_factor = 1.0
    recipe.model.tokenizer = ours.data.tokenizer
    if job["keys"]["precision"] == "fp32":  # which NeMo has no recipe for
        recipe.trainer.plugins = ours.trainer.plugins


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
