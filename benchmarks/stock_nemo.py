"""The stock NeMo 2 recipe at given shapes on mock data, timed: the reference of benchmarks/train_gpu.py. Run by torchrun.

torchrun --nproc-per-node=2 benchmarks/stock_nemo.py '{"recipe": "llama3_8b", "seq": 8192, ...}' OUT.json
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(shape: dict, out: str) -> None:
    started = time.time()
    import fiddle as fdl
    import nemo_run as run
    import torch
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

    class Clock(Callback):
        """Times the steps, and at the last one writes the result and ends the process: Lightning would go on to copy model and
        optimizer to the host."""

        def __init__(self):
            self.times = []

        def on_train_batch_end(self, *unused):
            torch.cuda.synchronize()
            self.times.append(time.time())

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
                }
                with open(out, "w") as file:
                    json.dump(result, file)
            torch.distributed.barrier()
            os._exit(0)

    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(Clock)]
    fdl.build(recipe)()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
