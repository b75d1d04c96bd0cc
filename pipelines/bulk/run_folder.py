"""The output folder of a scoring job: its content, its finished units, and how a run is begun, resumed or replaced.

`_manifest.json` is written before any unit, and only one of several jobs can create it. It contains the hashes of the
model and the settings, and the generations of input: the first start of a run creates one, and each start with --append
that finds new files adds one. The files of a generation are listed in `_inputs-0000-...parquet` and so on. A unit is
finished if its file exists. The name of this file depends on the run, and its footer has the unit's counts. No other
state is stored. `_summary.json` is written last (`pipelines.bulk.finished`).
"""

from __future__ import annotations

import json
import logging
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipelines.bulk.changes import check_change, check_gone, compare_input
from pipelines.bulk.manifest import (
    BEFORE,
    CHANGE_METADATA,
    MANIFEST,
    RUN_METADATA,
    Generation,
    Manifest,
    RunIdentity,
    check_not_in_table,
    check_run,
    check_unchanged,
    fingerprint_of,
    is_in_table,
    listing_of,
    next_name,
    read_listing,
    read_manifest,
    run_of,
)
from pipelines.bulk.summary import Counts
from pipelines.decisions.columns import DECISION_METADATA
from pipelines.errors import DataError, JobError, OutputError, first_line
from pipelines.storage.locations import (
    commit_json,
    commit_new_json,
    commit_table,
    filesystem_of,
    from_parquet,
    list_names,
    make_folder,
    remove,
    shown,
)
from pipelines.storage.marks import HEARTBEAT_SECONDS, others_of
from pipelines.storage.shards import OUTPUT_NAME, InputFile, WorkUnit, WorkUnits, split_into_units, usual_unit_bytes

