"""Where the seconds from the command to the first step went, as one line of a rank's log."""

from __future__ import annotations

import time

from lightning.pytorch.callbacks import Callback


class StartTimes(Callback):
    """Prints, when the first step is done: `first step after 31.2 s: command 6.1, imports 9.8, ...`.

    Stands after the callback that evaluates before training.

    Args:
        before: seconds from the command until now, by what they went for.
    """

    def __init__(self, before: dict[str, float]) -> None:
        self.before = before
        self._built = self._mark = time.monotonic()
        self._ready: float | None = None
        self._evaluation = 0.0

    def on_validation_start(self, trainer, pl_module) -> None:
        self._say()  # an evaluation after the first step is no part of it
        self._mark = time.monotonic()

    def on_validation_end(self, trainer, pl_module) -> None:
        self._evaluation += time.monotonic() - self._mark

    def on_train_start(self, trainer, pl_module) -> None:
        self._ready = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._say()

    def _say(self) -> None:
        """Once, after the first step."""
        if self._ready is None:
            return
        parts = {
            **self.before,
            "model and checkpoint": self._ready - self._built - self._evaluation,
            "evaluation": self._evaluation,
            "step": time.monotonic() - self._ready,
        }
        said = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        print(f"first step after {sum(parts.values()):.1f} s: {said}", flush=True)
        self._ready = None
