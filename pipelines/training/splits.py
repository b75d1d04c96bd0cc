"""Tokenize labelled input files into corpora.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.progress import Progress
from pipelines.storage.columns import SOURCE_COLUMNS
from pipelines.storage.locations import shown
from pipelines.storage.shards import WorkUnits, fingerprint, group_units
from pipelines.text.stage import TokenizeStage, documents_of
from pipelines.text.tokenization import Documents
from pipelines.training.corpus import Corpus, UnitLengths

ROWS_SHOWN = 3
"""Rows without a text that a warning names."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """One labelled input: how to tokenize it, its work units, and its targets in the same row order."""

    stage: TokenizeStage
    units: WorkUnits
    targets: NDArray[np.generic]
    seed: int
    """Seed of the order in which units are tokenized."""

    @property
    def order(self) -> list[int]:
        """Units in the order of tokenizing. Units of one row group are kept together, so that it is decoded once."""
        groups = group_units(self.units)
        drawn = np.random.default_rng([self.seed, 0]).permutation(len(groups))
        return [unit.number for group in drawn for unit in groups[group]]

    @property
    def fingerprint(self) -> str:
        """Changes if any file or target changes."""
        files = fingerprint((file.url, file.size, file.version) for file in self.units.files)
        digest = hashlib.sha256(files.encode())
        digest.update(np.ascontiguousarray(self.targets).data)
        return digest.hexdigest()

    def corpus(self, lengths: Callable[[int], UnitLengths], table: Callable[[int], pa.Table]) -> Corpus:
        """Create a corpus of this split's units.

        Args:
            lengths: Function that returns the lengths of a unit.
            table: Function that returns the tokenized table of a unit.
        """
        documents = _UnitDocuments(table)
        source = f"{shown(self.stage.location)}, column {self.stage.text_columns[0]!r}"
        return Corpus(
            [unit.num_rows for unit in self.units],
            self.targets,
            lengths,
            documents,
            fingerprint=self.fingerprint,
            source=source,
            name=documents.name,
            order=self.order,
        )


@dataclass(frozen=True)
class _UnitDocuments:
    """Reads the documents of a unit from its table, and their display names."""

    table: Callable[[int], pa.Table]

    def __call__(self, unit: int) -> Documents:
        return documents_of(self.table(unit))

    def name(self, unit: int, row: int) -> str:
        return _row_name(self.table(unit), row)


def _row_name(table: pa.Table, row: int) -> str:
    file, source_row = (table.column(name)[row] for name in SOURCE_COLUMNS)
    return f"{shown(str(file))} row {source_row}"


def tokenize_into_files(split: Split, folder: Path, progress: Progress) -> Corpus:
    """Tokenize a split in this process, into one file per unit. The files are mapped into memory when they are read."""
    folder.mkdir()
    lengths = []
    bad: list[str] = []
    for number, table in enumerate(split.stage(split.units)):
        with pa.OSFile(str(folder / f"{number}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        documents = documents_of(table)
        lengths.append(UnitLengths.of(documents))
        bad += [f"{_row_name(table, row)}: {error}" for row, error in enumerate(documents.errors) if error is not None]
        progress.advance(len(table))
    corpus = split.corpus(lengths.__getitem__, lambda number: _mapped(folder / f"{number}.arrow"))
    corpus.check_texts()
    if bad:
        logger.warning(
            "%s of %s rows have no text that can be read, and are left out: %s%s",
            f"{len(bad):,}",
            f"{split.units.num_rows:,}",
            "; ".join(bad[:ROWS_SHOWN]),
            " ..." if len(bad) > ROWS_SHOWN else "",
        )
    return corpus


def _mapped(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
