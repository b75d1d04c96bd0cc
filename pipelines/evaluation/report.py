"""The evaluation report: one HTML page without network resources. Its only script sorts tables.

The page begins with a sentence. Then come the metrics, how training went, a table of the labels, the confusion matrix,
the curves of each label, and the documents that are longest or most wrong, by their position in the input. It shows
texts only if the caller provides them. Works on arrays; imports neither models nor Ray.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.calibration import reliability
from pipelines.decisions.labels import Decisions, thresholds_by_label
from pipelines.decisions.metrics import EXACT_SCORES, HISTOGRAM_BINS, SCORE_DECIMALS, confusion_matrix
from pipelines.evaluation.curves import curve, label_rows, positives, threshold_costs, thresholds_of_recalls
from pipelines.evaluation.html import anchor, escape, fact_table, row_table, section
from pipelines.evaluation.plots import MOST_POINTS, histogram_plot, line_plot
from pipelines.evaluation.summary import sentence, uselessness
from pipelines.settings import NEVER, DecisionSettings

MOST_DOCUMENTS = 10
MOST_SCORES = 3
"""Scores of a document that are shown, the highest first."""
MOST_IN_MATRIX = 12
"""Labels up to which the confusion matrix is shown unfolded."""
MOST_CONFUSIONS = 15
"""Confusions of two labels that are listed if the matrix is folded."""


@dataclass(frozen=True)
class ReportData:
    """Content of the page. It covers the D documents that could be scored."""

    title: str
    decision: DecisionSettings
    targets: NDArray[np.generic]
    scores_DL: NDArray[np.float32]
    decisions: Decisions
    metrics: Mapping[str, Any]
    num_tokens_D: NDArray[np.integer[Any]]
    name_of: Callable[[int], str]
    """Returns a document's position in the input, given its index in these arrays."""
    text_of: Callable[[int], str] | None = None
    """Returns a document's text. None if the page must not show texts."""
    losses: Sequence[float] = ()
    """Training loss of each optimizer step."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """Metrics of each evaluation on the validation data, with the step."""
    cost: str = ""
    """What the work has cost, as a sentence."""
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further tables of names and values, by heading: settings, data, time."""


def render(data: ReportData) -> str:
    """Return the HTML page."""
    lead = f"{sentence(data.targets, data.decisions, data.decision, data.metrics)} {data.cost}"
    useless = uselessness(data.targets, data.decisions, data.decision)
    sections = {"Metrics": fact_table(_plain_metrics(data.metrics))}
    if learning := _learning(data):
        sections["Learning"] = learning
    if data.decision.kind == "regression":
        sections["Values"] = _values(data)
    else:
        sections["Labels"] = _labels(data)
        if data.decisions.label_D is not None:
            sections["Confusion"] = _confusion(data)
        sections["Curves"] = "".join(_curves(data, column) for column in _shown_labels(data.decision))
    sections["Documents"] = _documents(data)
    folded = {name: fact_table(facts) for name, facts in data.facts.items()}
    links = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in [*sections, *folded])
    parts = [
        f"<h1>{escape(data.title)}</h1>",
        f"<p class=summary>{escape(lead)}</p>",
        f"<p class=bad>The classifier is useless: {escape(useless)}.</p>" if useless else "",
        f"<nav>{links}</nav>",
        *(section(name, body) for name, body in sections.items()),
        *(section(name, body, folded=True) for name, body in folded.items()),
    ]
    page, script_hash = _template()
    return page.substitute(title=escape(data.title), body="\n".join(parts), script_hash=script_hash)


@cache
def _template() -> tuple[Template, str]:
    """Return the frame of the page, and the hash of its script, without which a browser runs no script."""
    text = resources.files("pipelines").joinpath("evaluation/report.html").read_text("utf-8")
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert script is not None
    return Template(text), f"sha256-{base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()}"


def _shown_labels(decision: DecisionSettings) -> Sequence[int]:
    """Return the labels that have curves, by index. For kind binary, this is only the positive label."""
    return [1] if decision.kind == "binary" else range(len(decision.labels))


