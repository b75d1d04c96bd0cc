"""Show progress: lines in the log, or a bar on a terminal and in a notebook.

Every module logs to `logging.getLogger(__name__)`, below the logger `pipelines`. `Progress` counts the work of one
task and shows how much is done, how fast it goes and how long it will still take. Nothing here configures logging,
except `show_logs`, which the command line calls.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

PROGRESS_SECONDS = 5.0
"""Seconds between two lines of progress in the log."""
SILENT_SECONDS = 30.0
"""Seconds between two lines of progress if nothing was finished in between."""
SLOW = 0.1
"""Below this rate, the seconds that one takes are shown."""
HINT_AFTER_SECONDS = 15.0
"""Seconds of measured work after which the remaining time is believed."""
LONG_SECONDS = 600.0
"""Remaining seconds from which on people are told what would make the work quicker."""
ROOT = logging.getLogger("pipelines")

_is_hidden: ContextVar[bool] = ContextVar("progress_is_hidden", default=False)


class Progress:
    """Counts the work of one task and shows it. This is a context manager.

    If stderr is a terminal, or in a notebook, it shows a bar. Otherwise it writes a line to the log every few seconds.
    `total` is the amount of work in `unit`s. With `measure_from_first`, the rate is measured from the first call of
    `advance`, so that the start of a cluster does not count.

    Example:
        >>> with Progress(logging.getLogger(__name__), "scored", total=200, unit="rows") as progress:
        ...     progress.advance(20, ["2 rows in error"])
    """

    def __init__(
        self,
        logger: logging.Logger,
        verb: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        is_shown: bool = True,
        measure_from_first: bool = False,
    ) -> None:
        self._logger, self._verb, self._unit = logger, verb, unit
        self._is_shown = is_shown and not _is_hidden.get()
        self._measure_from_first = measure_from_first
        self._started = self._last_shown = time.monotonic()
        self._measured_from: float | None = None if measure_from_first else self._started
        self.total, self.done, self._done_before = total, done, done
        self._last_written, self._last_done = self._started, -1
        self.details: Sequence[str] = ()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._is_shown and shows_bar():
            self._bar = tqdm(total=self.total, initial=self.done, desc=self._verb, unit=f" {self._unit}", leave=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: int = 1, details: Sequence[str] = ()) -> None:
        """Count `amount` more units as done, and show this every few seconds. The details follow the rate."""
        self.done += amount
        self.details = details
        if self._measured_from is None:  # everything before this was startup: processes, models, first batch
            self._measured_from, self._done_before = time.monotonic(), self.done
        if self._bar is not None:
            self._last_shown = time.monotonic() if self.is_due else self._last_shown
            self._bar.set_postfix_str(", ".join(details), refresh=False)
            self._bar.update(amount)
        else:
            self.show_if_due()

    @property
    def is_due(self) -> bool:
        """Whether the next call of `advance` shows its details."""
        return time.monotonic() - self._last_shown >= 0.9 * PROGRESS_SECONDS

    def show_if_due(self) -> None:
        """Write the line if the last one is old enough, or refresh the bar. A line without news comes less often."""
        if self._bar is not None:
            self._bar.refresh()
            return
        if not self.is_due:
            return
        now = self._last_shown = time.monotonic()
        if self._is_shown and (self.done != self._last_done or now - self._last_written >= SILENT_SECONDS):
            self._last_written, self._last_done = now, self.done
            self._logger.info("%s", self.line())

    @property
    def rate(self) -> float:
        """Units per second. 0 if nothing was measured yet."""
        seconds = self.measured_seconds
        return (self.done - self._done_before) / seconds if seconds else 0.0

    @property
    def measured_seconds(self) -> float:
        """Seconds over which the rate is measured. 0 before the measurement starts."""
        return 0.0 if self._measured_from is None else max(time.monotonic() - self._measured_from, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end. None if nothing was measured yet."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    def line(self) -> str:
        """Return one line with the amount done, the rate, the details and the remaining time."""
        share = self.done / max(self.total, 1)
        parts = [f"{self._verb} {self.done:,}/{self.total:,} {self._unit} ({share:.0%})"]
        if self.rate > 0:
            parts.append(self._rate_in_words())
        parts += self.details
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} to go")
        return ", ".join(parts)

    def _rate_in_words(self) -> str:
        """Return the rate per second, or what one takes if that is long."""
        if self.rate >= SLOW:
            return f"{self.rate:,.1f} {self._unit}/s"
        return f"{1 / self.rate:,.0f} s per {self._unit.removesuffix('s')}"


@contextmanager
def hidden_progress(is_hidden: bool = True) -> Iterator[None]:
    """Show no progress of tasks that begin inside the context. Log messages are not affected."""
    token = _is_hidden.set(is_hidden or _is_hidden.get())
    try:
        yield
    finally:
        _is_hidden.reset(token)


@contextmanager
def repeated(action: Callable[[], None], every_seconds: float = PROGRESS_SECONDS) -> Iterator[None]:
    """Call `action` from a thread every few seconds while the body runs."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every_seconds):
            action()

    thread = threading.Thread(target=run, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def shows_bar() -> bool:
    """Whether progress is a bar: stderr is a terminal or this is a notebook, and the log level includes INFO."""
    if ROOT.level > logging.INFO:
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """Return seconds as text in a suitable unit: 45 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_logs(verbosity: int = 0) -> None:
    """Show the package's log on stderr. Verbosity 0: from INFO on; 1: also debug messages; -1: warnings and errors."""
    handler = _AboveBars()
    handler.setFormatter(_Formatter() if verbosity <= 0 else logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    ROOT.handlers = [handler]
    ROOT.setLevel(logging.DEBUG if verbosity > 0 else logging.INFO if verbosity == 0 else logging.WARNING)
    ROOT.propagate = False


class _AboveBars(logging.Handler):
    """Writes to stderr, above the bars that are shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:  # noqa: BLE001  # a failed log line must not end the work, as in logging's own handlers
            self.handleError(record)


class _Formatter(logging.Formatter):
    """Formats a record as its message. Warnings and errors start with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"
