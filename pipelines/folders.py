"""Folders that the facades write: the old content or the new, whenever the writer is killed. Knows no torch, no ray."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from pipelines.arguments import ClassificationArgs
from pipelines.errors import OutputError
from pipelines.locations import sync_folder
from pipelines.model_folder import PIPELINE_FILE

MODEL_ARGS = "model_args.json"


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have a folder of our own written under another name, then put it into its place as a whole.

    Between two renames there is none under its name; who is killed just then leaves the old one as `.NAME.old`, and
    the next call begins by putting it back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (folder.parent / f".{folder.name}.{name}" for name in ("partial", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for path in (aside, old):
        shutil.rmtree(path, ignore_errors=True)
    write(aside)
    sync_folder(aside)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Have files written aside and moved into a folder that may hold others; pipeline.json comes last, and goes first.

    So a folder in which the writer was killed is not taken for a finished one, and no file is half there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".saving-{uuid.uuid4().hex[:8]}"
    try:
        write(aside)
        sync_folder(aside)
        for name in (PIPELINE_FILE, MODEL_ARGS):
            (folder / name).unlink(missing_ok=True)
        last = (MODEL_ARGS, PIPELINE_FILE)
        for file in sorted(aside.iterdir(), key=lambda file: last.index(file.name) if file.name in last else -1):
            os.replace(file, folder / file.name)
        sync_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_output(output: str, args: ClassificationArgs) -> None:
    """Raise OutputError for a folder that is in use, unless it may be written over."""
    if args.no_save or args.overwrite_output_dir or not os.path.isdir(output) or not os.listdir(output):
        return
    raise OutputError(f"output_dir {output} is not empty; set overwrite_output_dir=True, or another output_dir")
