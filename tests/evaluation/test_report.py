"""The evaluation page. Its numbers match scikit-learn. It loads nothing external and escapes all texts."""

import base64
import hashlib
import html.parser
import re

import numpy as np
import pytest
from sklearn.metrics import (
    precision_recall_curve,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
    roc_curve,
)

import pipelines.evaluation.curves as curves
import pipelines.evaluation.report as report
from pipelines.decisions.labels import decide
from pipelines.decisions.metrics import evaluate
from pipelines.evaluation.curves import curve, label_rows, threshold_costs, thresholds_of_recalls
from pipelines.evaluation.html import shortened
from pipelines.evaluation.plots import ticks
from pipelines.evaluation.report import ReportData, render
from pipelines.evaluation.summary import sentence, uselessness
from pipelines.settings import DecisionSettings

HEAD = {"html", "head", "meta", "title", "style"}
BODY = {"body", "nav", "h1", "h2", "h3", "section", "table", "thead", "tbody", "tr", "th", "td", "div", "p", "a"}
BODY |= {"span", "details", "summary", "button", "script"}
DRAWN = {"svg", "text", "path", "polyline", "circle", "rect"}


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    positive_D = rng.random(500) < 0.3
    score_D = np.round(np.clip(rng.normal(0.35 + 0.3 * positive_D, 0.2), 0, 1), 2).astype(np.float32)  # with ties
    return positive_D, score_D


def page(decision, targets, scores_DL, **more):
    tokens_D = np.arange(len(targets)) * 7
    decisions = decide(scores_DL, decision)
    metrics = evaluate(targets, scores_DL, decisions, decision)
    data = ReportData("spam on test", decision, targets, scores_DL, decisions, metrics, tokens_D,
                      lambda row: f"row {row}", **more)  # fmt: skip
    return render(data)


def test_curves_match_scikit_learn(scored):
    positive_D, score_D = scored
    found = curve(positive_D, score_D)
    precision, recall, thresholds = precision_recall_curve(positive_D, score_D)
    np.testing.assert_allclose(found["precision"][::-1], precision[:-1])
    np.testing.assert_allclose(found["recall"][::-1], recall[:-1])
    np.testing.assert_allclose(found["threshold"][::-1], thresholds)
    false_rate, true_rate, _ = roc_curve(positive_D, score_D, drop_intermediate=False)
    np.testing.assert_allclose(found["false_positive_rate"], false_rate[1:])
    np.testing.assert_allclose(found["recall"], true_rate[1:])


def test_threshold_costs(scored):
    positive_D, score_D = scored
    for row in threshold_costs(positive_D, score_D, [0.2, 0.5, 0.9]):
        taken_D = score_D >= row["threshold"]
        assert row["precision"] == pytest.approx(precision_score(positive_D, taken_D, zero_division=0))
        assert row["recall"] == pytest.approx(recall_score(positive_D, taken_D))
        assert row["taken"] == pytest.approx(taken_D.mean())
        assert row["false positives"] + row["false negatives"] == (taken_D != positive_D).sum()


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression"])
def test_page_is_valid_html_without_external_urls(kind, scored):
    positive_D, score_D = scored
    labels = ("ham", "<script>alert(1)</script>") if kind != "regression" else ()
    decision = DecisionSettings(kind=kind, labels=labels, thresholds=0.4 if kind == "multilabel" else None)
    scores_DL = np.stack([1 - score_D, score_D], axis=1) if labels else score_D[:, None]
    targets = {"multilabel": np.stack([~positive_D, positive_D], axis=1).astype(np.float32),
               "regression": score_D + positive_D}.get(kind, positive_D.astype(np.int64))  # fmt: skip
    text = page(
        decision, targets, scores_DL, losses=[1.0, 0.5], evaluations=[{"step": 1, "mcc": 0.1}, {"step": 2, "mcc": 0.2}],
        text_of=lambda row: '"><img src=x onerror=alert(1)>', facts={"Settings": {"a": 1}},
    )  # fmt: skip
    tags = Tags(text)
    assert not tags.open
    assert set(tags.seen) <= HEAD | BODY | DRAWN
    assert not re.search(r"https?:|src=x>|url\(|@import|<img", text.replace("http-equiv", ""))
    assert "default-src 'none'" in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text
    assert ("Confusion" in text) == (kind in ("binary", "multiclass"))
    assert "nan" not in text.replace("isNaN", "").lower()
    assert all(f'id="{name}"' in text for name in re.findall(r'href="#([^"]+)"', text))


def test_texts_are_shown_only_if_given(scored):
    positive_D, score_D = scored
    scores_DL = np.stack([1 - score_D, score_D], axis=1)
    decision = DecisionSettings(labels=("ham", "spam"))
    assert "secret" not in page(decision, positive_D.astype(np.int64), scores_DL)
    assert "secret words" in page(decision, positive_D.astype(np.int64), scores_DL, text_of=lambda row: "secret words")


