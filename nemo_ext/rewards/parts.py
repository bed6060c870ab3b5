"""What the rewards share: the interface, the count of what went wrong, and checks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_ext.errors import UserError
from nemo_ext.rewards.pool import Outcome

Row = dict[str, Any]


@dataclass
class Failures:
    """Answers that got 0 because their reward raised, hung or gave no number. The first message is kept."""

    count: int = 0
    message: str | None = None

    def add(self, message: str) -> float:
        """Count one; gives its value, 0."""
        self.count += 1
        self.message = self.message or message
        return 0.0

    def value(self, value: Any) -> float:
        """`value` as a float; 0, and counted, where it is no finite number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        return number if math.isfinite(number) else self.add(f"gave {str(value)[:60]!r}, which is no finite number")

    def outcome(self, outcome: Outcome) -> float:
        """The one value of a worker's outcome."""
        return self.value(outcome.values[0]) if outcome.values else self.add(outcome.error)


class Part(Protocol):
    """One reward of a sum."""

    def check(self, rows: Sequence[Row]) -> None:
        """Raises UserError where `rows` cannot be scored, or what scores them is out of reach."""

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """The value of each answer."""

    def close(self) -> None:
        """End what was started."""


@dataclass
class Rule:
    """A reward by a function of one answer and its row, which takes no time to speak of and runs here."""

    name: str
    function: Callable[[str, Row], float]
    needs: tuple[str, ...] = ()
    valid: Callable[[Row], str | None] = field(default=lambda row: None)

    def check(self, rows: Sequence[Row]) -> None:
        """Every row has the fields needed, and `valid` finds no fault with any."""
        need(self.name, rows, *self.needs)
        for place, row in enumerate(rows):
            if (fault := self.valid(row)) is not None:
                raise UserError(f"reward={self.name}: problem {place + 1}: {fault}")

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """The value of each answer."""
        values = []
        for answer, row in zip(answers, rows, strict=True):
            try:
                values.append(failures.value(self.function(answer, row)))
            except Exception as error:
                values.append(failures.add(f"{type(error).__name__}: {error}"))
        return values

    def close(self) -> None:
        """Nothing was started."""


def need(name: str, rows: Sequence[Row], *fields: str) -> None:
    """Raises UserError where a row lacks one of `fields`, or has nothing in it."""
    for each in fields:
        bad = [place for place, row in enumerate(rows) if row.get(each) is None or str(row[each]).strip() == ""]
        if bad:
            how = f": name its column with {each}_key=" if each in ("question", "answer") else ""
            there = ", ".join(sorted(map(str, rows[bad[0]]))) or "nothing"
            raise UserError(
                f"reward={name}: {len(bad):,} of {len(rows):,} problems have no `{each}` (problem {bad[0] + 1} has {there}){how}"
            )
