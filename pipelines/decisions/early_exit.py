"""Read a long text only until its label is sure: which windows are scored next, and when a document is done.

`exact` stops when the windows that are left cannot change the label. `certified` also stops when the windows read are
far enough from a change, by a margin that `fit_margin` has fitted on documents ("learn then test", Angelopoulos et al.
2021, with fixed-sequence testing of exact binomial bounds).

A document's result depends only on its own windows: it is that of the first windows, in order, after which it could
stop. So bulk jobs and servers, which score windows in rounds of other sizes, find the same.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.calibration import WindowLogits
from pipelines.decisions.labels import activate, decide, merged_scores, thresholds_by_label
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.fields import check_range, check_types, parse
from pipelines.model_files import PIPELINE_FILE
from pipelines.model_folder import ModelFolder
from pipelines.settings import Calibration, DecisionSettings, EarlyExit
from pipelines.text.windows import count_votes

Order = Literal["front", "spread"]
WAYS: tuple[tuple[Order, int], ...] = (("front", 2), ("front", 1), ("spread", 2), ("spread", 1))
"""Ways to read that are tried: the order, and the windows before the first look."""
SAFE = 1e-6
"""How much a score must be beyond a threshold to be sure: more than what float32 rounds."""
MARGINS = np.round(np.concatenate([np.arange(1.0, 0.5, -0.05), np.arange(0.5, 0.0, -0.01)]), 2)
"""Margins that are tested, from the safest on."""
FEWEST_SHARE, FEWEST_CONFIDENCE = 0.5, 0.5


@dataclass(frozen=True)
class Margin:
    """A fitted rule to stop, and what is promised of it."""

    margin: float
    """The running score must be this far from where the label would change."""
    order: Order
    """front: windows are read as they come. spread: first, last, middle, and so on."""
    first: int
    """Windows before the first look. Each later look is after twice as many."""
    share: float
    """Share of documents that get the label of a full read, at least."""
    confidence: float
    """Probability of that, over the draw of the documents on which the margin was fitted."""
    documents: int
    """Documents on which it was fitted."""
    changed: int
    """Documents, of these, whose label differed."""
    windows: int
    """Windows of these documents."""
    windows_read: int
    """Windows, of these, that were read."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "margin", self.margin, above=0)
        check_range(self, "first", self.first, low=1)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `early_exit` in pipeline.json."""
        return asdict(self)

    @property
    def in_words(self) -> str:
        """What is promised, in a sentence."""
        read = self.windows_read / max(self.windows, 1)
        return (
            f"{self.share:.2%} of documents get the label of a full read, with confidence {self.confidence:g}: "
            f"{self.changed} of {self.documents:,} differed, and {read:.0%} of their windows were read"
        )


def check_early_exit(mode: EarlyExit, decision: DecisionSettings, fitted: Margin | None) -> None:
    """Raise SettingsError if documents of this kind cannot stop early, or if certified has no margin."""
    if mode == "off":
        return
    if decision.kind == "regression":
        raise SettingsError(f"early_exit={mode} is for labels, and kind regression has none; leave it off")
    if mode == "certified" and fitted is None:
        raise SettingsError(
            "early_exit=certified needs a margin, fitted for these thresholds: pipelines tune MODEL --data VALID "
            "--early-exit 0.99; or use early_exit=exact"
        )


def margin_of(folder: ModelFolder, decision: DecisionSettings, early_exit: EarlyExit) -> Margin | None:
    """Return the margin of a model folder.

    Raises:
        SettingsError: Early exit does not fit the kind; or it is certified, and there is no margin for this decision.
        ModelFolderError: The margin in the folder cannot be read.
    """
    if early_exit == "off":
        return None
    fitted = None
    if folder.early_exit and decision == folder.decision:
        try:
            (fitted,) = parse(folder.early_exit, Margin)
        except SettingsError as error:
            raise ModelFolderError(
                f"{folder.path}/{PIPELINE_FILE}: early_exit cannot be read ({error}); fit it again: pipelines tune "
                "--early-exit"
            ) from error
    check_early_exit(early_exit, decision, fitted)
    return fitted


class Reading:
    """Documents that are being read: which windows are next, and which documents are done.

    Call `next_windows`, score these windows, and `add` their logits, until there are no more.
    """

    def __init__(
        self,
        offsets: NDArray[np.int64],
        decision: DecisionSettings,
        calibration: Calibration,
        fitted: Margin | None = None,
    ) -> None:
        """Begin to read. Document d owns the windows from offsets[d] on. Without a margin, only `exact` stops."""
        self._offsets, self._decision, self._calibration, self._fitted = offsets, decision, calibration, fitted
        self._num_D = np.diff(offsets)
        num_documents, num_labels = len(self._num_D), decision.num_labels
        self._place_W = _places(self._num_D, "front" if fitted is None else fitted.order)
        self._sums_DL = np.zeros((num_documents, num_labels))
        self._peaks_DL = np.zeros((num_documents, num_labels))
        self._votes_DL = np.zeros((num_documents, num_labels), np.int64)
        self.read_D = np.zeros(num_documents, np.int64)
        """Windows of each document that count."""
        self._is_done_D = self._num_D == 0
        self._asked_D = np.zeros(num_documents, np.int64)

    def next_windows(self) -> NDArray[np.int64]:
        """Return the windows to score next, as indices of all windows. Empty when every document is done."""
        left_D = np.where(self._is_done_D, 0, self._num_D - self._asked_D)
        more_D = np.minimum(self._needed(), left_D)
        document_R = np.repeat(np.arange(len(more_D)), more_D)
        rank_R = np.arange(len(document_R)) - np.repeat(np.cumsum(more_D) - more_D, more_D)
        place_R = self._place_W[self._offsets[document_R] + self._asked_D[document_R] + rank_R]
        self._asked_D += more_D
        return np.asarray(self._offsets[document_R] + place_R, np.int64)

    def add(self, index_W: NDArray[np.int64], logits_WL: NDArray[np.float32]) -> None:
        """Take the logits of the windows that `next_windows` returned, in its order. Stops documents that are sure.

        A document with logits that are not finite stops too: it gets an error instead of a label.
        """
        is_broken_W = np.asarray(~np.isfinite(logits_WL).all(axis=1))
        logits_WL = np.where(is_broken_W[:, None], np.float32(0), logits_WL)
        scores_WL = activate(logits_WL, self._decision.kind, self._calibration)
        document_W = np.searchsorted(self._offsets, index_W, side="right") - 1
        starts = np.flatnonzero(np.append(True, document_W[1:] != document_W[:-1])) if len(document_W) else document_W
        counts = np.diff(np.append(starts, len(document_W)))
        for rank in range(int(counts.max(initial=0))):
            rows = starts[counts > rank] + rank
            rows = rows[~self._is_done_D[document_W[rows]]]
            self._count(document_W[rows], scores_WL[rows], logits_WL[rows])
            self._is_done_D[document_W[rows[is_broken_W[rows]]]] = True

    @property
    def counts_W(self) -> NDArray[np.bool_]:
        """Whether each window counts for its document's result."""
        document_W = np.repeat(np.arange(len(self._num_D)), self._num_D)
        rank_W = np.arange(len(document_W)) - self._offsets[document_W]
        counts_W = np.zeros(len(document_W), bool)
        counts_W[self._offsets[document_W] + self._place_W] = rank_W < self.read_D[document_W]
        return counts_W

    def _count(
        self, document_R: NDArray[np.int64], scores_RL: NDArray[np.float32], logits_RL: NDArray[np.float32]
    ) -> None:
        """Count one more window of each of some documents, and stop those that are sure."""
        self._sums_DL[document_R] += scores_RL
        self._peaks_DL[document_R] = np.maximum(self._peaks_DL[document_R], scores_RL)
        self._votes_DL[document_R, logits_RL.argmax(axis=1)] += 1
        self.read_D[document_R] += 1
        is_sure_R = self._is_sure(document_R)
        if self._fitted is not None:
            is_far_R = self._lead(document_R) >= self._fitted.margin
            is_sure_R = (is_sure_R | is_far_R) & _is_look(self.read_D[document_R], self._fitted.first)
        is_read_R = self.read_D[document_R] == self._num_D[document_R]
        self._is_done_D[document_R] |= is_sure_R | is_read_R

    def _needed(self) -> NDArray[np.int64]:
        """Return how many more windows each document needs before it can stop, or a few more."""
        if self._fitted is not None:
            return np.where(self._asked_D == 0, self._fitted.first, self._asked_D)  # twice as many at each look
        left_D = self._num_D - self._asked_D
        labels = thresholds_by_label(self._decision)
        if self._decision.merge == "max":
            fewest_D = np.ones(len(left_D))
        elif labels:
            limits_DL = np.array([*labels.values()]) * self._num_D[:, None]
            sums_DL = self._sums_DL[:, -len(labels) :]
            to_assign_DL, to_leave_DL = limits_DL - sums_DL, sums_DL + left_D[:, None] - limits_DL
            fewest_D = np.minimum(to_assign_DL, to_leave_DL).max(axis=1)
        else:
            counted_DL = self._votes_DL if self._decision.merge == "vote" else self._sums_DL
            fewest_D = (left_D - _gap(counted_DL)) / 2
        return np.maximum(np.maximum(np.floor(fewest_D), self._asked_D // 4), 1).astype(np.int64)

    def _is_sure(self, document_R: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether the windows that are left cannot change the label or labels of some documents."""
        decision = self._decision
        sums_RL, num_R = self._sums_DL[document_R], self._num_D[document_R][:, None]
        left_R = num_R - self.read_D[document_R][:, None]
        if decision.merge == "max":
            low_RL, high_RL = self._peaks_DL[document_R], np.where(left_R > 0, 1.0, self._peaks_DL[document_R])
        else:
            low_RL, high_RL = sums_RL / num_R, (sums_RL + left_R) / num_R
        limits = np.array([*thresholds_by_label(decision).values()])
        if len(limits):
            low_RL, high_RL = low_RL[:, -len(limits) :], high_RL[:, -len(limits) :]
            is_sure_R = np.asarray(((low_RL >= limits + SAFE) | (high_RL < limits - SAFE)).all(axis=1), bool)
        else:
            is_sure_R = self._leader_stays(document_R, low_RL, high_RL, left_R[:, 0])
        return is_sure_R if decision.abstain_below is None else _with_abstention(is_sure_R, low_RL, high_RL, decision)

    def _leader_stays(
        self,
        document_R: NDArray[np.int64],
        low_RL: NDArray[np.float64],
        high_RL: NDArray[np.float64],
        left_R: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Return whether the label with the highest score, or with the most votes, cannot be overtaken."""
        if self._decision.merge != "vote":
            leader_R = low_RL.argmax(axis=1)
            rows = np.arange(len(leader_R))
            others_RL = high_RL.copy()
            others_RL[rows, leader_R] = -np.inf
            return np.asarray(low_RL[rows, leader_R] > others_RL.max(axis=1) + SAFE)
        votes_RL = self._votes_DL[document_R]
        gap_R = _gap(votes_RL)
        is_tie_winner_R = votes_RL.argmax(axis=1) == self._decision.tie_value  # a tie at the end is won, too
        return np.asarray((gap_R > left_R) | (is_tie_winner_R & (gap_R >= left_R) & (gap_R > 0)))

    def _lead(self, document_R: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how far the running scores of some documents are from where their label or labels change."""
        decision, read_R = self._decision, self.read_D[document_R][:, None]
        scores_RL = self._peaks_DL[document_R] if decision.merge == "max" else self._sums_DL[document_R] / read_R
        limits = np.array([*thresholds_by_label(decision).values()])
        if len(limits):
            lead_R = np.abs(scores_RL[:, -len(limits) :] - limits).min(axis=1)
        elif decision.merge == "vote":
            lead_R = _gap(self._votes_DL[document_R]) / read_R[:, 0]
        else:
            lead_R = _gap(scores_RL)
        if decision.abstain_below is None:
            return np.asarray(lead_R)
        best_R = scores_RL.max(axis=1)
        to_abstention_R = np.abs(best_R - decision.abstain_below)
        with_label_R = np.minimum(lead_R, to_abstention_R)
        return np.asarray(np.where(best_R < decision.abstain_below, to_abstention_R, with_label_R))


def check_promise(share: float, confidence: float) -> None:
    """Raise SettingsError unless a share of documents can be promised with this confidence."""
    if not FEWEST_SHARE <= share < 1 or not FEWEST_CONFIDENCE <= confidence < 1:
        raise SettingsError(
            f"early exit for a share of {share:g} with confidence {confidence:g}: both must be at least 0.5 and below "
            "1, such as 0.99 and 0.95"
        )


def check_fit(decision: DecisionSettings, num_documents: int, *, share: float, confidence: float) -> None:
    """Check that a margin can be fitted on this many documents.

    Raises:
        DataError: They are too few.
        SettingsError: The kind has no labels, or a number is out of range.
    """
    check_early_exit("exact", decision, None)
    check_promise(share, confidence)
    if num_documents < _fewest(share, 1 - confidence):
        raise DataError(
            f"{num_documents:,} documents are too few to promise a share of {share:g} with confidence {confidence:g}: "
            f"at least {_fewest(share, 1 - confidence):,} are needed"
        )


def fit_margin(
    found: WindowLogits, decision: DecisionSettings, calibration: Calibration, *, share: float, confidence: float
) -> Margin:
    """Fit the smallest margin such that at least `share` of documents get the label of a full read.

    Each of `WAYS` is tested from the safest margin on, until one fails, and has an equal part of the error probability.
    With few documents, only the first ones are tested. The one that reads the fewest windows is taken.

    Args:
        found: Logits of all windows of documents. Their targets are not used.
        decision: Decision settings for which the margin is fitted.
        calibration: Calibration of the scores.
        share: Share of new documents that must get the label of a full read.
        confidence: Probability of that, over the draw of the documents.

    Raises:
        DataError: There are too few documents, or no margin keeps the promise.
        SettingsError: The kind has no labels, or a number is out of range.
    """
    num_documents = len(found.offsets) - 1
    check_fit(decision, num_documents, share=share, confidence=confidence)
    possible = [num for num in range(1, len(WAYS) + 1) if num_documents >= _fewest(share, (1 - confidence) / num)]
    ways = WAYS[: possible[-1]]
    num_windows = int(found.offsets[-1])
    plain = Margin(1.0, "front", 1, share, confidence, num_documents, 0, num_windows, num_windows)
    fitted = [
        _smallest(found, decision, calibration, replace(plain, order=order, first=first), (1 - confidence) / len(ways))
        for order, first in ways
    ]
    best = min((one for one in fitted if one is not None), key=lambda one: one.windows_read, default=None)
    if best is None:
        raise DataError(
            f"no margin keeps the label of a share of {share:g} with confidence {confidence:g}; use early_exit=exact, "
            "or more documents"
        )
    return best


def _smallest(
    found: WindowLogits, decision: DecisionSettings, calibration: Calibration, plain: Margin, error: float
) -> Margin | None:
    """Return the last margin before the first one whose test fails, or None if the first one fails."""
    from scipy.stats import binom  # the import takes a second

    full = _labels(found, decision, calibration)
    best = None
    for margin in MARGINS:
        one = replace(plain, margin=float(margin))
        labels, read_D = replayed(found, decision, calibration, one)
        changed = int((labels != full).any(axis=1).sum())
        if binom.cdf(changed, plain.documents, 1 - plain.share) > error:
            break
        best = replace(one, changed=changed, windows_read=int(read_D.sum()))
    return best


def replayed(
    found: WindowLogits, decision: DecisionSettings, calibration: Calibration, fitted: Margin | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read documents whose logits are known until they stop. Return their labels (D, 1 or L) and windows read (D,)."""
    reading = Reading(found.offsets, decision, calibration, fitted)
    while len(index_W := reading.next_windows()):
        reading.add(index_W, found.logits_WL[index_W])
    offsets = np.concatenate([[0], np.cumsum(reading.read_D)])
    read = WindowLogits(found.logits_WL[reading.counts_W], offsets, found.targets)
    return _labels(read, decision, calibration), reading.read_D


def _labels(found: WindowLogits, decision: DecisionSettings, calibration: Calibration) -> NDArray[np.int64]:
    """Return the label of each document (D, 1), or whether it has each label (D, L)."""
    scores_DL, _ = merged_scores(found.logits_WL, found.offsets, decision, calibration)
    decided = decide(scores_DL, decision, count_votes(found.logits_WL, found.offsets))
    if decided.positive_DL is not None:
        return decided.positive_DL.astype(np.int64)
    assert decided.label_D is not None
    return decided.label_D[:, None]


def _fewest(share: float, error: float) -> int:
    """Return the fewest documents that can show the share, if none of them differs."""
    return math.ceil(math.log(error) / math.log(share))


def _places(num_D: NDArray[np.int64], order: Order) -> NDArray[np.int64]:
    """Return for each window, in the order of reading, its place in its document (W,)."""
    if order == "front":
        total = int(num_D.sum())
        return np.arange(total) - np.repeat(np.cumsum(num_D) - num_D, num_D)
    return np.concatenate([_spread(int(num)) for num in num_D] or [np.zeros(0, np.int64)])


@lru_cache(10_000)
def _spread(num: int) -> NDArray[np.int64]:
    """Return the places 0 to num - 1: the first, the last, then the middle of the widest gap, from the left."""
    step, found = 1.0, [0, num - 1]
    while step * num > 1:
        found += [round(start * (num - 1)) for start in np.arange(step / 2, 1, step)]
        step /= 2
    return np.array(list(dict.fromkeys([*found, *range(num)])), np.int64)[:num]


def _gap(values_RL: NDArray[Any]) -> NDArray[Any]:
    """Return by how much the highest value of each row exceeds the second."""
    ranked_RL = np.sort(values_RL, axis=1)
    return np.asarray(ranked_RL[:, -1] - ranked_RL[:, -2])


def _with_abstention(
    is_sure_R: NDArray[np.bool_], low_RL: NDArray[np.float64], high_RL: NDArray[np.float64], decision: DecisionSettings
) -> NDArray[np.bool_]:
    """Return whether the label is sure, or that there is none."""
    assert decision.abstain_below is not None
    has_label_R = low_RL.max(axis=1) >= decision.abstain_below + SAFE
    has_none_R = high_RL.max(axis=1) < decision.abstain_below - SAFE
    return np.asarray((is_sure_R & has_label_R) | has_none_R)


def _is_look(read_R: NDArray[np.int64], first: int) -> NDArray[np.bool_]:
    """Return whether documents may stop after this many windows: first, 2 * first, 4 * first, and so on."""
    times_R, rest_R = read_R // first, read_R % first
    return np.asarray((rest_R == 0) & (times_R & (times_R - 1) == 0))
