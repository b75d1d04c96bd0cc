"""Thresholds that keep a promise on new documents: a precision or a recall that holds with a given confidence.

The plain optimum (`metrics.tune_thresholds`) reaches its precision on the documents it was tuned on; on new ones it
misses it in about half of the cases. Here a threshold is taken only if an exact binomial test rejects that it is too
bad. Thresholds are tested in a fixed order, and the first that fails ends the order, so that the tests together are
wrong in at most 1 - confidence of the cases (fixed-sequence testing, as in "learn then test", Angelopoulos et al. 2021,
arXiv:2110.01052).

The promise holds for documents that are drawn as the valid ones were.

Shapes: D documents, L labels, G thresholds of the grid.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.labels import resolve_thresholds
from pipelines.decisions.metrics import parse_objective, with_thresholds
from pipelines.errors import SettingsError
from pipelines.settings import NEVER, DecisionSettings

GRID_G: NDArray[np.float32] = (1 / (1 + np.exp(-np.linspace(-9, 12, 421)))).astype(np.float32)
"""Thresholds that are tested: steps of 0.05 in the logit. They are fixed before the data is seen."""
ORDERS = (1, 3)
"""Precision: each order begins at the first threshold with this many times the fewest documents of a test. The first
finds thresholds of labels with few documents, the second survives some errors among the highest scores."""

MOST_GROWTH = 1000
"""How many times as many documents are considered, to say how many are needed."""
FEWEST_COUNTED = 10
"""Documents at a threshold from which its precision or recall is taken as a hint of how many are needed."""


@dataclass(frozen=True)
class LabelGuarantee:
    """The promise for one label."""

    threshold: float
    """Threshold of the label: 0 if no threshold has the recall, NEVER if none has the precision."""
    holds: bool
    """Whether a threshold was found. A label without one is never assigned (precision), or always (recall)."""
    bound: float | None
    """Lower bound of the precision or recall at the threshold, with the label's confidence."""
    documents: int
    """Valid documents that the bound is computed from: the assigned ones (precision), or the positives (recall)."""
    right: int
    """Of these, the assigned positives."""
    positives: int
    """Positives among the valid documents."""
    needed: int | None
    """If no threshold was found: about how many positives would do, if they are like the valid ones. None if more of
    them do not help, because no threshold has the precision or recall on the valid documents themselves."""

    @property
    def shortage(self) -> str:
        """Why no threshold was found, in words."""
        if self.needed is None:
            return "none has it on these documents themselves, so ask for less"
        return f"{self.positives} positives are too few, about {self.needed} like these would do"


@dataclass(frozen=True)
class Guarantees:
    """The promises for the labels of a decision."""

    objective: str
    confidence: float
    joint: bool
    """Whether the confidence is that of all labels together, or of each label alone."""
    rows: int
    """Number of valid documents."""
    labels: dict[str, LabelGuarantee]

    def applied_to(self, decision: DecisionSettings) -> DecisionSettings:
        """Return the decision with these thresholds."""
        return resolve_thresholds(self.thresholds, decision)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the labels."""
        return tuple(one.threshold for one in self.labels.values())

    @property
    def missed(self) -> tuple[str, ...]:
        """Labels without a promise."""
        return tuple(label for label, one in self.labels.items() if not one.holds)

    def to_json(self) -> dict[str, Any]:
        """Return the content of pipeline.json's field `guarantees`."""
        return asdict(self)

    def remarks(self, objective: str) -> list[str]:
        """Return the warnings about labels without a promise, one line each."""
        fate = "never" if objective.startswith("precision") else "always"
        return [
            f"no threshold of {label!r} has {objective} with confidence {self.confidence:g}: {one.shortage}; until "
            f"then the label is {fate} assigned"
            for label, one in self.labels.items()
            if not one.holds
        ]


def guarantee_thresholds(
    targets: NDArray[np.generic],
    scores_DL: NDArray[np.float32],
    decision: DecisionSettings,
    *,
    objective: str,
    confidence: float,
    joint: bool = False,
) -> Guarantees:
    """Find the threshold of each label that has a precision or recall on new documents.

    Precision: of the thresholds that pass, the lowest, which has the highest recall. Recall: the highest.

    Args:
        targets: Targets from `labels.encode_labels`.
        scores_DL: Document scores.
        decision: Decision settings.
        objective: precision=P or recall=R.
        confidence: Probability, over the draw of the valid documents, that a label's promise holds.
        joint: Whether the confidence is that all promises hold at once (Bonferroni).

    Raises:
        SettingsError: The kind has no thresholds, or objective and confidence do not fit.
    """
    name, share = check_confidence(objective, confidence)
    labels, targets, scores_DL = with_thresholds(targets, scores_DL, decision)
    risk = (1 - confidence) / (len(labels) if joint else 1)
    find = _precision_threshold if name == "precision" else _recall_threshold
    found = {
        label: find(targets[:, column] == 1, scores_DL[:, column], share, risk) for column, label in enumerate(labels)
    }
    return Guarantees(objective, confidence, joint, len(scores_DL), found)


