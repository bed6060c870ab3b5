"""The signals that let a run's step finish, save, and end it."""

from __future__ import annotations

import signal
from collections.abc import Iterable

# A time limit is near; the machine is wanted for something else; a person ends the run. A cluster lets a run go on by itself
# after the first two: of several, the last one here counts.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def decisive(received: Iterable[int]) -> signal.Signals:
    """That of the received signals which says how the run ends."""
    return max(map(signal.Signals, received), key=SIGNALS.index)
