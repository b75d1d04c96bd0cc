"""Run a scoring job: begin or resume its output folder, score the remaining units, write the summary.

The caller chooses how units are scored: in this process (`score_here`), or on Ray (`pipelines.on_ray.score`).
"""

from __future__ import annotations

import itertools
import logging
import posixpath
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from pipelines.bulk.estimate import say_sizes
from pipelines.bulk.finished import commit_summary, finished_summary
from pipelines.bulk.here import MOST_SECONDS, seconds_here
from pipelines.bulk.job import CheckedJob, ScoreJob, check_job
from pipelines.bulk.manifest import MANIFEST
from pipelines.bulk.progress import RunTotals
from pipelines.bulk.publish import publish
from pipelines.bulk.replaced import remove_replaced_rows
from pipelines.bulk.run_folder import Run, check_same_run, open_run, read_counts, without_errors
from pipelines.bulk.strays import leave, remove_strays, strays_of, sweep
from pipelines.bulk.summary import Counts, ScoreSummary, sum_counts, summarize
from pipelines.bulk.unit import UnitScorer, load_scorer
from pipelines.errors import JobError
from pipelines.progress import repeated
from pipelines.settings import DecisionSettings
from pipelines.storage.footers import no_memory
from pipelines.storage.locations import exists, list_names, make_folder, shown
from pipelines.storage.marks import heartbeat
from pipelines.storage.shards import WorkUnit, group_units
from pipelines.text.stage import TokenizedUnit

RESUME_HINT = "finished units are kept: start the job again to resume it"
UNITS_PER_WAVE = 5_000
"""Units that are planned at once, so that units of the same row group are read together."""
ScoreUnits = Callable[[CheckedJob, Iterator[WorkUnit]], Iterator[Counts]]
"""Function that scores and commits units, and yields the counts of each unit when it is committed."""
logger = logging.getLogger(__name__)


def score_here(job: ScoreJob) -> ScoreSummary:
    """Score the job in this process, without Ray.

    Raises:
        UsageError: Model, input, columns, settings or output do not fit. No work was done.
        JobError: The job cannot be finished. Finished units are kept.
    """
    return run_job(check_job(job), score_units_here)


def run_job(
    checked: CheckedJob, score_units: ScoreUnits, *, on_numbers: Callable[[Mapping[str, float]], None] | None = None
) -> ScoreSummary:
    """Score every row of the input, and return the summary, which is also written to the output folder.

    If the output folder contains an unfinished run, it is resumed. A finished run is not changed.

    Args:
        checked: The job.
        score_units: Scores and commits units.
        on_numbers: Receives the counts so far, by name, after each unit.
    """
    job = checked.job
    make_folder(job.output)
    is_new = not exists(job.output, MANIFEST)
    with heartbeat(job.output) as mark:
        run = open_run(
            job.output,
            checked.files,
            checked.carried,
            checked.identity,
            input=job.input,
            unit_bytes=job.score.unit_bytes,
            overwrite=job.score.overwrite,
            append=job.score.append,
            replace_changed=job.score.replace_changed,
            snapshot=checked.snapshot,
            mark=mark.name,
        )
        if job.score.retry_errors:
            run = without_errors(run, mark.name)
        summary = _of_finished_run(job, run)
        if summary is not None:
            return summary
        if mark.others:
            logger.warning(
                "another job writes to this folder (%s): both do the same work, and the result is correct",
                mark.others[0],
            )
        checked = replace(checked, run=run.manifest.run, change=run.change)
        if is_new and seconds_here(checked) > MOST_SECONDS:  # once: a row may kill the process that reads it
            say_sizes(checked)
        try:
            totals = _score_rest(checked, run, score_units, on_numbers)
            names = list_names(run.location)
            check_same_run(run)
        except (JobError, FileNotFoundError):
            leave(run)
            with suppress(OSError):
                check_same_run(run)  # if another job has replaced the run, this is the reason
            raise
        remove_strays(run, names)
        summary = _finish(checked, run, totals, names)
        sweep(run.location, mark.name)
        return summary


