"""Progress as lines in the log and as a bar, and the log of the command line."""

import logging
import sys

import pytest

from pipelines import progress
from pipelines.progress import Progress, duration, hidden_progress, show_logs

logger = logging.getLogger("pipelines.test")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_have_share_rate_details_and_time_left(clock, log_lines):
    with Progress(logger, "scored", total=200, unit="rows") as shown:
        clock[0] += 1
        shown.advance(10)
        assert log_lines == [], "not yet"
        clock[0] += 9
        shown.advance(40, ["2 rows in error"])
    assert log_lines == ["scored 50/200 rows (25%), 5.0 rows/s, 2 rows in error, 30 s to go"]


def test_the_start_may_be_left_out_of_the_rate(clock):
    shown = Progress(logger, "scored", total=100, unit="rows", measure_from_first=True)
    clock[0] += 60
    shown.advance(10)
    assert shown.rate == 0
    clock[0] += 10
    shown.advance(20)
    assert shown.rate == pytest.approx(2)
    assert shown.seconds_left == pytest.approx(35)


def test_progress_can_be_hidden(clock, log_lines):
    with hidden_progress(), Progress(logger, "scored", total=2, unit="rows") as shown:
        clock[0] += 60
        shown.advance()
    with Progress(logger, "scored", total=2, unit="rows", is_shown=False) as shown:
        clock[0] += 60
        shown.advance()
    assert log_lines == []


def test_a_terminal_gets_a_bar(monkeypatch, capsys, log_lines):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(logger, "scored", total=2, unit="rows") as shown:
        shown.advance(1, ["1 row in error"])
        shown.show_if_due()
    assert "scored:  50%" in capsys.readouterr().err
    assert log_lines == []
    progress.ROOT.setLevel(logging.WARNING)
    assert not progress.shows_bar(), "-q hides it"


@pytest.mark.parametrize(("verbosity", "expected"), [(-1, 1), (0, 2), (1, 3)])
def test_the_command_lines_log(capsys, verbosity, expected):
    show_logs(verbosity)
    logger.debug("detail")
    logger.info("step")
    logger.warning("careful")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == expected
    assert "careful" in lines[-1]
    if verbosity == 0:
        assert lines == ["step", "warning: careful"]
    if verbosity == 1:
        assert "pipelines.test: detail" in lines[0]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_details_are_due_every_few_seconds_even_if_nothing_is_shown(clock, log_lines):
    """They may wait for a device: workers whose progress nobody sees must not ask at every step."""
    for is_shown in (True, False):
        with Progress(
            logging.getLogger("pipelines.test"), "trained", total=100, unit="steps", is_shown=is_shown
        ) as one:
            asked = 0
            for _ in range(20):
                clock[0] += 1.0
                asked += one.is_due
                one.advance()
        assert asked == 4


def test_a_line_without_news_comes_less_often(clock, log_lines):
    with Progress(logging.getLogger("pipelines.test"), "scored", total=100, unit="rows") as progress:
        progress.advance(10)
        for _ in range(20):
            clock[0] += 5.0
            progress.show_if_due()
    assert len(log_lines) == 4, "one with news, and one every 30 seconds"


def test_slow_work_shows_what_one_takes(clock):
    progress = Progress(logging.getLogger("pipelines.test"), "trained", total=10, unit="steps")
    clock[0] += 60.0
    progress.advance(3)
    assert "20 s per step" in progress.line()
