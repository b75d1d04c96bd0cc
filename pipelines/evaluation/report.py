"""The evaluation report: one HTML page without scripts and without network resources.

The page shows curves, the cost of each threshold, the confusion matrix, calibration, histograms, and how training went.
It also lists the longest documents and those with the largest errors, by their position in the input. It shows texts
only if the caller provides them. Works on arrays; imports neither models nor Ray.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.calibration import reliability
from pipelines.decisions.labels import Decisions, thresholds_by_label
from pipelines.decisions.metrics import EXACT_SCORES, HISTOGRAM_BINS, SCORE_DECIMALS, confusion_matrix
from pipelines.evaluation.plots import MOST_POINTS, histogram_plot, line_plot
from pipelines.settings import NEVER, DecisionSettings

MOST_DOCUMENTS = 10


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
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further tables of names and values, by heading: settings, data, time."""


def render(data: ReportData) -> str:
    """Return the HTML page."""
    parts = [f"<h1>{_text(data.title)}</h1>", _section("Metrics", _table(_flat(data.metrics)))]
    if data.losses:
        parts.append(_section("Learning", _learning(data)))
    if data.decision.kind == "regression":
        parts.append(_section("Values", _values(data)))
    else:
        parts += [_confusion(data), *(_label(data, column) for column in _shown_labels(data.decision))]
    parts.append(_section("Documents", _documents(data)))
    parts += [_section(name, _table(facts)) for name, facts in data.facts.items()]
    page = Template(resources.files("pipelines").joinpath("evaluation/report.html").read_text("utf-8"))
    return page.substitute(title=_text(data.title), body="\n".join(parts))