SUMMARY = "_summary.json"
COUNTS_METADATA = b"pipelines.part"
"""Key in a scored file's schema metadata. The value is the `Counts` of its unit, as JSON."""
FOOTER_THREADS = 32
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A scoring run and its output folder: all units, and the names of those that are finished."""

    location: str
    manifest: Manifest
    generations: list[WorkUnits]
    """Units of each generation of input."""
    finished: frozenset[str]
    files_gone: int = 0
    """Number of input files that do not exist any more. Their scored rows are kept."""
    change: int = 0
    """If units with errors are scored again: the number of changes of the run, this one included."""

    @property
    def num_units(self) -> int:
        """Number of units of all generations that have rows."""
        return sum(sum(1 for _ in units) if units.replaced else len(units) for units in self.generations)

    def with_replaced_rows(self) -> Iterator[WorkUnit]:
        """Yield the units that were planned with rows of files of which there is a later version."""
        for units in self.generations:
            if units.replaced:
                planned = (units[index] for index in range(len(units)))
                yield from (unit for unit in planned if len(unit.spans) < len(unit.planned_spans))

    @property
    def num_rows(self) -> int:
        """Number of input rows of all units."""
        return sum(units.num_rows for units in self.generations)

    @property
    def num_files(self) -> int:
        """Number of input files of all generations."""
        return sum(len(units.files) for units in self.generations)

    @property
    def files_in_error(self) -> dict[str, str]:
        """The reason for each input file that could not be opened."""
        files = {file.url: file for units in self.generations for file in units.files}  # the last version of each
        return {url: file.error for url, file in files.items() if file.error is not None}


def open_run(
    location: str,
    files: Sequence[InputFile],
    columns: pa.Schema,
    identity: RunIdentity,
    *,
    input: str,
    unit_bytes: int | None = None,
    overwrite: bool = False,
    append: bool = False,
    replace_changed: bool = False,
    snapshot: str | None = None,
    mark: str = "",
) -> Run:
    """Begin a run in an output folder, or resume the run in it.

    Args:
        location: The output folder, a path or URL.
        files: The input files with their footers.
        columns: Columns that are copied from the input to the output.
        identity: Settings that must be unchanged for a run to be resumed.
        input: The input as the caller named it.
        unit_bytes: Text bytes of a work unit. By default it grows with the input.
        overwrite: First remove the run in the folder.
        append: Add input files that are new since the run was begun. Rows of files that are gone are kept.
        replace_changed: The same, and score changed files again.
        snapshot: Version of the table that is the input, if it is a table.
        mark: Name of the file with which this job marks the folder as in use.

    Raises:
        OutputError: The folder contains another run or other files, and the message names the difference; or files
            would be added or removed while another job writes to the folder.
    """
    make_folder(location)
    names = list_names(location)
    if overwrite or MANIFEST not in names:
        earlier = _make_room(location, names, mark, overwrite=overwrite)
        manifest = Manifest(shown(input), identity.to_json(), _types(columns), run=uuid.uuid4().hex)
        commit = commit_json if overwrite else commit_new_json
        with suppress(FileExistsError):  # another process has begun the run, or this one did, and the answer was lost
            manifest = _with_generation(location, manifest, files, unit_bytes, snapshot=snapshot)
            commit(location, MANIFEST, manifest.to_json())
            for name in set(earlier) - {manifest.generations[0].listing}:
                remove(location, name)
            return Run(location, manifest, units_of(manifest, [list(files)]), frozenset())
    while True:
        with suppress(FileExistsError):  # another process has added files, or this one did, and the answer was lost
            return _resumed(
                location,
                files,
                columns,
                identity,
                unit_bytes,
                append=append,
                replace_changed=replace_changed,
                snapshot=snapshot,
                mark=mark,
            )


def _resumed(
    location: str,
    files: Sequence[InputFile],
    columns: pa.Schema,
    identity: RunIdentity,
    unit_bytes: int | None,
    *,
    append: bool,
    replace_changed: bool,
    snapshot: str | None,
    mark: str,
) -> Run:
    """Resume the run in a folder. Parameters and errors are those of `open_run`.

    Raises:
        FileExistsError: Another process has added files to the run in the meantime.
    """
    manifest = read_manifest(location)
    _check_identity(location, manifest, identity)
    generations = [read_listing(location, generation.listing) for generation in manifest.generations]
    change = compare_input(generations, files)
    check_change(
        location,
        change,
        append=append,
        replace_changed=replace_changed,
        from_table=snapshot is not None,
        in_table=is_in_table(location),
    )
    _check_columns(location, manifest, columns)
    new = [*change.new, *change.changed]
    if new:
        _check_is_alone(location, mark, "--append and --replace-changed would change the run of a job that runs now")
        check_gone(location, change.gone, units_of(manifest, generations), _finished(list_names(location)))
        replaced = [file.url for file in change.changed if file.error is None]
        name = next_name(manifest)
        manifest = _with_generation(location, manifest, new, unit_bytes, replaced=replaced, snapshot=snapshot)
        commit_new_json(location, name, manifest.to_json())
        generations.append(new)
    units, finished = units_of(manifest, generations), _finished(list_names(location))
    check_gone(location, change.gone, units, finished)
    done = frozenset(unit.output_name for part in units for unit in part if unit.output_name in finished)
    return Run(location, manifest, units, done, len(change.gone))


def without_errors(run: Run, mark: str) -> Run:
    """Return the run with only those units finished that have no rows in error. The others are scored again.

    Their files stay until new ones replace them.

    Raises:
        OutputError: Another job writes to the folder now, or files of the run are part of a table.
        JobError: Another job has changed the run in the meantime.
    """
    names = sorted(run.finished)
    bad = {name for name, counts in zip(names, read_counts(run.location, names), strict=True) if counts.rows_in_error}
    if not bad:
        return run
    _check_is_alone(run.location, mark, "--retry-errors would replace files of a job that runs now")
    check_not_in_table(run.location)
    changed = replace(run.manifest, retries=run.manifest.retries + 1)
    with suppress(FileExistsError):  # this process did it, and the answer was lost; or another one did the same
        commit_new_json(run.location, next_name(run.manifest), changed.to_json())
    run = replace(run, manifest=changed)
    check_same_run(run)
    remove(run.location, SUMMARY)  # it does not fit the files any more
    return replace(run, finished=run.finished - bad, change=changed.changes)


def read_counts(location: str, names: Sequence[str]) -> list[Counts]:
    """Read the counts of finished files from their footers.

    Raises:
        JobError: A file is damaged, or was not written by a scoring job.
    """
    filesystem, folder = filesystem_of(location)

    def read(name: str) -> Counts:
        try:
            return Counts.from_json(json.loads(read_metadata(filesystem, f"{folder}/{name}")[COUNTS_METADATA]))
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise JobError(
                f"{name} in {shown(location)} is damaged ({first_line(error)}); remove it, and start the job again to "
                f"score its rows"
            ) from error

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(read, names))


def read_metadata(filesystem: AbstractFileSystem, path: str) -> dict[bytes, bytes]:
    """Read the schema metadata of a Parquet file."""
    return from_parquet(filesystem, path, lambda file: dict(file.schema_arrow.metadata or {}))


def read_scored_metadata(filesystem: AbstractFileSystem, path: str) -> dict[bytes, bytes]:
    """Read the schema metadata of a scored file. Raises DataError if no scoring job has written it."""
    try:
        metadata = read_metadata(filesystem, path)
    except pa.ArrowInvalid:
        metadata = {}
    if DECISION_METADATA not in metadata:
        raise DataError(f"{path} was not written by `pipelines score`; give the output folder of a scoring job")
    return metadata


def commit_unit(location: str, name: str, table: pa.Table, counts: Counts, *, change: int = 0) -> Counts:
    """Write a unit's scored file atomically, with its counts in the footer.

    A file that is there already stays, because two processes may score a unit, and a table may have the file. If the
    table's metadata names a run, the folder must still have this run.

    Args:
        location: The output folder.
        name: Name of the file.
        table: Its rows.
        counts: Their counts.
        change: Above 0: a file that is there is replaced, if an earlier change of the run has written it. This is the
            number of changes of the run that the job knows.

    Returns:
        The counts of the file that is there now.

    Raises:
        JobError: Another job has replaced the run; or, if a file would be replaced, changed it or added it to a table.
    """
    run = (table.schema.metadata or {}).get(RUN_METADATA, b"")
    table = with_counts(table, counts, {CHANGE_METADATA: str(change)} if change else None)
    if not change:
        check_run(location, run.decode())
        with suppress(FileExistsError):
            commit_table(location, name, table, is_new=True)
            return counts
    if change:
        check_unchanged(location, change)
    existing = _metadata_of_part(location, name)  # after that: a later change has a higher number
    is_of_run = existing.get(RUN_METADATA, b"") == run and COUNTS_METADATA in existing
    if is_of_run and int(existing.get(CHANGE_METADATA, 0)) >= change:  # by a worker thought dead, or a later start
        return Counts.from_json(json.loads(existing[COUNTS_METADATA]))
    check_run(location, run.decode())  # at the last moment: the file may be that of a later run
    commit_table(location, name, table)
    return counts


def with_counts(table: pa.Table, counts: Counts, metadata: Mapping[bytes, str] | None = None) -> pa.Table:
    """Return the rows of a unit with their counts, and more if given, in their schema metadata."""
    own = {COUNTS_METADATA: json.dumps(counts.to_json()), **(metadata or {})}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **own})


def _metadata_of_part(location: str, name: str) -> dict[bytes, bytes]:
    """Return the metadata of a scored file. Empty if the file is damaged."""
    filesystem, folder = filesystem_of(location)
    try:
        return read_metadata(filesystem, posixpath.join(folder, name))
    except (pa.ArrowInvalid, FileNotFoundError):
        return {}


def check_same_run(run: Run) -> None:
    """Raise JobError if another job has replaced, extended or changed the run in the output folder."""
    check_run(run.location, run.manifest.run)
    now = read_manifest(run.location)
    if (now.generations, now.retries) != (run.manifest.generations, run.manifest.retries):
        what = "scored units of" if now.generations == run.manifest.generations else "added files to"
        raise JobError(
            f"another job has {what} the run in {shown(run.location)} while this one was working; start this job again "
            f"to finish it"
        )


def _check_is_empty(location: str, names: Mapping[str, int]) -> None:
    others = sorted(name for name in names if not name.startswith((".", "_inputs-", "_running-")))
    if others:
        raise OutputError(
            f"--output {shown(location)} is not empty and has no scoring run (it has {others[0]}); give a new folder"
        )


def _make_room(location: str, names: Mapping[str, int], mark: str, *, overwrite: bool) -> list[str]:
    """Check that a run can begin. Returns the names of files that go when its manifest is there.

    Until then, an earlier run stays as it is, but without its summary: a killed overwrite can be repeated.

    Raises:
        OutputError: The folder has something else; or, with overwrite, another job writes to it now, or files of the
            run are part of a table.
    """
    if not overwrite:
        _check_is_empty(location, names)
        return [name for name in names if name.startswith("_inputs-")]
    _check_is_alone(location, mark, "--overwrite would remove files of a job that runs now")
    check_not_in_table(location)
    if MANIFEST not in names:
        _check_is_empty(location, names)
    remove(location, SUMMARY)
    before = run_of(location)
    lists = [name for name in names if before and f"-{before[:8]}" in name]  # others may be of a run that begins now
    return [name for name in names if OUTPUT_NAME.fullmatch(name) or name.startswith((".part-", "._"))] + lists


def _check_is_alone(location: str, mark: str, problem: str) -> None:
    others = others_of(location, mark)
    if others:
        raise OutputError(
            f"{problem} ({others[0]}) and writes to {shown(location)}; wait for it, stop it, or give a new folder. "
            f"A killed job counts as running for {3 * HEARTBEAT_SECONDS:g} s"
        )


def _with_generation(
    location: str,
    manifest: Manifest,
    files: Sequence[InputFile],
    unit_bytes: int | None,
    *,
    replaced: Sequence[str] = (),
    snapshot: str | None = None,
) -> Manifest:
    """Write the list of new input files, and return a manifest that contains their generation."""
    table = listing_of(files)
    found = fingerprint_of(table)
    digest = found.removeprefix("sha256:")
    name = f"_inputs-{len(manifest.generations):04d}-{manifest.run[:8]}-{digest[:8]}.parquet"
    size = unit_bytes or usual_unit_bytes(files)
    units = split_into_units(files, unit_bytes=size, limit=manifest.limit, first_number=manifest.num_units)
    generation = Generation(name, found, len(files), units.num_rows, size, len(units), tuple(replaced), snapshot)
    remove(location, SUMMARY)
    commit_table(location, name, table)
    return replace(manifest, generations=(*manifest.generations, generation))


def units_of(manifest: Manifest, generations: Sequence[Sequence[InputFile]]) -> list[WorkUnits]:
    """Return the units of each generation. The numbers continue from one generation to the next."""
    found: list[WorkUnits] = []
    for number, (generation, files) in enumerate(zip(manifest.generations, generations, strict=True)):
        later = {url for other in manifest.generations[number + 1 :] for url in other.replaced}
        units = split_into_units(
            files, unit_bytes=generation.unit_bytes, limit=manifest.limit, first_number=sum(map(len, found))
        )
        run = manifest.run if manifest.names_of_run else ""
        found.append(replace(units, replaced=frozenset(later & {file.url for file in files}), run=run))
    return found


def _finished(names: Mapping[str, int]) -> frozenset[str]:
    """Return the names of files of units. An empty file is not a finished one."""
    return frozenset(name for name, size in names.items() if size and name.startswith("part-"))


def _check_identity(location: str, manifest: Manifest, identity: RunIdentity) -> None:
    for name, value in identity.to_json().items():
        before = manifest.identity.get(name, BEFORE.get(name))
        if before != value:
            raise OutputError(
                f"--output {shown(location)} contains another run: {name} was {before!r} and is now {value!r}; "
                "give a new folder, or --overwrite to remove what is there"
            )


def _check_columns(location: str, manifest: Manifest, columns: pa.Schema) -> None:
    """Check that all input files of a run give the same columns, including appended files."""
    before, now = dict(manifest.columns), _types(columns)
    if before != now:
        raise OutputError(
            f"--output {shown(location)} contains the columns {before}, but the input now gives {now}; change "
            f"the new files to the same columns, or give a new folder"
        )


def _types(columns: pa.Schema) -> dict[str, str]:
    return {column.name: str(column.type) for column in columns}
