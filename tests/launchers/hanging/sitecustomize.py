"""Python reads this first in processes that have this folder on their path: rank 1 of a run falls asleep once, in step HANG_STEP.

HANG_ONCE is a file that says that it has.
"""

import os
import sys
import threading
import time
from pathlib import Path


def fall_asleep() -> None:
    time.sleep(3600)


def arrange() -> None:
    """Wait for the callback that every run has, and put the nap before it."""
    while not hasattr(module := sys.modules.get("nemo_ext.callbacks.random_state"), "SeedEachStep"):
        time.sleep(0.01)
    each_step = module.SeedEachStep.on_train_batch_start

    def before(self, trainer, *rest):
        if trainer.global_step + 1 == int(os.environ["HANG_STEP"]) and not (slept := Path(os.environ["HANG_ONCE"])).exists():
            slept.touch()
            fall_asleep()
        return each_step(self, trainer, *rest)

    module.SeedEachStep.on_train_batch_start = before


if os.environ.get("RANK") == "1" and "HANG_ONCE" in os.environ:
    threading.Thread(target=arrange, daemon=True).start()