def curve(positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Compute precision, recall and false positive rate at every threshold, from the highest score down.

    Args:
        positive_D: Whether the label holds for each document, (D,).
        score_D: Score of the label, (D,). More than EXACT_SCORES scores are rounded to SCORE_DECIMALS decimals.

    Returns:
        Arrays named threshold, precision, recall and false_positive_rate, with one value per distinct score. A
        threshold selects all documents with equal scores, or none of them.
    """
    if len(score_D) > EXACT_SCORES:
        score_D = np.round(score_D, SCORE_DECIMALS)
    order = np.argsort(-score_D, kind="stable")
    ranked, hits = score_D[order], np.cumsum(positive_D[order])
    last = np.append(ranked[1:] != ranked[:-1], True)
    true, chosen = hits[last].astype(float), (np.flatnonzero(last) + 1).astype(float)
    return {
        "threshold": ranked[last].astype(float),
        "precision": true / chosen,
        "recall": true / max(positive_D.sum(), 1),
        "false_positive_rate": (chosen - true) / max((~positive_D).sum(), 1),
    }


def threshold_costs(
    positive_D: NDArray[np.bool_], score_D: NDArray[np.float32], thresholds: Sequence[float]
) -> list[dict[str, float]]:
    """Return the effect of each threshold on one label.

    Args:
        positive_D: Whether the label holds for each document, (D,).
        score_D: Score of the label, (D,).
        thresholds: A document is selected if its score is at least the threshold.

    Returns:
        One row per threshold: threshold, taken (share of documents that are selected), precision, recall, f1, and the
        numbers of false positives and false negatives.
    """
    rows = []
    for threshold in thresholds:
        taken_D = score_D >= np.float32(threshold)
        true, false, missed = (
            int(both.sum()) for both in (taken_D & positive_D, taken_D & ~positive_D, ~taken_D & positive_D)
        )
        rows.append(
            {
                "threshold": float(threshold),
                "taken": float(taken_D.mean()),
                "precision": true / max(true + false, 1),
                "recall": true / max(true + missed, 1),
                "f1": 2 * true / max(2 * true + false + missed, 1),
                "false positives": false,
                "false negatives": missed,
            }
        )
    return rows


def _shown_labels(decision: DecisionSettings) -> Sequence[int]:
    """Return the labels that have curves, by index. For kind binary, this is only the positive label."""
    return [1] if decision.kind == "binary" else range(len(decision.labels))


def _positives(data: ReportData, column: int) -> NDArray[np.bool_]:
    if data.decision.kind == "multilabel":
        return np.asarray(data.targets[:, column] == 1)
    return np.asarray(data.targets == column)


def _label(data: ReportData, column: int) -> str:
    """Return the section of one label: curves, threshold costs, calibration and histogram."""
    label, positive_D, score_D = data.decision.labels[column], _positives(data, column), data.scores_DL[:, column]
    heading = f"Label {label}: {int(positive_D.sum()):,} of {len(positive_D):,} rows"
    if positive_D.all() or not positive_D.any():
        return _section(heading, "<p>All rows have the same value for this label, so there is no curve.</p>")
    threshold = thresholds_by_label(data.decision).get(label)
    found = curve(positive_D, score_D)
    mark = None if threshold is None else int(np.searchsorted(-found["threshold"], -threshold, side="right")) - 1
    points, error = reliability(positive_D, score_D)
    bins = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    counts = [np.histogram(score_D[chosen], bins)[0] for chosen in (positive_D, ~positive_D)]
    plots = [
        line_plot("precision over recall", "recall", [(found["recall"], found["precision"])], mark=mark),
        line_plot("ROC", "false positive rate", [(found["false_positive_rate"], found["recall"])], mark=mark),
        line_plot(
            f"calibration, expected error {error:.3f}", "mean score", [(points[:, 0], points[:, 1])], diagonal=True
        ),
        histogram_plot(f"scores: {label} (blue), others (orange)", counts),
    ]
    marked = threshold if threshold != NEVER else None
    grid = sorted({round(0.1 * step, 1) for step in range(1, 10)} | ({marked} if marked is not None else set()))
    rounded = f"<p>Scores were rounded to 1e-{SCORE_DECIMALS} for the curves.</p>" * (len(score_D) > EXACT_SCORES)
    note = "" if marked is None else f"<p>The dot and the bold row mark the current threshold, {marked:.4g}.</p>"
    if threshold == NEVER:
        note = "<p>The label is never assigned, because no threshold keeps what was promised for it.</p>"
    costs = _rows(threshold_costs(positive_D, score_D, grid), bold=None if marked is None else grid.index(marked))
    return _section(heading, f"<div class=plots>{''.join(plots)}</div>{rounded}{note}{costs}")


def _confusion(data: ReportData) -> str:
    if data.decisions.label_D is None:
        return ""
    labels = data.decision.labels
    matrix = confusion_matrix(data.targets.astype(np.int64), data.decisions.label_D, len(labels))
    undecided = bool(matrix[:, -1].any())
    names = [*labels, *(["none"] if undecided else [])]
    head = "".join(f"<th>{_text(name)}</th>" for name in ("truth \\ predicted", *names, "recall"))
    body = ""
    for row, label in enumerate(labels):
        counts, total = matrix[row], max(int(matrix[row].sum()), 1)
        cells = "".join(
            f'<td style="--share:{counts[column] / total:.3f}" class=heat>{counts[column]:,}</td>'
            for column in range(len(names))
        )
        body += f"<tr><th>{_text(label)}</th>{cells}<td class=after>{counts[row] / total:.3f}</td></tr>"
    return _section("Confusion", f"<table><tr>{head}</tr>{body}</table>")


def _learning(data: ReportData) -> str:
    losses = np.asarray(data.losses, float)
    steps = np.arange(1, len(losses) + 1, dtype=float)
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    plots = [line_plot(f"loss, mean of {width} steps", "step", [(steps[width - 1 :], smooth)], unit=False)]
    names = [
        name for name, value in (data.evaluations[0] if data.evaluations else {}).items() if isinstance(value, float)
    ]
    for name in names[:3]:
        at = [(e["step"], e[name]) for e in data.evaluations if e.get(name) is not None]
        if at:
            x, y = np.asarray(at, float).T
            plots.append(line_plot(f"valid {name}", "step", [(x, y)], unit=False, dots=True))
    return f"<div class=plots>{''.join(plots)}</div>"


def _values(data: ReportData) -> str:
    assert data.decisions.value_D is not None
    truth, value = data.targets.astype(float), data.decisions.value_D.astype(float)
    chosen = np.linspace(0, len(truth) - 1, min(len(truth), MOST_POINTS)).astype(int)
    drawn = line_plot(
        "predicted over truth", "truth", [(truth[chosen], value[chosen])], unit=False, dots=True, line=False
    )
    return f"<div class=plots>{drawn}</div>"


def _documents(data: ReportData) -> str:
    wrong_D = _wrongness(data)
    most_wrong = [row for row in np.argsort(-wrong_D, kind="stable")[:MOST_DOCUMENTS] if wrong_D[row] > 0]
    longest = np.argsort(-data.num_tokens_D, kind="stable")[:MOST_DOCUMENTS]
    about = "The error is the distance between the scores of a document (regression: its value) and the truth."
    return (
        f"<p>{about}</p><h3>Largest errors</h3>{_rows([_document(data, row, wrong_D) for row in most_wrong])}"
        f"<h3>Longest</h3>{_rows([_document(data, row, wrong_D) for row in longest])}"
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
    names = data.decision.labels
    if data.decision.kind == "regression":
        truth: Any = float(data.targets[row])
    elif data.decision.kind == "multilabel":
        truth = ", ".join(name for name, holds in zip(names, data.targets[row], strict=True) if holds) or "none"
    else:
        truth = names[int(data.targets[row])]
    scores = ", ".join(
        f"{name} {score:.3f}" for name, score in zip(names or ["value"], data.scores_DL[row], strict=True)
    )
    shown = {
        "document": data.name_of(int(row)),
        "tokens": int(data.num_tokens_D[row]),
        "truth": truth,
        "scores": scores,
        "error": float(wrong_D[row]),
    }
    return shown if data.text_of is None else {**shown, "text": data.text_of(int(row))[:300]}


def _flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten metrics: the metrics of each label become one entry, which names the label."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            for label, inner in value.items():
                found[f"label {label}"] = ", ".join(f"{key} {_shown(number)}" for key, number in inner.items())
        else:
            found[name] = "undefined" if value is None else value
    return found


def _section(name: str, body: str) -> str:
    return f"<section><h2>{_text(name)}</h2>{body}</section>"


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(_shown(value))}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def _rows(rows: Sequence[Mapping[str, Any]], *, bold: int | None = None) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{_text(name)}</th>" for name in rows[0])
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{_text(_shown(value))}</td>" for value in row.values())
        body += f"<tr{' class=bold' if number == bold else ''}>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    return str(value)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
