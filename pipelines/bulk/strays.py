"""Files in the output folder of a scoring job that do not belong to its run: remove them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

from pipelines.bulk.manifest import read_listing, read_manifest
from pipelines.bulk.run_folder import SUMMARY, Run, units_of
from pipelines.errors import PipelinesError
from pipelines.storage.locations import exists, list_names, remove, shown
from pipelines.storage.marks import others_of
from pipelines.storage.shards import OUTPUT_NAME

logger = logging.getLogger(__name__)


def remove_strays(run: Run, names: Collection[str]) -> None:
    """Remove the files of units that are not in the run: a job that was thought dead wrote them.

    Args:
        run: The run.
        names: Names of files. They were listed before it was found out that the run is still the same.
    """
    strays = strays_of(run, names)
    if strays:
        logger.warning("%d files of an earlier run in %s are removed", len(strays), shown(run.location))
    for name in strays:
        remove(run.location, name)


def strays_of(run: Run, names: Collection[str]) -> list[str]:
    """Return the names of files of units that are not in the run."""
    own = {unit.output_name for units in run.generations for unit in units}
    return sorted(name for name in names if OUTPUT_NAME.fullmatch(name) and name not in own)


def leave(run: Run) -> None:
    """After another job has replaced or changed the run: remove the files that do not belong to what is there now.

    While the other job still works, the old rows of changed files are there on purpose, and it removes them at its end.
    """
    with suppress(OSError, PipelinesError):  # the job ends with an error in any case
        names = list_names(run.location)
        manifest = read_manifest(run.location)
        if manifest == run.manifest or not exists(run.location, SUMMARY):
            return
        generations = [read_listing(run.location, generation.listing) for generation in manifest.generations]
        remove_strays(replace(run, manifest=manifest, generations=units_of(manifest, generations)), names)


def sweep(location: str, mark: str) -> None:
    """Remove incomplete files and marks of killed jobs. Does nothing while another job uses the folder."""
    names = list_names(location)  # before the look at others: what a job brings that begins now stays
    if not others_of(location, mark):
        for name in names:
            if name.startswith((".part-", "._", "_running-")) and name != mark:
                remove(location, name)
