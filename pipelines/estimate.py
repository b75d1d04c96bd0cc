"""What a scoring job will take, from footers and a sample: rows, tokens, windows, time. Knows no ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.filters import kept_rows, parse_filter
from pipelines.model_folder import ModelFolder
from pipelines.pretrained import load_tokenizer
from pipelines.reading import read_units
from pipelines.scoring import Scorer, plan_of
from pipelines.settings import ComputeSettings
from pipelines.shards import InputFile, Plan, plan_units
from pipelines.tokenization import Documents, cut_documents
from pipelines.windows import leads_with_space

SAMPLE_UNITS, SAMPLE_ROWS = 16, 64
"""The sample is the first rows of units spread evenly over the input."""
MEASURED_SECONDS = 10.0
Report = Callable[[str], None]


def estimate(
    folder: ModelFolder,
    files: Sequence[InputFile],
    schema: pa.Schema,
    text_columns: Sequence[str],
    *,
    input: str,
    compute: ComputeSettings,
    limit: int | None = None,
    filter: str | None = None,
    unit_bytes: int | None = None,
    rate: float | None = None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Sizes of the job, and seconds of one replica: at rate tokens/s, or as measured on the sample here."""
    plan = plan_units(files, unit_bytes=unit_bytes, limit=limit)
    table, share = _sample(plan, schema, text_columns, input, filter)
    tokenizer = load_tokenizer(folder.path, lead_space=leads_with_space(folder.windows, folder.model_type))
    started = time.perf_counter()
    documents = tokenizer.documents(table, *text_columns)
    tokenize_seconds = time.perf_counter() - started
    windows = plan_of(folder.windows, tokenizer, model_type=folder.model_type)
    cut = cut_documents(documents.tokens, windows, tokenizer.template, documents.pair_tokens)
    rows = plan.num_rows * share
    per_row = rows / max(len(documents), 1)
    tokens, input_tokens = documents.num_tokens_D.sum() * per_row, cut.length_W.sum() * per_row
    measured = rate is None
    if rate is None and len(documents):
        report(f"measuring on {len(documents)} sample rows, for {MEASURED_SECONDS:.0f} s at most")
        rate = _measured_rate(folder, compute, documents)
    hours = input_tokens / rate / 3600 if rate else 0.0
    return {
        "files": len(files),
        "files_in_error": sum(file.error is not None for file in files),
        "bytes": sum(file.size for file in files),
        "rows": round(rows),
        "units": len(plan),
        "sample_rows": len(documents),
        "tokens": round(tokens),
        "windows": round(len(cut.length_W) * per_row),
        "tokens_in_windows": round(input_tokens),
        "tokenize_cpu_hours": round(tokenize_seconds * per_row / 3600, 4),
        "tokens_per_second_per_replica": round(rate or 0.0),
        "rate_is": "measured here" if measured else "given",
        "replica_hours": round(hours, 4),
    }


def _sample(
    plan: Plan, schema: pa.Schema, text_columns: Sequence[str], input: str, filter: str | None
) -> tuple[pa.Table, float]:
    """Rows from all over the input, and the share of rows that pass the filter."""
    places = np.unique(np.linspace(0, len(plan) - 1, min(SAMPLE_UNITS, len(plan))).astype(int))
    tables = []
    seen = 0
    for place in places:
        (rows,) = read_units(input, [plan[int(place)]], schema, text_columns=text_columns)
        table = rows.table.slice(0, SAMPLE_ROWS)
        seen += len(table)
        tables.append(table.filter(kept_rows(table, parse_filter(filter)[0])) if filter else table)
    table = pa.concat_tables(tables)
    return table, len(table) / max(seen, 1)


def _measured_rate(folder: ModelFolder, compute: ComputeSettings, documents: Documents) -> float:
    """Window tokens per second of a scorer in this process."""
    scorer = Scorer.load(folder, compute=compute)
    scorer.predict(["warm up"])
    started, tokens, row = time.perf_counter(), 0, 0
    while time.perf_counter() - started < MEASURED_SECONDS and row < len(documents):
        part = documents.take(np.arange(row, min(row + 8, len(documents))))
        cut = cut_documents(part.tokens, scorer.plan, scorer.tokenizer.template, part.pair_tokens)
        scorer.model.logits(cut)
        tokens += int(cut.length_W.sum())
        row += 8
    return tokens / (time.perf_counter() - started)