def _labels(data: ReportData) -> str:
    rows = label_rows(data.targets, data.scores_DL, data.decisions, data.decision, data.metrics)
    if all(row["threshold"] is None for row in rows):
        for row in rows:
            del row["threshold"]
    return f"<p>A click on a heading sorts.</p>{row_table(rows, sorts=True)}"


def _curves(data: ReportData, column: int) -> str:
    """Return curves, threshold costs, calibration and histogram of one label. With several labels, they are folded."""
    label, score_D = data.decision.labels[column], data.scores_DL[:, column]
    positive_D = positives(data.targets, data.decision, column)
    heading = f"<h3>{escape(label)}: {int(positive_D.sum()):,} of {len(positive_D):,} rows</h3>"
    body = _drawn(data, label, positive_D, score_D)
    if len(_shown_labels(data.decision)) == 1:
        return heading + body
    return f"<details class=label><summary>{heading}</summary>{body}</details>"


def _drawn(data: ReportData, label: str, positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]) -> str:
    if positive_D.all() or not positive_D.any():
        return "<p>All rows have the same value for this label, so there is no curve.</p>"
    threshold = thresholds_by_label(data.decision).get(label)
    found = curve(positive_D, score_D)
    mark = None if threshold is None else int(np.searchsorted(-found["threshold"], -threshold, side="right")) - 1
    points, error = reliability(positive_D, score_D)
    bins = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    counts = [np.histogram(score_D[chosen], bins)[0] for chosen in (positive_D, ~positive_D)]
    plots = [
        line_plot("Precision and recall", "recall", "precision", (found["recall"], found["precision"]), mark=mark),
        line_plot(
            "ROC",
            "false positive rate",
            "recall",
            (found["false_positive_rate"], found["recall"]),
            mark=mark,
            diagonal=True,
        ),
        line_plot(
            f"Calibration (error {error:.3f})",
            "mean score",
            "share of positives",
            (points[:, 0], points[:, 1]),
            diagonal=True,
            dots=True,
        ),
        histogram_plot(f"Scores: {label} (blue), others (orange)", "documents", counts),
    ]
    marked = threshold if threshold != NEVER else None
    grid = sorted({*thresholds_of_recalls(found), *([] if marked is None else [marked])})
    rounded = f"<p>Scores were rounded to 1e-{SCORE_DECIMALS} for the curves.</p>" * (len(score_D) > EXACT_SCORES)
    note = "" if marked is None else f"<p>The dot and the bold row mark the current threshold, {marked:.4g}.</p>"
    if threshold == NEVER:
        note = "<p>The label is never assigned, because no threshold keeps what was promised for it.</p>"
    costs = row_table(threshold_costs(positive_D, score_D, grid), bold=None if marked is None else grid.index(marked))
    return f"<div class=plots>{''.join(plots)}</div>{rounded}{note}{costs}"


