import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from pipelines.decisions import metrics
from pipelines.decisions.labels import activate, decide, resolve_thresholds
from pipelines.decisions.metrics import confusion_matrix, evaluate, f1_per_label, matthews, tune_thresholds
from pipelines.errors import SettingsError
from pipelines.settings import DecisionSettings

BINARY = DecisionSettings(kind="binary", labels=("ham", "spam"))


def test_specification_metric_vectors():
    scores_DL = activate(np.array([[2, -1], [0, 1], [1, 0.5], [0.2, 0.3]]), "binary")
    found = evaluate(np.array([0, 1, 1, 1]), scores_DL, decide(scores_DL, BINARY), BINARY)
    assert found["mcc"] == pytest.approx(0.57735, abs=1e-5)
    assert found["f1_score"] == pytest.approx(0.73333, abs=1e-5)
    assert found["accuracy"] == 0.75
    assert (found["tp"], found["tn"], found["fp"], found["fn"]) == (2, 1, 0, 1)
    assert (found["auroc"], found["auprc"]) == (1, 1)
    decision = DecisionSettings(kind="multilabel", labels=("a", "b"))
    scores_DL = np.array([[0.9, 0.2], [0.5, 0.6]], dtype=np.float32)
    found = evaluate(np.array([[1, 0], [0, 1]]), scores_DL, decide(scores_DL, decision), decision)
    assert found["lrap"] == 1.0


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_confusion_metrics_match_scikit_learn(pairs):
    target, label = np.array(pairs).T
    matrix = confusion_matrix(target, label, 4)
    assert matthews(matrix) == pytest.approx(reference.matthews_corrcoef(target, label), abs=1e-9)
    f1 = reference.f1_score(target, label, labels=range(4), average=None, zero_division=np.nan)
    np.testing.assert_allclose(f1_per_label(matrix), f1)
    half = len(target) // 2
    parts = [confusion_matrix(target[part], label[part], 4) for part in (slice(half), slice(half, None))]
    np.testing.assert_array_equal(parts[0] + parts[1], matrix)


def test_regression_and_multilabel_metrics():
    rng = np.random.default_rng(0)
    target, value = rng.normal(size=50).astype(np.float32), rng.normal(size=(50, 1)).astype(np.float32)
    decision = DecisionSettings(kind="regression")
    found = evaluate(target, value, decide(value, decision), decision)
    assert found["r2"] == pytest.approx(reference.r2_score(target, value[:, 0]), abs=1e-6)
    assert found["rmse"] == pytest.approx(reference.root_mean_squared_error(target, value[:, 0]), abs=1e-6)
    assert found["pearson"] == pytest.approx(np.corrcoef(target, value[:, 0])[0, 1], abs=1e-6)
    decision = DecisionSettings(kind="multilabel", labels=("a", "b", "c"))
    target, scores = rng.integers(0, 2, (50, 3)), rng.random((50, 3), dtype=np.float32)
    found = evaluate(target, scores, decide(scores, decision), decision)
    assert found["f1_micro"] == pytest.approx(reference.f1_score(target, scores >= 0.5, average="micro"))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(target, scores >= 0.5, average="macro"))


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_labels_that_do_not_occur_are_left_out_of_means(kind):
    labels = ("a", "b") if kind == "binary" else ("a", "b", "c")
    decision = DecisionSettings(kind=kind, labels=labels)
    scores = np.full((8, len(labels)), 0.1, np.float32)
    scores[:, 0] = 0.9
    scores[0] = scores[0, ::-1]
    target = np.zeros(8, int) if kind != "multilabel" else np.eye(3, dtype=int)[np.zeros(8, int)]
    found = evaluate(target, scores, decide(scores, decision), decision)
    predicted = scores >= 0.5 if kind == "multilabel" else scores.argmax(1)
    expected = reference.f1_score(target, predicted, average=None, labels=range(len(labels)), zero_division=np.nan)
    assert found["f1_score" if kind == "binary" else "f1_macro"] == pytest.approx(np.nanmean(expected))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=2, max_size=40), st.floats(0.1, 1.0))