def test_many_scores_are_rounded(scored, monkeypatch):
    positive_D, score_D = scored
    monkeypatch.setattr(curves, "EXACT_SCORES", 100)
    monkeypatch.setattr(report, "EXACT_SCORES", 100)
    text = page(
        DecisionSettings(labels=("ham", "spam")), positive_D.astype(np.int64), np.stack([1 - score_D, score_D], 1)
    )
    assert "Scores were rounded to 1e-4" in text


def test_single_class_has_no_curve():
    scores_DL = np.tile(np.array([[0.4, 0.6]], np.float32), (5, 1))
    text = page(DecisionSettings(labels=("ham", "spam")), np.ones(5, np.int64), scores_DL)
    assert "there is no curve" in text


def many(num_labels, kind):
    rng = np.random.default_rng(1)
    names = tuple(f"label {number}" for number in range(num_labels))
    decision = DecisionSettings(kind=kind, labels=names)
    target_D = rng.integers(0, num_labels, 300)
    scores_DL = rng.random((300, num_labels)).astype(np.float32) * 0.5
    scores_DL[np.arange(300), target_D] += 0.4
    targets = np.eye(num_labels, dtype=np.float32)[target_D] if kind == "multilabel" else target_D
    return decision, targets, scores_DL


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_many_labels_are_folded(kind):
    text = page(*many(32, kind))
    assert text.count("<details class=label>") == 32
    assert text.count("<table class=sorts>") == (2 if kind == "multiclass" else 1), "labels, and confusions"
    shown = [row for row in re.findall(r"<td>(label \d+ [^<]*)</td>", text)]
    assert shown
    assert all(row.count("label") <= 3 for row in shown), "of each document, only the highest scores"


def test_a_single_point_is_no_plot(scored):
    positive_D, score_D = scored
    decision, targets = DecisionSettings(labels=("ham", "spam")), positive_D.astype(np.int64)
    scores_DL = np.stack([1 - score_D, score_D], axis=1)
    assert "Learning" not in page(decision, targets, scores_DL, losses=[0.5], evaluations=[{"step": 1, "mcc": 0.1}])
    two = page(decision, targets, scores_DL, losses=[0.5], evaluations=[{"step": 1, "mcc": 0.1}, {"step": 2, "mcc": 0}])
    assert "Validation mcc" in two
    assert "Training loss" not in two


def test_thresholds_of_recalls(scored):
    positive_D, score_D = scored
    found = curve(positive_D, score_D)
    thresholds = thresholds_of_recalls(found, (0.5, 1.0))
    recalls = [row["recall"] for row in threshold_costs(positive_D, score_D, thresholds)]
    assert recalls[0] == 1
    assert recalls[1] >= 0.5 > recalls[1] - 0.1
    assert thresholds_of_recalls(curve(np.array([False, True]), np.array([0.1, 0.9], np.float32))) == [
        pytest.approx(0.9)
    ], "no grid of zeros for a rare label"


def test_numbers_of_each_label_match_scikit_learn():
    decision, targets, scores_DL = many(5, "multiclass")
    rows = label_rows(targets, scores_DL, decide(scores_DL, decision), decision, {})
    predicted = scores_DL.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(targets, predicted)
    assert [row["rows"] for row in rows] == sorted(support, reverse=True), "the most frequent first"
    by_name = sorted(rows, key=lambda row: row["label"])
    for row, *expected in zip(by_name, precision, recall, f1, support, strict=True):
        assert [row["precision"], row["recall"], row["f1"], row["rows"]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([3.0, 3.0], [1, 2, 3, 4, 5]),
        ([0, 12_345], [0, 2500, 5000, 7500, 10_000, 12_500]),
        ([-0.013, 0.021], [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values, expected):
    assert ticks(np.array(values)) == pytest.approx(expected)


def test_summaries_say_what_a_constant_answer_is_worth():
    decision = DecisionSettings(labels=("ham", "spam"), thresholds=0.5)
    targets, score_D = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.7, 0.2], np.float32)
    scores_DL = np.stack([1 - score_D, score_D], axis=1)
    decisions = decide(scores_DL, decision)
    text = sentence(targets, decisions, decision, evaluate(targets, scores_DL, decisions, decision))
    assert "50 % are spam. The classifier finds 50 % of them (recall), and 50 % of what it calls spam" in text
    assert uselessness(targets, decisions, decision) is None
    constant = decide(np.tile(np.array([[0.9, 0.1]], np.float32), (4, 1)), decision)
    assert uselessness(targets, constant, decision) == "it calls every document 'ham'"
    assert uselessness(np.zeros(4, int), constant, decision) is None, "then it is right"


def test_long_paths_are_shortened():
    assert shortened("/data/a") == "/data/a"
    long = "/data/" + "folder/" * 20 + "model"
    assert shortened(long).startswith("…/folder/")
    assert len(shortened(long)) <= 61
    assert shortened("words " * 30) == "words " * 30
