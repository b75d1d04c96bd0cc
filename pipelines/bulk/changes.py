"""What has changed in the input since a run began, and which changes a job may take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipelines.errors import OutputError
from pipelines.storage.locations import shown
from pipelines.storage.shards import InputFile, WorkUnits


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
    location: str,
    change: InputChange,
    *,
    append: bool,
    replace_changed: bool,
    from_table: bool = False,
    in_table: bool = False,
) -> None:
    """Raise OutputError for a difference that the settings do not allow. The message names the remedy.

    Args:
        location: The output folder.
        change: The difference.
        append: Whether files may be new, or gone.
        replace_changed: Whether files may be changed, too.
        from_table: Whether the input is a table. It rewrites its files, so the rows of a file that is gone may be in a
            new one: files that are gone or changed are refused.
        in_table: Whether the output is part of a table. Rows cannot be removed from it: changed files are refused.
    """
    refused_always = [*(change.gone if from_table else []), *(change.changed if from_table or in_table else [])]
    if refused_always:
        raise OutputError(
            f"--output {shown(location)} cannot be extended: {refused_always[0].url} was rewritten or deleted, and the "
            f"{'input' if from_table else 'output'} is a table, in which its rows cannot be replaced; give a new folder"
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


def check_gone(
    location: str, gone: Sequence[InputFile], generations: Sequence[WorkUnits], finished: Collection[str]
) -> None:
    """Raise OutputError if files are gone whose rows are not all scored: no start of the job could finish the run."""
    if not gone:
        return
    names = {file.url for file in gone}
    for units in generations:
        for unit in units:
            lost = next((span.file.url for span in unit.spans if span.file.url in names), None)
            if lost is not None and unit.output_name not in finished:
                raise OutputError(
                    f"--output {shown(location)} cannot be finished: {lost} is gone, and not all of its rows were "
                    f"scored; put it back, or give a new folder"
                )


def _same(left: InputFile, right: InputFile) -> bool:
    return (left.size, left.version) == (right.size, right.version)
