"""Checkpoints of a training run, on any filesystem: written in the background, and complete or absent.

A checkpoint is a folder such as `checkpoints/step-000000120` in the run's output. Its state file is written last, and a
folder without it is ignored. `_run.json` in the output contains the data and settings with which the run was started,
and the id of its last start: a process of an earlier start, that was frozen and counted as dead, writes nothing more.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import JobError, OutputError, first_line
from pipelines.model_files import PIPELINE_FILE, RUN_FILE, file_sha256
from pipelines.storage.locations import (
    commit_json,
    commit_new_json,
    exists,
    filesystem_of,
    is_empty,
    list_names,
    make_folder,
    read_json,
    remove,
    retried,
    shown,
    sync_folder,
)
from pipelines.storage.marks import MARK

FOLDER = "checkpoints"
TRACKING_FILE = "_tracking.json"
"""File in the output folder of a run that is not finished: the id of its run at a tracker."""
CHECKSUMS_FILE = "checksums.json"
START = "start"
"""Key in `_run.json`. The value is the id of the last start."""
STATE_FILE = "training_state.json"
"""File with the state of the run. It is written last in a checkpoint."""
logger = logging.getLogger(__name__)


class Checkpoints:
    """Writes the checkpoints of one run, one at a time, while training continues. Only rank 0 uses it."""

    def __init__(self, output: str, *, keep: int, start: str = "") -> None:
        """Keep the newest `keep` checkpoints under output, a path or URL, while its run is of this start."""
        self._output, self._keep, self._start = output, keep, start
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill a local folder, and copy it to the output in the background.

        First waits for the previous checkpoint, and raises its error.
        """
        self.wait()
        self._last = self._writer.submit(self._save, step, write)

    def wait(self) -> None:
        """Wait until the current checkpoint is written. Raises its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait for the last checkpoint, and stop."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _save(self, step: int, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="pipelines-checkpoint-") as scratch:
            folder = Path(scratch)
            write(folder)
            write_checksums(folder)
            check_start(self._output, self._start)
            publish(folder, posixpath.join(self._output, FOLDER, f"step-{step:09d}"), last=STATE_FILE)
        for old in steps_of(self._output)[: -self._keep]:
            remove_folder(posixpath.join(self._output, FOLDER, f"step-{old:09d}"))


def publish(folder: Path, location: str, *, last: str) -> None:
    """Copy the files of a local folder to a location. The file named `last` is copied after all others."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name == last)
    filesystem, target = filesystem_of(location)
    if isinstance(filesystem, LocalFileSystem):
        sync_folder(folder)
    filesystem.makedirs(target, exist_ok=True)
    folders = {target}
    for file in files:
        there = posixpath.join(target, file.relative_to(folder).as_posix())
        folders.add(posixpath.dirname(there))
        filesystem.makedirs(posixpath.dirname(there), exist_ok=True)
        partial = f"{there}.partial" if isinstance(filesystem, LocalFileSystem) else there
        retried(lambda file=file, partial=partial: filesystem.put_file(str(file), partial))  # type: ignore[misc]
        if file.name == last and isinstance(filesystem, LocalFileSystem):
            for written in folders:  # its content and all other files must be on the disk before its name
                sync_folder(written)
        if partial != there:
            filesystem.mv(partial, there)
    if isinstance(filesystem, LocalFileSystem):
        sync_folder(target)


def steps_of(output: str) -> list[int]:
    """Return the steps of all complete checkpoints, in order."""
    filesystem, folder = filesystem_of(posixpath.join(output, FOLDER))
    filesystem.invalidate_cache()
    try:
        names = retried(lambda: filesystem.ls(folder, detail=False))
    except FileNotFoundError:
        return []
    found = [re.fullmatch(r"step-(\d+)", posixpath.basename(name.rstrip("/"))) for name in names]
    steps = sorted(int(match.group(1)) for match in found if match)
    return [step for step in steps if STATE_FILE in list_names(posixpath.join(output, FOLDER, f"step-{step:09d}"))]


def fetch_newest(output: str, scratch: Path) -> Path | None:
    """Return a local folder with the newest whole checkpoint, or None: the folder itself, or a copy under scratch.

    A checkpoint whose files do not have their checksums is left out, with a warning.

    Raises:
        JobError: There are checkpoints, and all of them are damaged.
    """
    problem = ""
    for step in reversed(steps_of(output)):
        folder = _fetched(posixpath.join(output, FOLDER, f"step-{step:09d}"), scratch / f"checkpoint-{step}")
        problem = _damage(folder)
        if not problem:
            return folder
        logger.warning("the checkpoint of step %d is damaged (%s), and an older one is used", step, problem)
    if problem:
        raise JobError(
            f"all checkpoints in {shown(output)} are damaged (the oldest: {problem}); remove this folder to start from "
            f"the beginning"
        )
    return None


