"""Promises about thresholds hold on new documents as often as they say."""

import math

import numpy as np
import pytest

from pipelines.decisions.guarantees import GRID_G, fewest_documents, guarantee_thresholds
from pipelines.decisions.labels import decide
from pipelines.decisions.metrics import tune_thresholds
from pipelines.errors import SettingsError
from pipelines.settings import NEVER, DecisionSettings

SPAM = DecisionSettings(kind="binary", labels=("ham", "spam"))
DRAWS = 200


def documents(rng, count, rate=0.3, apart=2.5):
    """Targets and calibrated scores of a positive label."""
    truth_D = rng.random(count) < rate
    logit_D = apart * (truth_D * apart + rng.normal(size=count) - apart / 2) + math.log(rate / (1 - rate))
    score_D = (1 / (1 + np.exp(-logit_D))).astype(np.float32)
    return truth_D.astype(np.int64), np.column_stack([1 - score_D, score_D])


@pytest.mark.parametrize(
    ("objective", "rows", "kept_at_least"),
    [
        ("precision=0.9", 100, 0.0),
        ("precision=0.9", 1_000, 0.95),
        ("precision=0.98", 3_000, 0.3),
        ("recall=0.9", 100, 0.5),
        ("recall=0.95", 1_000, 0.95),
    ],
)
def test_promises_are_missed_no_more_often_than_allowed(objective, rows, kept_at_least):
    """The plain optimum of the same documents misses them far more often."""
    rng = np.random.default_rng(0)
    all_targets, all_scores = documents(rng, 300_000)
    name, _, number = objective.partition("=")

    def is_missed(threshold):
        chosen_D = all_scores[:, 1] >= np.float32(threshold)
        hits = all_targets[chosen_D].sum()
        found = hits / all_targets.sum() if name == "recall" else hits / max(chosen_D.sum(), 1) if chosen_D.any() else 1
        return found < float(number)

    missed = plain = kept = 0
    for _ in range(DRAWS):
        some = rng.integers(0, len(all_targets), rows)
        targets, scores = all_targets[some], all_scores[some]
        found = guarantee_thresholds(targets, scores, SPAM, objective=objective, confidence=0.9).labels["spam"]
        missed += is_missed(found.threshold)
        kept += found.holds
        plain += is_missed(tune_thresholds(targets, scores, SPAM, objective).thresholds[0])
    assert missed / DRAWS <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / DRAWS)
    assert plain / DRAWS > 0.2
    assert kept / DRAWS >= kept_at_least


def test_fewest_documents_are_those_of_the_binomial():
    for share, risk in ((0.9, 0.05), (0.99, 0.01), (0.5, 0.1)):
        count = fewest_documents(share, risk)
        assert share**count <= risk < share ** (count - 1)


def test_counts_and_bounds_are_those_of_the_documents():
    targets, scores = documents(np.random.default_rng(1), 2_000)
    for objective in ("precision=0.9", "recall=0.9"):
        one = guarantee_thresholds(targets, scores, SPAM, objective=objective, confidence=0.95).labels["spam"]
        label_D = decide(scores, guarantee_thresholds(
            targets, scores, SPAM, objective=objective, confidence=0.95).applied_to(SPAM)).label_D  # fmt: skip
        assert one.right == ((label_D == 1) & (targets == 1)).sum()
        assert one.documents == ((label_D == 1).sum() if objective.startswith("precision") else (targets == 1).sum())
        assert one.positives == (targets == 1).sum()
        assert 0.9 <= one.bound < one.right / one.documents
        assert np.float32(one.threshold) in GRID_G


def test_labels_with_too_few_documents_are_named_and_abstain():
    targets, scores = documents(np.random.default_rng(2), 60)
    tags = DecisionSettings(kind="multilabel", labels=("a", "b"))
    both = (np.column_stack([targets, np.zeros(60)]).astype(np.float32), scores)
    for objective, threshold, word in (("precision=0.99", NEVER, "never"), ("recall=0.99", 0.0, "always")):
        found = guarantee_thresholds(*both, tags, objective=objective, confidence=0.95)
        assert found.missed == ("a", "b")
        assert found.thresholds == (threshold, threshold)
        positive_DL = decide(scores, found.applied_to(tags)).positive_DL
        assert positive_DL.all() if word == "always" else not positive_DL.any()
        needed = found.labels["b"].needed
        assert found.remarks(objective)[1] == (
            f"no threshold of 'b' has {objective} with confidence 0.95: 0 positives are too few, about {needed} like "
            f"these would do; until then the label is {word} assigned"
        )


def test_needed_positives_are_enough_and_not_far_too_many():
    """As many positives as a label is said to need give it a threshold in most draws; a third of them does not."""
    rng = np.random.default_rng(5)
    for objective in ("precision=0.9", "recall=0.9"):
        few = [guarantee_thresholds(*documents(rng, 70), SPAM, objective=objective, confidence=0.95).labels["spam"]
               for _ in range(40)]  # fmt: skip
        needed = [one.needed for one in few if not one.holds and one.needed is not None]
        assert len(needed) > 10
        found = [guarantee_thresholds(*documents(rng, round(factor * np.median(needed) / 0.3)), SPAM,
                                      objective=objective, confidence=0.95).labels["spam"].holds
                 for factor in (3, 1 / 3) for _ in range(40)]  # fmt: skip
        assert np.mean(found[:40]) > 0.8
        assert np.mean(found[40:]) < 0.4


def test_a_model_that_is_too_weak_is_told_so():
    targets, scores = documents(np.random.default_rng(6), 5_000, apart=0.1)
    one = guarantee_thresholds(targets, scores, SPAM, objective="precision=0.95", confidence=0.95).labels["spam"]
    assert (one.holds, one.needed) == (False, None)
    assert one.shortage == "none has it on these documents themselves, so ask for less"


def test_joint_promises_are_stricter():
    rng = np.random.default_rng(3)
    targets, scores = documents(rng, 500)
    tags = DecisionSettings(kind="multilabel", labels=("a", "b"))
    both = (np.column_stack([targets, targets]).astype(np.float32), scores[:, [1, 1]])
    alone, together = (
        guarantee_thresholds(*both, tags, objective="recall=0.8", confidence=0.95, joint=joint).thresholds[0]
        for joint in (False, True)
    )
    assert together < alone


@pytest.mark.parametrize(
    ("objective", "confidence", "message"),
    [("f1", 0.95, "confidence is for objective precision=P or recall=R"), ("precision=1", 0.95, "between 0 and 1"),
     ("recall=0.9", 95, "confidence is 95 and must be"), ("recall=0.9", 0.05, "at least 0.5")],
)  # fmt: skip
def test_what_cannot_be_promised_is_refused(objective, confidence, message):
    with pytest.raises(SettingsError, match=message):
        guarantee_thresholds(*documents(np.random.default_rng(0), 10), SPAM, objective=objective, confidence=confidence)
