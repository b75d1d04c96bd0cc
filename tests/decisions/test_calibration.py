import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad

from pipelines.decisions.calibration import (
    WindowLogits,
    _multilabel_loss,
    _objective,
    _softmax_loss,
    calibration_error,
    fit_calibration,
    fit_temperature,
    log_loss,
    reliability,
)
from pipelines.decisions.labels import activate, merged_scores
from pipelines.errors import SettingsError
from pipelines.settings import Calibration, DecisionSettings

BINARY = DecisionSettings(kind="binary", labels=("ham", "spam"))
MULTICLASS = DecisionSettings(kind="multiclass", labels=("a", "b", "c"))
MULTILABEL = DecisionSettings(kind="multilabel", labels=("a", "b", "c"))
REGRESSION = DecisionSettings(kind="regression")


def one_window_each(logits_WL, targets):
    return WindowLogits(logits_WL, np.arange(len(logits_WL) + 1), targets)


def draw_targets(rng, scores_DL, kind):
    if kind == "multilabel":
        return (rng.random(scores_DL.shape) < scores_DL).astype(np.float32)
    return (scores_DL.cumsum(axis=1) < rng.random((len(scores_DL), 1))).sum(axis=1).clip(0, scores_DL.shape[1] - 1)


def test_calibration_error():
    rng = np.random.default_rng(1)
    score_D = rng.random(200_000).astype(np.float32)
    points, error = reliability(rng.random(200_000) < score_D, score_D)
    assert error < 0.01
    np.testing.assert_allclose(points[:, 0], points[:, 1], atol=0.02)
    _, error = reliability(np.zeros(1000, bool), np.full(1000, 0.8, np.float32))
    assert error == pytest.approx(0.8)
    assert calibration_error(np.zeros(3), np.zeros((3, 1), np.float32), REGRESSION) is None


def test_fit_temperature_recovers_known_value():
    rng = np.random.default_rng(0)
    logits_WL = rng.normal(0, 2, (20_000, 3)).astype(np.float32)
    targets = draw_targets(rng, activate(logits_WL, "multiclass", Calibration(1.7)), "multiclass")
    assert fit_temperature(one_window_each(logits_WL, targets), MULTICLASS) == pytest.approx(1.7, rel=0.05)
    both = draw_targets(rng, activate(logits_WL, "multilabel", Calibration(0.6)), "multilabel")
    assert fit_temperature(one_window_each(logits_WL, both), MULTILABEL) == pytest.approx(0.6, rel=0.05)
    with pytest.raises(SettingsError, match="kind regression has none"):
        fit_calibration("temperature", one_window_each(logits_WL[:, :1], targets), REGRESSION)


@pytest.mark.parametrize("count", [3, 60, 500])
def test_documents_that_are_all_right_do_not_make_all_scores_the_same(count):
    gaps = np.linspace(1, 4, count, dtype=np.float32)
    sign = np.where(np.arange(count) % 2, 1, -1)
    found = one_window_each(np.stack([-gaps * sign, gaps * sign], axis=1) / 2, (sign > 0).astype(int))
    scores = activate(found.logits_WL, "binary", Calibration(fit_temperature(found, BINARY)))
    assert len(np.unique(scores[:, 1])) > 0.9 * count, "they keep their order"
    assert 0.5 < scores.max() < 1


@pytest.mark.parametrize(
    ("decision", "known"),
    [
        (BINARY, Calibration(1, (0.5, 0.5), (0.0, -1.0))),
        (MULTICLASS, Calibration(1, (0.5, 1.5, 1.0), (1.0, -1.0, 0.0))),
        (MULTILABEL, Calibration(1, (0.4, 1.0, 2.0), (-1.0, 0.0, 1.5))),
    ],
)
def test_per_label_calibration_recovers_known_scores(decision, known):
    rng = np.random.default_rng(2)
    logits_WL = rng.normal(0, 2, (20_000, decision.num_labels)).astype(np.float32)
    true_DL = activate(logits_WL, decision.kind, known)
    found = one_window_each(logits_WL, draw_targets(rng, true_DL, decision.kind))
    fitted = fit_calibration("per_label", found, decision)
    assert fitted.few == ()
    scores_DL = activate(logits_WL, decision.kind, fitted.calibration)
    np.testing.assert_allclose(scores_DL, true_DL, atol=0.04)
    assert calibration_error(found.targets, scores_DL, decision) < 0.02
    before = calibration_error(found.targets, activate(logits_WL, decision.kind), decision)
    assert before > 0.05
    assert log_loss(found, decision, fitted.calibration) < log_loss(
        found, decision, Calibration(fit_temperature(found, decision))
    )


@pytest.mark.parametrize("merge", ["mean", "max"])
@pytest.mark.parametrize("decision", [BINARY, MULTICLASS, MULTILABEL], ids=lambda decision: decision.kind)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_slopes_are_those_of_the_loss(decision, merge, seed):
    from dataclasses import replace

    rng = np.random.default_rng(seed)
    decision = replace(decision, merge=merge)
    counts_D = rng.integers(1, 5, 12)
    logits_WL = rng.normal(size=(counts_D.sum(), decision.num_labels)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(counts_D)])
    targets = draw_targets(rng, merged_scores(logits_WL, offsets, decision)[0], decision.kind)
    found, loss = WindowLogits(logits_WL, offsets, targets), _multilabel_loss
    if decision.kind != "multilabel":
        loss = _softmax_loss
    point = np.concatenate([rng.uniform(0.5, 2, decision.num_labels), rng.normal(size=decision.num_labels)])
    arguments = (loss, found, decision, Calibration(1.3))
    error = check_grad(
        lambda x: _objective(x, *arguments)[0], lambda x: _objective(x, *arguments)[1], point, epsilon=1e-3
    )
    assert error < 0.02  # the scores are float32


def test_labels_with_few_documents_keep_the_temperature():
    rng = np.random.default_rng(3)
    logits_WL = rng.normal(0, 2, (500, 3)).astype(np.float32)
    targets = draw_targets(rng, activate(logits_WL, "multilabel"), "multilabel")
    targets[:, 1] = 0
    targets[:4, 1] = 1
    fitted = fit_calibration("per_label", one_window_each(logits_WL, targets), MULTILABEL)
    assert fitted.few == ("b",)
    assert (fitted.calibration.scales[1], fitted.calibration.biases[1]) == (1, 0)
    assert fitted.calibration.scales[0] != 1
    assert any("b: fewer than 10 documents" in line for line in fitted.remarks)
    separable = one_window_each(np.array([[-9, 9], [9, -9]] * 50, np.float32), np.array([1, 0] * 50))
    assert np.isfinite(fit_calibration("per_label", separable, BINARY).calibration.scales).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, "above 0"),
        ({"scales": (1.0,), "biases": (0.0, 1.0)}, "1 scales and 2 biases"),
        ({"scales": (-1.0,), "biases": (0.0,)}, "above 0"),
        ({"scales": (1.0,), "biases": (float("nan"),)}, "bias=nan"),
    ],
)
def test_impossible_calibrations_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        Calibration(**values)