def _fetched(location: str, copy: Path) -> Path:
    filesystem, folder = filesystem_of(location)
    if isinstance(filesystem, LocalFileSystem):
        return Path(folder)
    copy.mkdir()
    for name in list_names(location):
        retried(lambda name=name: filesystem.get_file(posixpath.join(folder, name), str(copy / name)))  # type: ignore[misc]
    return copy


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of the files in a folder, by name, into one more file."""
    found = {file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(found, indent=2))


def _damage(folder: Path) -> str:
    """Return what is wrong with the files of a checkpoint. Empty if they are whole."""
    try:
        expected = json.loads((folder / CHECKSUMS_FILE).read_text())
        if not isinstance(expected, dict) or STATE_FILE not in expected:
            return f"{CHECKSUMS_FILE} is incomplete"
        wrong = [name for name, digest in expected.items() if file_sha256(folder / name) != digest]
    except (OSError, ValueError) as error:
        return first_line(error)
    return f"{wrong[0]} does not have its checksum" if wrong else ""


def remove_all(output: str) -> None:
    """Remove the checkpoints and the other files that only an unfinished run needs."""
    remove_folder(posixpath.join(output, FOLDER))
    filesystem, folder = filesystem_of(output)
    names = list_names(output)
    for name in (TRACKING_FILE, RUN_FILE):
        if name in names:
            filesystem.rm_file(posixpath.join(folder, name))


def remove_folder(location: str) -> None:
    """Remove a folder with its content, if it exists."""
    filesystem, folder = filesystem_of(location)
    if isinstance(filesystem, LocalFileSystem):
        shutil.rmtree(folder, ignore_errors=True)
    elif filesystem.exists(folder):
        filesystem.rm(folder, recursive=True)


def remove_training(output: str) -> None:
    """Remove a finished model or an unfinished run, with all files of its folder.

    Raises:
        OutputError: The folder contains something else.
    """
    if is_empty(output, besides=MARK):
        return
    if not (exists(output, RUN_FILE) or exists(output, PIPELINE_FILE)):
        raise OutputError(
            f"--output {shown(output)} is neither a model folder nor an unfinished run, so --overwrite does not remove "
            f"it; give a new folder"
        )
    logger.info("removing what is in %s", shown(output))
    filesystem, folder = filesystem_of(output)
    paths = [path.rstrip("/") for path in filesystem.ls(folder, detail=False)]
    last = (RUN_FILE, PIPELINE_FILE)  # a removal that is killed can be repeated
    for path in sorted(paths, key=lambda path: posixpath.basename(path) in last):
        if not posixpath.basename(path).startswith(MARK):
            filesystem.rm(path, recursive=True)
    filesystem.invalidate_cache()


def open_training(output: str, identity: Mapping[str, Any], *, start: str = "") -> bool:
    """Begin a run in an empty folder, or resume the unfinished run in it. Return whether a run is resumed.

    Args:
        output: The folder, a path or URL.
        identity: What must be unchanged for a run to be resumed.
        start: Id of this start. Other starts of the run write nothing more.

    Raises:
        OutputError: The folder contains anything else, or a run with another identity. The message names the
            differences.
    """
    make_folder(output)
    has_run, has_model = exists(output, RUN_FILE), exists(output, PIPELINE_FILE)
    if has_run and not has_model:
        before = read_json(output, RUN_FILE)
        changed = {name: value for name, value in identity.items() if before.get(name) != value}
        differences = [f"{name} was {before.get(name)!r} and is {value!r}" for name, value in changed.items()]
        if differences:
            raise OutputError(
                f"--output {shown(output)} contains an unfinished run whose {'; '.join(differences)}; "
                "use those settings to resume it, or give a new folder"
            )
        _write_run(output, identity, start)
        _check_unfinished(output)
        return True
    if has_model and has_run:  # the run was killed after its model was finished
        with suppress(OSError):  # the folder is refused below in any case
            remove_all(output)
    if has_model or not is_empty(output, besides=MARK):
        raise _not_empty(output, has_model=has_model)
    try:
        _write_run(output, identity, start, is_new=True)
    except FileExistsError:  # another training has begun it, or this one did, and the answer was lost
        return open_training(output, identity, start=start)
    _check_unfinished(output)
    return False


def _check_unfinished(output: str) -> None:
    """Look again after `_run.json` was written: another training may have finished since this one looked first."""
    if exists(output, PIPELINE_FILE):
        remove(output, RUN_FILE)
        raise _not_empty(output, has_model=True)


def _not_empty(output: str, *, has_model: bool) -> OutputError:
    remedy = ", or add --overwrite to replace the model" if has_model else ""
    return OutputError(f"--output {shown(output)} is not empty; give a new folder{remedy}")


def _write_run(output: str, identity: Mapping[str, Any], start: str, *, is_new: bool = False) -> None:
    commit = commit_new_json if is_new else commit_json
    try:
        commit(output, RUN_FILE, {**identity, START: start})
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(f"--output {shown(output)} cannot be written: {error}") from error


def is_of_start(output: str, start: str) -> bool:
    """Return whether the unfinished run in a folder was last started under this id. Always, if the id is empty."""
    return not start or (exists(output, RUN_FILE) and read_json(output, RUN_FILE).get(START) == start)


def check_start(output: str, start: str) -> None:
    """Raise JobError if another training has taken over the run in a folder, has finished it, or has replaced it."""
    if not is_of_start(output, start):
        raise JobError(
            f"another training has taken over {shown(output)} while this one did not run for some time; this one ends, "
            f"and changes nothing there"
        )