def _of_finished_run(job: ScoreJob, run: Run) -> ScoreSummary | None:
    """Return the summary if all units are done already. Late files of an earlier run are removed."""
    summary = finished_summary(run)
    if summary is None:
        return None
    names = list_names(run.location)
    if strays_of(run, names):
        check_same_run(run)
        remove_strays(run, names)
    logger.info("nothing to do: all %s units of %s are done", f"{run.num_units:,}", shown(job.output))
    if job.score.table is not None:
        summary = replace(summary, table=publish(run, job.score.table))
        commit_summary(run, summary)
    return summary


def _score_rest(
    checked: CheckedJob, run: Run, score_units: ScoreUnits, on_numbers: Callable[[Mapping[str, float]], None] | None
) -> RunTotals:
    """Score the units that are not finished. Returns the counts of all units."""
    job = checked.job
    totals = RunTotals(run, checked.decision, job.score.max_errors)
    if run.finished:
        logger.info("resuming: %s of %s units are done", f"{len(run.finished):,}", f"{run.num_units:,}")
        old = {unit.output_name for unit in run.with_replaced_rows()}  # counted when their old rows are removed
        totals.add_finished(read_counts(run.location, sorted(run.finished - old)))
    left = run.num_units - len(run.finished)
    logger.info(
        "%s files, %s rows, %s units to do -> %s",
        f"{run.num_files:,}", f"{run.num_rows:,}", f"{left:,}", shown(job.output),
    )  # fmt: skip
    units = (unit for units in run.generations for unit in units if unit.output_name not in run.finished)
    with totals.progress, repeated(totals.show):
        for counts in score_units(checked, units):
            totals.add(counts)
            if on_numbers is not None:
                on_numbers(totals.numbers)
    totals.add_finished(remove_replaced_rows(run, checked.decision, prefix=job.score.prefix))
    return totals


def score_units_here(checked: CheckedJob, units: Iterator[WorkUnit]) -> Iterator[Counts]:
    """Tokenize, score and commit units in this process, one after another."""
    setup, stage = checked.replica_setup(), checked.stage
    scorer = UnitScorer(setup, load_scorer(setup))
    while wave := list(itertools.islice(units, UNITS_PER_WAVE)):
        for group in group_units(wave):
            try:
                for unit, table in zip(group, stage(group), strict=True):
                    try:
                        yield scorer.score_unit(TokenizedUnit(unit.number, unit.output_name, table))
                    except OSError as error:
                        message = f"{shown(checked.job.output)} cannot be written: {error}; {RESUME_HINT}"
                        raise JobError(message) from error
            except MemoryError as error:
                raise no_memory("to score a unit") from error


def _count_files(run: Run, here: Mapping[str, int], decision: DecisionSettings) -> Counts:
    """Add the counts in the files of all units: what is there counts, and not what this process has written.

    Raises:
        JobError: Files are missing.
    """
    names = [unit.output_name for units in run.generations for unit in units]
    gone = [name for name in names if not here.get(name)]
    try:
        if not gone:
            return sum_counts(decision, read_counts(run.location, names))
    except FileNotFoundError as error:
        gone = [posixpath.basename(str(error.filename or error))]
    raise JobError(
        f"{len(gone)} of {run.num_units} files are missing in {shown(run.location)}, such as {gone[0]}: something "
        f"else removed them while the job ran; start the job again to score their rows"
    )


def _finish(checked: CheckedJob, run: Run, totals: RunTotals, here: Mapping[str, int]) -> ScoreSummary:
    """Check that no row and no file is missing, and write the summary."""
    total = replace(_count_files(run, here, checked.decision), seconds=totals.total.seconds)
    if total.rows_in != run.num_rows or total.rows_out + total.rows_filtered != run.num_rows:
        raise JobError(
            f"{run.num_rows} rows in, but {total.rows_out} out and {total.rows_filtered} filtered out in "
            f"{shown(run.location)}"
        )
    table = "" if checked.job.score.table is None else publish(run, checked.job.score.table)
    summary = summarize(
        run.location,
        total,
        checked.decision,
        files_in_error=run.files_in_error,
        files_gone=run.files_gone,
        table=table,
        wall_seconds=round(totals.elapsed, 2),
        rows_per_second=round(totals.rows_here / totals.elapsed, 2),
        units_before=len(run.finished),
    )
    for name, count in summary.values_lost.items():
        logger.warning(
            "%s values of column %s are null, because they do not fit its type or cannot be read", f"{count:,}", name
        )
    for warning in summary.warnings:
        logger.warning("%s", warning)
    commit_summary(run, summary)
    return summary
