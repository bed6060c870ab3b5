"""Lets GRPO's worker fall asleep for ever in the rollout of step HANG_STEP. Put before everything else on PYTHONPATH."""

import importlib.abc
import importlib.util
import os
import sys
import time


def fall_asleep() -> None:
    while True:
        time.sleep(1)


class Finder(importlib.abc.MetaPathFinder):
    """Changes the trainer's module once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "nemo_ext.grpo.trainer":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        execute = found.loader.exec_module

        def changed(module) -> None:
            execute(module)
            score = module.Trainer._calculate_rewards

            def asleep(self, *arguments):
                if self.state.global_step + 1 == int(os.environ["HANG_STEP"]):
                    fall_asleep()
                return score(self, *arguments)

            module.Trainer._calculate_rewards = asleep

        found.loader.exec_module = changed
        return found


if "HANG_STEP" in os.environ:
    sys.meta_path.insert(0, Finder())
