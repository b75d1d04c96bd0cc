"""What has changed in the input since a run began, and which changes a job may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.errors import OutputError
from pipelines.storage.locations import shown
from pipelines.storage.shards import InputFile


@dataclass(frozen=True)
class InputChange:
    """How the input differs from the files of a run."""

    new: list[InputFile]
    changed: list[InputFile]
    gone: list[InputFile]


def compare_input(generations: Sequence[Sequence[InputFile]], files: Sequence[InputFile]) -> InputChange:
    """Compare the input files of now with those of all generations of a run."""
    known = {file.url: file for generation in generations for file in generation}  # the last version of each
    here = {file.url: file for file in files}
    return InputChange(
        [file for url, file in here.items() if url not in known],
        [file for url, file in here.items() if url in known and not _same(file, known[url])],
        [file for url, file in known.items() if url not in here],
    )


def check_change(
    location: str, change: InputChange, *, append: bool, replace_changed: bool, is_table: bool = False
) -> None:
    """Raise OutputError for a difference that the settings do not allow. The message names the remedy.

    If the input or the output is a table, files that are gone or changed are always refused: a table rewrites its
    files, and the same rows would be scored twice.
    """
    if is_table and (change.gone or change.changed):
        first = (change.gone or change.changed)[0]
        raise OutputError(
            f"--output {shown(location)} cannot be extended: {first.url} was rewritten or deleted, and the input or "
            f"the output is a table, in which its rows cannot be replaced; give a new folder"
        )
    append = append or replace_changed
    refused = {
        "gone": [] if append else change.gone,
        "changed": [] if replace_changed else change.changed,
        "new": [] if append else change.new,
    }
    problems = [f"{len(files)} input files are {what} ({files[0].url})" for what, files in refused.items() if files]
    if problems:
        remedy = "--append to score new files and to keep the rows of files that are gone"
        if refused["changed"]:
            remedy = "--replace-changed to score new and changed files, and to keep the rows of files that are gone"
        raise OutputError(
            f"--output {shown(location)} was begun with another input: {', '.join(problems)}; give a new folder, "
            f"or {remedy}"
        )


def _same(left: InputFile, right: InputFile) -> bool:
    return (left.size, left.version) == (right.size, right.version)
