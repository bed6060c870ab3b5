"""Python reads this first in processes that have this folder on their path: each step of a run takes STEP_SECONDS longer, until
there is a file HURRY."""

import os
import sys
import threading
import time


def arrange() -> None:
    """Wait for the callback that every run has, and put the pause before it."""
    while not hasattr(module := sys.modules.get("nemo_ext.callbacks.random_state"), "SeedEachStep"):
        time.sleep(0.01)
    each_step = module.SeedEachStep.on_train_batch_start

    def after_a_pause(self, *rest):
        if not os.path.exists(os.environ["HURRY"]):
            time.sleep(float(os.environ["STEP_SECONDS"]))
        return each_step(self, *rest)

    module.SeedEachStep.on_train_batch_start = after_a_pause


if "SLURM_PROCID" in os.environ and "STEP_SECONDS" in os.environ:
    threading.Thread(target=arrange, daemon=True).start()