def test_tuned_thresholds_are_optimal(rows, goal):
    positive = np.array([held for held, _ in rows])
    scores = np.array([[1 - tenths / 10, tenths / 10] for _, tenths in rows], dtype=np.float32)
    if positive.all() or not positive.any():
        tuned = tune_thresholds(positive.astype(int), scores, BINARY)
        assert tuned.untuned == ("spam",)
        assert tuned.thresholds == (0.5,)
        return

    def outcome(threshold):
        label = decide(scores, resolve_thresholds(threshold, BINARY)).label_D == 1
        precision = (label & positive).sum() / max(label.sum(), 1)
        recall = (label & positive).sum() / positive.sum()
        return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)

    every = [outcome(threshold) for threshold in sorted({0.0, *scores[:, 1].tolist()})]
    found = {name: outcome(tune_thresholds(positive.astype(int), scores, BINARY, name).thresholds[0]) for name in
             ("f1", f"precision={goal}", f"recall={goal}")}  # fmt: skip
    assert found["f1"][2] == pytest.approx(max(f1 for _, _, f1 in every))
    reachable = [recall for precision, recall, _ in every if precision >= goal]
    if reachable:
        assert found[f"precision={goal}"][0] >= goal
        assert found[f"precision={goal}"][1] == pytest.approx(max(reachable))
    assert found[f"recall={goal}"][1] >= goal
    assert found[f"recall={goal}"][0] == pytest.approx(max(p for p, recall, _ in every if recall >= goal))


def test_unreachable_objective_is_reported():
    target, scores = np.array([0, 1, 0, 1]), np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]], np.float32)
    assert tune_thresholds(target, scores, BINARY, "precision=0.9").missed == ("spam",)
    assert tune_thresholds(target, scores, BINARY, "precision=0.5").missed == ()
    assert tune_thresholds(target, scores, BINARY, "recall=1").missed == ()


@pytest.mark.parametrize("objective", ["f2", "fbeta", "fbeta=0", "precision=2", "recall=x"])
def test_unknown_objectives_are_refused(objective):
    with pytest.raises(SettingsError, match="is none of: f1, fbeta=B"):
        tune_thresholds(np.array([0, 1]), np.ones((2, 2), np.float32), BINARY, objective)


def test_rare_labels_use_pooled_threshold():
    rng = np.random.default_rng(0)
    decision = DecisionSettings(kind="multilabel", labels=("often", "rare", "never"))
    scores = rng.random((200, 3), dtype=np.float32)
    targets = np.zeros((200, 3), int)
    targets[:, 0] = scores[:, 0] > 0.3
    targets[:4, 1], scores[:4, 1] = 1, 0.2
    tuned = tune_thresholds(targets, scores, decision)
    assert tuned.pooled == ("rare", "never")
    assert tuned.untuned == ()
    pooled = DecisionSettings(kind="binary", labels=("no", "yes"))
    together = np.stack([1 - scores.ravel(), scores.ravel()], axis=1)
    expected = tune_thresholds(targets.ravel(), together, pooled).thresholds[0]
    assert tuned.thresholds == (pytest.approx(0.3, abs=0.02), expected, expected)
    assert "rare, never: fewer than 10 positives" in tuned.remarks("f1")[0]
    alone = tune_thresholds(targets[:, 1], np.stack([1 - scores[:, 1], scores[:, 1]], axis=1), pooled)
    assert alone.remarks("f1")[0].startswith("only 4 positives: the threshold is little better than chance")


def test_histogram_areas_of_many_scores(monkeypatch):
    random = np.random.default_rng(0)
    positive_D = random.random(5000) < 0.3
    score_D = np.clip(random.normal(0.4 + 0.2 * positive_D, 0.2), 0, 1).astype(np.float32)
    exact = metrics.curve_areas(positive_D, score_D)
    monkeypatch.setattr(metrics, "EXACT_SCORES", 1000)
    found = metrics.curve_areas(positive_D, score_D)
    assert found.pop("histogram_bins") == 10_001
    assert found == pytest.approx(exact, abs=2e-4)
    assert found != exact
    rounded = np.round(score_D, 2)
    binned = metrics.curve_areas(positive_D, rounded)
    monkeypatch.undo()
    assert {**metrics.curve_areas(positive_D, rounded), "histogram_bins": 10_001} == pytest.approx(binned, abs=1e-12)
