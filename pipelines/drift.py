"""Have the scores moved? Two histograms per label compared, from summaries or from a model folder's validation.

Knows no torch, no ray; matplotlib only where a plot is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError, SettingsError
from pipelines.locations import list_names, read_json, shown
from pipelines.model_folder import PIPELINE_FILE
from pipelines.outputs import SUMMARY

STABLE, SHIFTED = 0.1, 0.25
"""The usual reading of the population stability index: below the first nothing happened, above the second a lot."""
Histograms = Mapping[str, Sequence[int]]


def drift(before: str, after: str) -> dict[str, Any]:
    """PSI and Kolmogorov-Smirnov distance of each label's score histogram.

    Each side is a scored folder or a model folder with validation histograms. Raises DataError where there are none,
    or where the labels differ.
    """
    left, right = read_histograms(before), read_histograms(after)
    if left.keys() != right.keys():
        raise DataError(
            f"the labels differ: {', '.join(left)} in {shown(before)}, {', '.join(right)} in {shown(after)}"
        )
    return {label: compare(left[label], right[label]) for label in left}


def compare(before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    """PSI, KS and a word for them. Counts get half a row more in every bin, so that an empty one is no infinity."""
    left, right = _shares(before), _shares(after)
    psi = float(((right - left) * np.log(right / left)).sum())
    exact = [np.asarray(counts, float) / max(sum(counts), 1) for counts in (before, after)]
    ks = float(np.abs(np.cumsum(exact[0]) - np.cumsum(exact[1])).max())
    word = "stable" if psi < STABLE else "shifted" if psi < SHIFTED else "moved far"
    return {"psi": psi, "ks": ks, "rows_before": sum(before), "rows_after": sum(after), "reading": word}


def read_histograms(location: str) -> Histograms:
    """Score histograms by label: of _summary.json, or of a model folder's validation data."""
    names = list_names(location)
    for name in (SUMMARY, PIPELINE_FILE):
        if name in names:
            found = read_json(location, name).get("histograms")
            if found:
                return dict(found)
            raise DataError(
                f"{shown(location)}/{name} has no score histograms: a finished scoring run has, and a model folder "
                f"that was trained or tuned with validation data; regression has none"
            )
    raise DataError(f"{shown(location)} is neither a finished scored folder nor a model folder")


def plot(before: str, after: str, file: str) -> None:
    """Both histograms of each label, as shares, into an image file."""
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
        axis.set(
            title=f"{label}: PSI {found['psi']:.3f}, KS {found['ks']:.3f}, {found['reading']}", ylabel="share of rows"
        )
        axis.legend(fontsize="small")
    axes[-1, 0].set_xlabel("score")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _shares(counts: Sequence[int]) -> NDArray[np.float64]:
    smoothed = np.asarray(counts, np.float64) + 0.5
    return np.asarray(smoothed / smoothed.sum())
