"""The stage that score and train share: work units in, token ids out, one task and one block per unit.

A custom Ray Data source, because it is the extension point at which a unit stays one task, one block and in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import Block, BlockMetadata

from pipelines.model_folder import TOKENIZER_FILES, local_folder
from pipelines.pretrained import load_tokenizer
from pipelines.settings import DataSettings
from pipelines.shards import WorkUnit, read_unit
from pipelines.tables import SOURCE_COLUMNS
from pipelines.tokenization import Documents, Tokenizer, Tokens

UNIT, IDS, PAIR_IDS, ERROR = "__unit", "__ids", "__pair_ids", "__error"
"""Columns of a block between the stages: unit number, token ids, those of the second text, why a row is bad."""
TOKENIZE_CPUS = 1.0


@dataclass(frozen=True)
class TokenizeStage:
    """What a read task needs to know."""

    location: str
    data: DataSettings
    tokenizer_folder: str
    keep: tuple[str, ...] = ()
    """Input columns to carry along."""
    prefix: str = ""
    """Of the names of the source columns."""
    lead_space: bool = False
    """Whether a space goes before each text (`windows.leads_with_space`)."""

    @property
    def text_columns(self) -> list[str]:
        """The text column, or the two of a pair."""
        return [name for name in (self.data.text_column, self.data.text_pair_column) if name is not None]

    def __call__(self, unit: WorkUnit) -> pa.Table:
        """The unit's rows in order: kept and source columns, then UNIT, IDS, PAIR_IDS (pairs only), ERROR."""
        columns = list(dict.fromkeys([*self.keep, *self.text_columns]))
        table = read_unit(self.location, unit, columns, prefix=self.prefix)
        documents = _tokenizer(self.tokenizer_folder, self.lead_space).documents(table, *self.text_columns)
        block = table.select([*self.keep, *(self.prefix + name for name in SOURCE_COLUMNS)])
        block = block.append_column(UNIT, pa.array(np.full(len(block), unit.number, np.int32)))
        block = block.append_column(IDS, documents.tokens.to_arrow())
        if documents.pair_tokens is not None:
            block = block.append_column(PAIR_IDS, documents.pair_tokens.to_arrow())
        return block.append_column(ERROR, pa.array(documents.errors, pa.string()))


class UnitDatasource(Datasource):
    """One read task per work unit."""

    def __init__(self, stage: TokenizeStage, units: Sequence[WorkUnit]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stage, self._units = stage, units

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before tokenizing."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """All units, whatever parallelism Ray would like."""
        return [_read_task(self._stage, unit) for unit in self._units]


def tokenized(stage: TokenizeStage, units: Sequence[WorkUnit]) -> Dataset:
    """A dataset with one block of ids per unit. Sets this process's Ray Data context so that blocks stay whole."""
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    dataset: Dataset = ray.data.read_datasource(
        UnitDatasource(stage, units), override_num_blocks=len(units), num_cpus=TOKENIZE_CPUS
    )
    return dataset


def documents_of(block: pa.Table) -> Documents:
    """The documents of a tokenized block."""
    pair = Tokens.from_arrow(block.column(PAIR_IDS)) if PAIR_IDS in block.column_names else None
    return Documents(Tokens.from_arrow(block.column(IDS)), pair, block.column(ERROR).to_pylist())


def unit_number(block: pa.Table) -> int:
    """Which unit a tokenized block is."""
    return int(block.column(UNIT)[0].as_py())


def _read_task(stage: TokenizeStage, unit: WorkUnit) -> ReadTask:
    def read() -> Iterable[Block]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there are as many of these processes as cores
        return [stage(unit)]

    return ReadTask(read, BlockMetadata(num_rows=unit.num_rows, size_bytes=None, exec_stats=None, input_files=None))


def _tokenizer(location: str, lead_space: bool) -> Tokenizer:
    """Of a model folder at a path or URL, loaded once per worker process and again when it changes."""
    folder = local_folder(location)
    changed = max(file.stat().st_mtime_ns for file in folder.iterdir() if file.name in TOKENIZER_FILES)
    return _loaded(folder, changed, lead_space)


@cache
def _loaded(folder: Path, _changed: int, lead_space: bool) -> Tokenizer:
    return load_tokenizer(folder, lead_space=lead_space)