def _confusion(data: ReportData) -> str:
    """Return the confusion matrix. With many labels, it is folded behind a list of the most frequent confusions."""
    assert data.decisions.label_D is not None
    labels = data.decision.labels
    matrix = confusion_matrix(data.targets.astype(np.int64), data.decisions.label_D, len(labels))
    table = _matrix(matrix, labels)
    if len(labels) <= MOST_IN_MATRIX:
        return table
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    names = [*labels, "no label"]
    rows = [
        {
            "truth": labels[row],
            "predicted": names[column],
            "rows": int(wrong[row, column]),
            "of the label": float(wrong[row, column] / matrix[row].sum()),
        }
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
    return f"{row_table(rows, sorts=True)}<details><summary>The whole matrix</summary>{table}</details>"


def _matrix(matrix: NDArray[np.int64], labels: Sequence[str]) -> str:
    names = [*labels, *(["no label"] if matrix[:, -1].any() else [])]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("truth \\ predicted", *names, "recall"))
    body = ""
    for row, label in enumerate(labels):
        counts, total = matrix[row], max(int(matrix[row].sum()), 1)
        cells = "".join(
            f'<td style="--share:{counts[column] / total:.3f}" class=heat>{counts[column]:,}</td>'
            for column in range(len(names))
        )
        body += f"<tr><th>{escape(label)}</th>{cells}<td class=after>{counts[row] / total:.3f}</td></tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _learning(data: ReportData) -> str:
    """Return plots of the loss and of the metrics of each evaluation. A single point is no plot."""
    losses = np.asarray(data.losses, float)
    width = max(1, len(losses) // 50)
    plots = []
    if len(losses) > 1:
        steps = np.arange(1, len(losses) + 1, dtype=float)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        title = "Training loss" + (f" (mean of {width} steps)" if width > 1 else "")
        plots.append(line_plot(title, "step", "loss", (steps[width - 1 :], smooth), unit=False))
    names = [
        name for name, value in (data.evaluations[0] if data.evaluations else {}).items() if isinstance(value, float)
    ]
    for name in names[:3]:
        at = [(e["step"], e[name]) for e in data.evaluations if e.get(name) is not None]
        if len(at) > 1:
            x, y = np.asarray(at, float).T
            plots.append(line_plot(f"Validation {name}", "step", name, (x, y), unit=False, dots=True))
    return f"<div class=plots>{''.join(plots)}</div>" if plots else ""


def _values(data: ReportData) -> str:
    assert data.decisions.value_D is not None
    truth, value = data.targets.astype(float), data.decisions.value_D.astype(float)
    chosen = np.linspace(0, len(truth) - 1, min(len(truth), MOST_POINTS)).astype(int)
    points = (truth[chosen], value[chosen])
    drawn = line_plot(
        "Predicted values", "truth", "predicted", points, unit=False, diagonal=True, dots=True, line=False
    )
    return f"<div class=plots>{drawn}</div>"


def _documents(data: ReportData) -> str:
    wrong_D = _wrongness(data)
    most_wrong = [row for row in np.argsort(-wrong_D, kind="stable")[:MOST_DOCUMENTS] if wrong_D[row] > 0]
    longest = np.argsort(-data.num_tokens_D, kind="stable")[:MOST_DOCUMENTS]
    about = "The error is the distance between the scores of a document (regression: its value) and the truth."
    return (
        f"<p>{about}</p><h3>Largest errors</h3>{row_table([_document(data, row, wrong_D) for row in most_wrong])}"
        f"<h3>Longest</h3>{row_table([_document(data, row, wrong_D) for row in longest])}"
    )


def _wrongness(data: ReportData) -> NDArray[np.float64]:
    """Return the error of each document: the distance between its scores and the truth.

    Single label: 1 - score of the true label. Multilabel: the largest distance of any label. Regression: the absolute
    error.
    """
    if data.decisions.value_D is not None:
        away_D = np.abs(data.decisions.value_D.astype(float) - data.targets.astype(float))
    elif data.decision.kind == "multilabel":
        away_D = np.abs(data.scores_DL - data.targets.astype(np.float32)).max(axis=1)
    else:
        away_D = 1.0 - data.scores_DL[np.arange(len(data.targets)), data.targets.astype(int)]
    return np.asarray(away_D, np.float64)


def _document(data: ReportData, row: int, wrong_D: NDArray[np.float64]) -> dict[str, Any]:
    names, score_L = data.decision.labels, data.scores_DL[row]
    if data.decision.kind == "regression":
        truth: Any = float(data.targets[row])
    elif data.decision.kind == "multilabel":
        truth = ", ".join(name for name, holds in zip(names, data.targets[row], strict=True) if holds) or "none"
    else:
        truth = names[int(data.targets[row])]
    highest = np.argsort(-score_L, kind="stable")[:MOST_SCORES]
    found = {
        "document": data.name_of(int(row)),
        "tokens": int(data.num_tokens_D[row]),
        "truth": truth,
        "highest scores" if names else "value": ", ".join(f"{names[at]} {score_L[at]:.3f}" for at in highest)
        if names
        else float(score_L[0]),
        "error": float(wrong_D[row]),
    }
    return found if data.text_of is None else {**found, "text": data.text_of(int(row))[:300]}


def _plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics without those of each label, which have a table of their own."""
    return {
        name: "undefined" if value is None else value
        for name, value in metrics.items()
        if not (isinstance(value, Mapping) and all(isinstance(inner, Mapping) for inner in value.values()))
    }
