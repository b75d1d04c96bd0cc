"""`_summary.json` in the output folder of a scoring job: written last, and true for one state of the run.

A job that was frozen while it wrote its summary may replace that of a job which has changed the run since. So the
summary names the run and the number of its changes, and one of another state does not count.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pipelines.bulk.run_folder import SUMMARY, Run, check_same_run
from pipelines.bulk.summary import ScoreSummary
from pipelines.errors import JobError
from pipelines.storage.locations import commit_json, read_json, remove


def finished_summary(run: Run) -> ScoreSummary | None:
    """Return the summary of a finished run, or None if units or the summary are missing."""
    if len(run.finished) < run.num_units:
        return None
    try:
        content = read_json(run.location, SUMMARY)
        summary = ScoreSummary.from_json(run.location, content)
        same = (summary.files_gone, summary.rows_in) == (run.files_gone, run.num_rows)
        return summary if same and _is_of(run, content) else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged: it is computed again from the finished files
        return None


def commit_summary(run: Run, summary: ScoreSummary) -> None:
    """Write the summary of a finished run.

    Raises:
        JobError: Another job has changed the run. The summary is removed again.
    """
    commit_json(run.location, SUMMARY, {**summary.to_json(), **_state(run)})
    try:
        check_same_run(run)
    except JobError:
        with suppress(FileNotFoundError, ValueError):  # it is gone already
            if _is_of(run, read_json(run.location, SUMMARY)):
                remove(run.location, SUMMARY)
        raise


def _state(run: Run) -> dict[str, Any]:
    return {"run": run.manifest.run, "changes": run.manifest.changes}


def _is_of(run: Run, content: dict[str, Any]) -> bool:
    """Whether a summary is of this state of the run. Earlier versions wrote no state."""
    return all(content.get(name, value) == value for name, value in _state(run).items())