def check_confidence(objective: str, confidence: float | None) -> tuple[str, float]:
    """Return name and number of an objective.

    Raises:
        SettingsError: It is unknown, or nothing can be promised of it.
    """
    name, share = parse_objective(objective)
    if confidence is None:
        return name, share
    if name not in ("precision", "recall") or not 0 < share < 1:
        raise SettingsError(
            f"confidence is for objective precision=P or recall=R with a share between 0 and 1, and not for {objective}"
        )
    if not 0.5 <= confidence < 1:
        raise SettingsError(f"confidence is {confidence:g} and must be at least 0.5 and below 1, such as 0.95")
    return name, share


def fewest_documents(share: float, risk: float) -> int:
    """Return how many documents, all of them right, show that more than a share of all are right."""
    return math.ceil(math.log(risk) / math.log(share))


def _precision_threshold(
    positive_D: NDArray[np.bool_], score_D: NDArray[np.float32], share: float, risk: float
) -> LabelGuarantee:
    chosen_G, right_G = _counts(positive_D, score_D)
    order_risk = risk / len(ORDERS)
    needed = fewest_documents(share, order_risk)
    passes_G = _p_values(right_G, chosen_G, share) <= order_risk
    positives = int(positive_D.sum())
    ends = []
    for factor in ORDERS:
        begin = int((chosen_G >= factor * needed).sum()) - 1  # the highest threshold that so many documents reach
        num_passed = _num_passed(passes_G[: begin + 1][::-1])
        ends += [begin - num_passed + 1] if num_passed else []
    if not ends:
        return LabelGuarantee(
            NEVER, False, None, 0, 0, positives, _needed(right_G, chosen_G, share, order_risk, positives=positives)
        )
    place = min(ends)
    right, chosen = int(right_G[place]), int(chosen_G[place])
    bound = _lower_bound(right, chosen, order_risk)
    return LabelGuarantee(float(GRID_G[place]), True, bound, chosen, right, positives, None)


def _recall_threshold(
    positive_D: NDArray[np.bool_], score_D: NDArray[np.float32], share: float, risk: float
) -> LabelGuarantee:
    _, right_G = _counts(positive_D, score_D)
    positives = int(positive_D.sum())
    of_G = np.full(len(GRID_G), positives)
    passes_G = _p_values(right_G, of_G, share) <= risk
    place = _num_passed(passes_G) - 1
    if place < 0:
        needed = _needed(right_G, of_G, share, risk, positives=positives)
        return LabelGuarantee(0.0, False, None, positives, positives, positives, needed)
    right = int(right_G[place])
    bound = _lower_bound(right, positives, risk)
    return LabelGuarantee(float(GRID_G[place]), True, bound, positives, right, positives, None)


def _needed(
    right_G: NDArray[np.int64], of_G: NDArray[np.int64], share: float, risk: float, *, positives: int
) -> int | None:
    """Return with how many positives a test would succeed, if all counts grew alike. None if it never would."""
    fewest = fewest_documents(share, risk)
    if positives < FEWEST_COUNTED:
        return fewest
    is_counted_G = of_G >= FEWEST_COUNTED
    right_G, of_G = right_G[is_counted_G], of_G[is_counted_G]
    for factor in np.geomspace(1, MOST_GROWTH, 60):
        counts = np.rint(right_G * factor).astype(np.int64), np.rint(of_G * factor).astype(np.int64)
        if (_p_values(*counts, share) <= risk).any():
            return max(math.ceil(positives * float(factor)), fewest)
    return None


def _num_passed(passes: NDArray[np.bool_]) -> int:
    """Return how many tests pass before the first that fails."""
    return int(np.argmin(passes)) if not passes.all() else len(passes)


def _counts(positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each threshold of the grid how many documents reach it, and how many of them are positives."""
    ranked, positives = np.sort(score_D), np.sort(score_D[positive_D])
    chosen_G = len(ranked) - np.searchsorted(ranked, GRID_G, side="left")
    right_G = len(positives) - np.searchsorted(positives, GRID_G, side="left")
    return chosen_G, right_G


def _p_values(right_G: NDArray[np.int64], of_G: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    """Return the probability of so many right ones, or more, if only a share of all documents is right."""
    from scipy.stats import binom  # the import takes a second

    return np.asarray(binom.sf(right_G - 1, of_G, share), np.float64)


def _lower_bound(right: int, of: int, risk: float) -> float:
    """Return Clopper and Pearson's lower bound of a share."""
    from scipy.stats import beta

    return float(beta.ppf(risk, right, of - right + 1)) if right else 0.0
