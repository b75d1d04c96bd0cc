"""Write the folders of the facades. If the writer is killed, the folder has the old content or the new one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from pipelines.errors import OutputError
from pipelines.model_files import ASIDE, PIPELINE_FILE
from pipelines.simpletransformers.arguments import MODEL_ARGS, ClassificationArgs
from pipelines.storage.locations import sync_folder


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then replace the old folder with it as a whole.

    The replacement takes two renames. If the process is killed between them, there is no folder under the name, and the
    old folder is left as `.NAME.old`. The next call then restores it first.

    Args:
        folder: The folder to replace. All of its content belongs to the facade.
        write: Creates the new folder at the path that it is given.
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
    """Write files to a temporary folder, then move them into a folder that may contain other files.

    An old pipeline.json is removed first, and the new one is moved last. If the process is killed in between, the
    folder does not count as finished, and no file is incomplete.

    Args:
        folder: The folder that receives the files.
        write: Creates a folder with the new files at the path that it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{ASIDE}{uuid.uuid4().hex[:8]}"
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
    """Check that the output folder may be written.

    Raises:
        OutputError: The folder is not empty, and neither overwrite_output_dir nor no_save is set.
    """
    if args.no_save or args.overwrite_output_dir or not os.path.isdir(output) or not os.listdir(output):
        return
    raise OutputError(f"output_dir {output} is not empty; set overwrite_output_dir=True or use another output_dir")
