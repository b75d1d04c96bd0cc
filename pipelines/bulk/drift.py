"""Compare the score histograms of two scored folders, or of a scored folder and a model folder's validation data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.bulk.run_folder import SUMMARY, read_scored_metadata
from pipelines.decisions.columns import EARLY_EXIT_METADATA, WEIGHTS_METADATA
from pipelines.errors import DataError, SettingsError
from pipelines.model_files import PIPELINE_FILE
from pipelines.storage.listing import list_files
from pipelines.storage.locations import filesystem_of, list_names, read_json, shown

STABLE, SHIFTED = 0.1, 0.25
"""Usual limits of the population stability index: stable below the first, and moved far from the second on."""
logger = logging.getLogger(__name__)
Histograms = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LabelDrift:
    """How far the scores of one label have moved."""

    psi: float
    """Population stability index."""
    ks: float
    """Kolmogorov-Smirnov distance: the largest difference of the two cumulative shares."""
    rows_before: int
    rows_after: int
    reading: str
    """stable, shifted or moved far."""


def drift(before: str, after: str) -> dict[str, LabelDrift]:
    """Drift of each label's score histogram from `before` to `after`.

    Args:
        before: A scored folder, or a model folder with validation histograms.
        after: Also a scored folder or a model folder.

    Raises:
        DataError: A folder has no histograms, or the labels differ, or only one of them was read until its labels were
            sure.
    """
    (left_read, left_model), (right_read, right_model) = origin_of(before), origin_of(after)
    if left_read != right_read:
        raise DataError(
            f"{shown(before)} has the scores of early_exit={left_read}, and {shown(after)} those of "
            f"early_exit={right_read}: scores of windows that were read cannot be compared with others. Score both in "
            "the same way"
        )
    if left_model and right_model and left_model != right_model:
        logger.warning(
            "%s and %s have the scores of different models: what moved can be the model, and not the texts",
            shown(before), shown(after),
        )  # fmt: skip
    left, right = read_histograms(before), read_histograms(after)
    if left.keys() != right.keys():
        raise DataError(
            f"the labels differ: {', '.join(left)} in {shown(before)}, {', '.join(right)} in {shown(after)}"
        )
    for location, histograms in ((before, left), (after, right)):
        if not any(sum(counts) for counts in histograms.values()):
            raise DataError(f"{shown(location)} has no scored rows to compare")
    return {label: compare(left[label], right[label]) for label in left}


def compare(before: Sequence[int], after: Sequence[int]) -> LabelDrift:
    """Drift between two histograms of the same bins.

    For the PSI, half a row is added to every bin. Otherwise, an empty bin would make it infinite.
    """
    left, right = _shares(before), _shares(after)
    psi = float(((right - left) * np.log(right / left)).sum())
    exact = [np.asarray(counts, float) / max(sum(counts), 1) for counts in (before, after)]
    ks = float(np.abs(np.cumsum(exact[0]) - np.cumsum(exact[1])).max())
    reading = "stable" if psi < STABLE else "shifted" if psi < SHIFTED else "moved far"
    return LabelDrift(psi, ks, sum(before), sum(after), reading)


def read_histograms(location: str) -> Histograms:
    """Return the score histograms by label, from _summary.json or from a model folder's pipeline.json."""
    names = list_names(location)
    for name in (SUMMARY, PIPELINE_FILE):
        if name in names:
            found = read_json(location, name).get("histograms")
            if found:
                return dict(found)
            raise DataError(
                f"{shown(location)}/{name} has no score histograms: only a finished scoring run has them, or a model "
                f"folder that was trained or tuned with validation data; regression has none"
            )
    raise DataError(f"{shown(location)} is neither a finished scored folder nor a model folder")


def origin_of(location: str) -> tuple[str, str]:
    """Return how the texts of a scored folder or a model folder were read, and the hash of the weights.

    Returns:
        off, exact or certified with its margin; and the hash, empty if it is unknown.
    """
    names = list_names(location)
    if SUMMARY not in names:
        return "off", read_json(location, PIPELINE_FILE).get("weights_hash", "") if PIPELINE_FILE in names else ""
    filesystem, _ = filesystem_of(location)
    try:
        first = list_files(location, also_in_tables=True)[0]
    except DataError:  # a summary may be kept without its files
        return "off", ""
    metadata = read_scored_metadata(filesystem, first)
    return metadata.get(EARLY_EXIT_METADATA, b"off").decode(), metadata.get(WEIGHTS_METADATA, b"").decode()


def plot(before: str, after: str, file: str) -> None:
    """Draw both histograms of each label, as shares of rows, into an image file."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise SettingsError("--plot needs matplotlib: pip install 'ray-text-classification[plot]'") from error
    left, right = read_histograms(before), read_histograms(after)
    figure, axes = pyplot.subplots(len(left), 1, figsize=(8, 2.5 * len(left)), squeeze=False, layout="constrained")
    for axis, label in zip(axes[:, 0], left, strict=True):
        bins = np.linspace(0, 1, len(left[label]) + 1)
        for counts, name, style in ((left[label], before, "-"), (right[label], after, "--")):
            axis.stairs(
                np.asarray(counts) / max(sum(counts), 1), bins, label=f"{shown(name)} ({sum(counts):,})", ls=style
            )
        found = compare(left[label], right[label])
        axis.set(title=f"{label}: PSI {found.psi:.3f}, KS {found.ks:.3f}, {found.reading}", ylabel="share of rows")
        axis.legend(fontsize="small")
    axes[-1, 0].set_xlabel("score")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _shares(counts: Sequence[int]) -> NDArray[np.float64]:
    smoothed = np.asarray(counts, np.float64) + 0.5
    return np.asarray(smoothed / smoothed.sum())
