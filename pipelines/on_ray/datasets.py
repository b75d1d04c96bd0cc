"""The Ray Data source that scoring and training share: work units in, tokenized units out.

A custom Datasource is used because it determines what each read task reads. A unit is one row that contains its whole
table, so that Ray Data can neither split it nor join it with another one. One task reads consecutive units of a row
group, so that the row group is decoded once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import Block, BlockMetadata

from pipelines.storage.shards import WorkUnit, group_units
from pipelines.text.attempts import Attempts
from pipelines.text.stage import TokenizedUnit, TokenizeStage

TOKENIZE_CPUS = 1.0
"""CPUs of one task that reads and tokenizes."""


class UnitDatasource(Datasource):
    """Ray Data source that reads and tokenizes work units."""

    def __init__(
        self, stage: TokenizeStage, tasks: Sequence[Sequence[WorkUnit]], attempts: Attempts | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stage, self._tasks, self._attempts = stage, tasks, attempts

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown before tokenizing."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return one read task per group of units. The parallelism that Ray proposes is ignored."""
        return [_read_task(self._stage, units, self._attempts) for units in self._tasks]


def tokenized_units(
    stage: TokenizeStage, units: Iterable[WorkUnit], *, attempts: Attempts | None = None, **ray_remote_args: Any
) -> Dataset:
    """Return a dataset with one row and one block per unit. `attempts` finds rows that kill their process."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # every row is a block of its own
    context.enable_progress_bars = False
    tasks = group_units(units)
    options = {"num_cpus": TOKENIZE_CPUS, **ray_remote_args}
    with DataContext.current(context):  # the dataset keeps it; the caller's own context is unchanged
        source = UnitDatasource(stage, tasks, attempts)
        dataset: Dataset = ray.data.read_datasource(source, override_num_blocks=len(tasks), **options)
    return dataset


def _read_task(stage: TokenizeStage, units: Sequence[WorkUnit], attempts: Attempts | None) -> ReadTask:
    def read() -> Iterable[Block]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is already one of these processes per core
        for unit, table in zip(units, stage(units, attempts), strict=True):
            yield TokenizedUnit(unit.number, unit.output_name, table).to_row()

    metadata = BlockMetadata(num_rows=len(units), size_bytes=None, exec_stats=None, input_files=None)
    return ReadTask(read, metadata)
