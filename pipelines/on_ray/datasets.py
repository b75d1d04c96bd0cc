"""The Ray Data source that scoring and training share: work units in, tokenized units out.

It is a custom source, because that extension point lets us say what each read task reads. A unit travels as one row
that holds its whole table, so that Ray Data can neither split it nor join it with another. One task reads the units of
one row group in sequence, so that the row group is decoded once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import Block, BlockMetadata

from pipelines.storage.shards import WorkUnit, group_units
from pipelines.text.stage import TokenizedUnit, TokenizeStage

TOKENIZE_CPUS = 1.0
"""CPUs that one task of reading and tokenizing takes."""


class UnitDatasource(Datasource):
    """Read tasks over work units."""

    def __init__(self, stage: TokenizeStage, tasks: Sequence[Sequence[WorkUnit]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stage, self._tasks = stage, tasks

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before tokenizing."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """All tasks, whatever parallelism Ray proposes."""
        return [_read_task(self._stage, units) for units in self._tasks]


def tokenized_units(stage: TokenizeStage, units: Iterable[WorkUnit], **ray_remote_args: Any) -> Dataset:
    """A dataset with one row and one block per unit. Sets this process's Ray Data context to keep it so."""
    context = DataContext.get_current()
    context.target_max_block_size = 1  # every row is a block of its own
    context.enable_progress_bars = False
    tasks = group_units(units)
    options = {"num_cpus": TOKENIZE_CPUS, **ray_remote_args}
    dataset: Dataset = ray.data.read_datasource(UnitDatasource(stage, tasks), override_num_blocks=len(tasks), **options)
    return dataset


def _read_task(stage: TokenizeStage, units: Sequence[WorkUnit]) -> ReadTask:
    def read() -> Iterable[Block]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there are as many of these processes as cores
        for unit, table in zip(units, stage(units), strict=True):
            yield TokenizedUnit(unit.number, unit.output_name, table).to_row()

    metadata = BlockMetadata(num_rows=len(units), size_bytes=None, exec_stats=None, input_files=None)
    return ReadTask(read, metadata)
