"""Estimate the size and time of a scoring job from footers and a sample: rows, tokens, windows, hours."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.bulk.job import CheckedJob
from pipelines.errors import PipelinesError
from pipelines.model.loading import row_limit_of
from pipelines.model.scorer import Scorer, plan_of
from pipelines.model_folder import ModelFolder
from pipelines.progress import LONG_SECONDS, duration
from pipelines.settings import ComputeSettings
from pipelines.storage.filters import kept_rows
from pipelines.storage.rows import read_units
from pipelines.storage.shards import WorkUnits, split_into_units, usual_unit_bytes
from pipelines.text.pretrained import load_tokenizer
from pipelines.text.tokenization import Documents, cut_documents
from pipelines.text.windows import leads_with_space, most_tokens_of

SAMPLE_UNITS, SAMPLE_ROWS = 16, 64
"""The sample is the first SAMPLE_ROWS rows of up to SAMPLE_UNITS units, spread evenly over the input."""
SAMPLE_BYTES, FEWEST_UNITS = 64_000_000, 4
"""Decoded bytes of the units of the sample that a job takes before it begins, and the fewest units."""
MEASURED_SECONDS = 10.0
"""Maximum duration of the speed measurement."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Sizes of a job, and the time that one replica needs for it."""

    files: int
    files_in_error: int
    bytes: int
    rows: int
    units: int
    sample_rows: int
    sample_rows_in_error: int
    """Rows of the sample that cannot be read or have no text."""
    tokens: int
    windows: int
    tokens_in_windows: int
    tokenize_cpu_hours: float
    tokens_per_second_per_replica: int
    rate_is: str
    """Source of the rate: "measured here" or "given"."""
    replica_hours: float
    replicas: int
    """Replicas of the job, if its settings say so, else 1."""
    wall_seconds: float
    """Estimated duration with these replicas, without the start."""
    longest_tokens: int
    """Tokens of the longest document of the sample."""

    @property
    def in_words(self) -> str:
        """How long the job takes, and what would make it quicker."""
        if self.sample_rows == self.sample_rows_in_error:
            return "not known: no row of the sample can be scored"
        text = f"{duration(self.wall_seconds)} with {self.replicas} replica{'s' * (self.replicas > 1)}"
        if self.wall_seconds > LONG_SECONDS:
            text += "; a GPU, more replicas, an int8 model (pipelines quantize) or --early-exit exact are quicker"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON content."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a job, from a sample of its rows."""

    documents: Documents
    """The rows of the sample that can be scored."""
    errors: Sequence[str]
    """Why the others cannot."""
    rows: float
    """Rows that pass the filter."""
    tokens: float
    windows: float
    tokens_in_windows: float
    tokenize_seconds: float

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest document of the sample."""
        return int(self.documents.num_tokens_D.max(initial=0))

    def warn(self) -> None:
        """Log if the sample says little: it has no rows, or rows that cannot be scored."""
        num_rows = len(self.documents) + len(self.errors)
        if not num_rows:
            logger.warning("no row of the sample passes the filter: how much there is to score is not known")
        elif self.errors:
            logger.warning(
                "%d of %d sample rows cannot be scored, such as: %s", len(self.errors), num_rows, self.errors[0]
            )


def say_sizes(checked: CheckedJob) -> None:
    """Log how much there is to score. A sample that cannot be read is left to the job."""
    unit_bytes = checked.job.score.unit_bytes or usual_unit_bytes(checked.files)
    units = split_into_units(checked.files, unit_bytes=unit_bytes, limit=checked.job.data.limit)
    try:
        sizes = sizes_of(checked, units, max(FEWEST_UNITS, min(SAMPLE_UNITS, SAMPLE_BYTES // unit_bytes)))
    except (PipelinesError, OSError, MemoryError, pa.ArrowException) as error:
        logger.warning("how much there is to score is not known, because a sample cannot be read: %s", error)
        return
    sizes.warn()
    if len(sizes.documents):
        logger.info(
            "about %s windows and %s tokens in %s rows, by a sample of %d; its longest document has %s tokens",
            f"{sizes.windows:,.0f}",
            f"{sizes.tokens_in_windows:,.0f}",
            f"{sizes.rows:,.0f}",
            len(sizes.documents) + len(sizes.errors),
            f"{sizes.longest_tokens:,}",
        )


def sizes_of(checked: CheckedJob, units: WorkUnits, most_units: int = SAMPLE_UNITS) -> Sizes:
    """Read and tokenize a sample of the input, and scale its sizes up to all rows.

    Args:
        checked: The job.
        units: The units of its input.
        most_units: Units from which the sample is taken.
    """
    folder = checked.folder
    table, unread, share = _sample(checked, units, most_units)
    tokenizer = load_tokenizer(folder.path, lead_space=leads_with_space(folder.windows, folder.model_type))
    tokenizer = tokenizer.with_most_tokens(most_tokens_of(folder.windows))
    started = time.perf_counter()
    documents = tokenizer.documents(table, *checked.job.data.text_columns)
    seconds = time.perf_counter() - started
    plan = plan_of(folder.windows, tokenizer, model_type=folder.model_type, model_limit=row_limit_of(folder))
    rows = units.num_rows * share
    per_row = rows / max(len(documents) + len(unread), 1)
    errors = unread + [error for error in documents.errors if error is not None]
    documents = documents.take(np.flatnonzero([error is None for error in documents.errors]))
    cut = cut_documents(documents.tokens, plan, tokenizer.template, documents.pair_tokens)
    tokens, windows = documents.num_tokens_D.sum() * per_row, len(cut.length_W) * per_row
    return Sizes(documents, errors, rows, tokens, windows, cut.length_W.sum() * per_row, seconds * per_row)


def estimate(checked: CheckedJob, *, rate: float | None = None) -> Estimate:
    """Estimate the size of a checked job, and its time at `rate` tokens per second.

    Without a rate, the speed of this machine is measured on the sample.
    """
    job = checked.job
    units = split_into_units(checked.files, unit_bytes=job.score.unit_bytes, limit=job.data.limit)
    sizes = sizes_of(checked, units)
    sizes.warn()
    documents, input_tokens = sizes.documents, sizes.tokens_in_windows
    is_measured = rate is None
    replicas = max(1, (job.score.replica_range or (1, 1))[1])
    if rate is None and len(documents):
        logger.info("measuring on %d sample rows, for %.0f s at most", len(documents), MEASURED_SECONDS)
        rate = _measured_rate(checked.folder, job.compute, documents)
    return Estimate(
        files=len(checked.files),
        files_in_error=sum(file.error is not None for file in checked.files),
        bytes=sum(file.size for file in checked.files),
        rows=round(sizes.rows),
        units=len(units),
        sample_rows=len(documents) + len(sizes.errors),
        sample_rows_in_error=len(sizes.errors),
        tokens=round(sizes.tokens),
        windows=round(sizes.windows),
        tokens_in_windows=round(input_tokens),
        tokenize_cpu_hours=round(sizes.tokenize_seconds / 3600, 4),
        tokens_per_second_per_replica=round(rate or 0.0),
        rate_is="measured here" if is_measured else "given",
        replica_hours=round(input_tokens / rate / 3600 if rate else 0.0, 4),
        replicas=replicas,
        wall_seconds=round(input_tokens / rate / replicas if rate else 0.0, 1),
        longest_tokens=sizes.longest_tokens,
    )


def _sample(checked: CheckedJob, units: WorkUnits, most_units: int) -> tuple[pa.Table, list[str], float]:
    """Return sample rows from the whole input, why others cannot be read, and the share of rows that both are."""
    job = checked.job
    numbers = np.unique(np.linspace(0, len(units) - 1, min(most_units, len(units))).astype(int))
    tables, errors = [], []
    num_rows = 0
    for number in numbers:
        (rows,) = read_units(job.input, [units[int(number)]], checked.read, text_columns=job.data.text_columns)
        reasons = rows.errors[:SAMPLE_ROWS]
        num_rows += len(reasons)
        errors += [reason for reason in reasons if reason is not None]
        table = rows.table.slice(0, SAMPLE_ROWS).filter(pa.array([reason is None for reason in reasons]))
        if job.score.filter:
            table = table.filter(kept_rows(table, job.score.filter))
        tables.append(table)
    sample = pa.concat_tables(tables)
    return sample, errors, (len(sample) + len(errors)) / max(num_rows, 1)


def _measured_rate(folder: ModelFolder, compute: ComputeSettings, documents: Documents) -> float:
    """Measure the window tokens per second of a scorer in this process."""
    scorer = Scorer.load(folder, compute=compute)
    scorer.predict(["warm up"])
    started, tokens, row = time.perf_counter(), 0, 0
    while time.perf_counter() - started < MEASURED_SECONDS and row < len(documents):
        some = documents.take(np.arange(row, min(row + 8, len(documents))))
        cut = scorer.cut(some)
        scorer.model.logits(cut)
        tokens += int(cut.length_W.sum())
        row += 8
    return tokens / (time.perf_counter() - started)
