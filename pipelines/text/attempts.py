"""Which rows are being worked on, so that they are known if the process dies (`pipelines.on_ray.replica`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RowsToTry:
    """How the rows of a unit are worked on, given the crashes of earlier attempts."""

    ranges: Sequence[tuple[int, int]]
    """Row ranges [start, stop), one after another."""
    deadly: Sequence[int] = ()
    """Rows that are left out, because the process died each time it worked on them."""


class Attempts(Protocol):
    """Records which rows are being worked on."""

    def begin(self, unit: int, num_rows: int) -> RowsToTry:
        """Record that the first range of the unit begins. Returns how its rows are worked on."""

    def begin_range(self, unit: int, rows: tuple[int, int]) -> None:
        """Record that another range of the unit begins."""

    def end(self, unit: int) -> None:
        """Record that all rows of the unit are done."""


class NoAttempts:
    """`Attempts` that records nothing, for a job in a single process."""

    def begin(self, unit: int, num_rows: int) -> RowsToTry:
        """Return all rows as one range."""
        return RowsToTry([(0, num_rows)])

    def begin_range(self, unit: int, rows: tuple[int, int]) -> None:
        """Do nothing."""

    def end(self, unit: int) -> None:
        """Do nothing."""
