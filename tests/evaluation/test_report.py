"""The evaluation page. Its numbers match scikit-learn. It loads nothing external and escapes all texts."""

import html.parser
import re

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, precision_score, recall_score, roc_curve

import pipelines.evaluation.report as report
from pipelines.decisions.labels import decide
from pipelines.evaluation.report import ReportData, curve, render, threshold_costs
from pipelines.settings import DecisionSettings

HEAD = {"html", "head", "meta", "title", "style"}
BODY = {"body", "h1", "h2", "h3", "section", "table", "tr", "th", "td", "div", "p"}
DRAWN = {"svg", "text", "path", "polyline", "circle", "rect"}


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    positive_D = rng.random(500) < 0.3
    score_D = np.round(np.clip(rng.normal(0.35 + 0.3 * positive_D, 0.2), 0, 1), 2).astype(np.float32)  # with ties
    return positive_D, score_D


def page(decision, targets, scores_DL, **more):
    tokens_D = np.arange(len(targets)) * 7
    metrics = {"mcc": 0.5, "auroc": None}
    data = ReportData("spam on test", decision, targets, scores_DL, decide(scores_DL, decision), metrics, tokens_D,
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
    assert not re.search(r"https?:|src=x>|url\(|@import|<script|<img", text.replace("http-equiv", ""))
    assert "default-src 'none'" in text
    assert ("Confusion" in text) == (kind in ("binary", "multiclass"))
    assert "nan" not in text


def test_texts_are_shown_only_if_given(scored):
    positive_D, score_D = scored
    scores_DL = np.stack([1 - score_D, score_D], axis=1)
    decision = DecisionSettings(labels=("ham", "spam"))
    assert "secret" not in page(decision, positive_D.astype(np.int64), scores_DL)
    assert "secret words" in page(decision, positive_D.astype(np.int64), scores_DL, text_of=lambda row: "secret words")


def test_many_scores_are_rounded(scored, monkeypatch):
    positive_D, score_D = scored
    monkeypatch.setattr(report, "EXACT_SCORES", 100)
    text = page(
        DecisionSettings(labels=("ham", "spam")), positive_D.astype(np.int64), np.stack([1 - score_D, score_D], 1)
    )
    assert "Scores were rounded to 1e-4" in text


def test_single_class_has_no_curve():
    scores_DL = np.tile(np.array([[0.4, 0.6]], np.float32), (5, 1))
    text = page(DecisionSettings(labels=("ham", "spam")), np.ones(5, np.int64), scores_DL)
    assert "there is no curve" in text
