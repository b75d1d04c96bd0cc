"""The model card: README.md of a model folder, with the metadata that the Hugging Face Hub reads.

It contains what pipeline.json knows: task, labels, thresholds, training data, metrics and limits, and how the model is
used with this package and with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.settings import NEVER

CARD = "README.md"
MARK = "<!-- Written by ray-text-classification from pipeline.json. Remove this line to keep your own changes. -->"
"""A card without this line is not replaced."""


def write_card(folder: Path, content: Mapping[str, Any]) -> None:
    """Write or replace the card of a model folder. A card that somebody has changed is kept.

    Args:
        folder: The model folder.
        content: Content of its pipeline.json.
    """
    file = folder / CARD
    if not file.exists() or MARK in file.read_text("utf-8", "replace"):
        partial = folder / f".{CARD}.partial"
        partial.write_text(card_of(content), "utf-8")
        partial.replace(file)


def card_of(content: Mapping[str, Any]) -> str:
    """Return the card of a model, given the content of its pipeline.json.

    The folder's name is not in it: folders are written under another name first.
    """
    parts = [
        f"---\n{_metadata(content)}\n---\n{MARK}",
        f"# {_title(content)}",
        _about(content),
        _labels(content),
        _metrics(content),
        _limits(content),
        _use(content),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(content: Mapping[str, Any]) -> str:
    """Return a title with the kind and the first labels."""
    labels = content["decision"]["labels"]
    more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
    names = " ".join(f": {', '.join(labels[:4])}{more}".split()) if labels else ""
    return f"{content['decision']['kind'].capitalize()} text model{names}"


def _metadata(content: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base = str(content["training"].get("model", ""))
    metrics = {key: value for key, value in content["metrics"].items() if isinstance(value, float)}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="validation",
            dataset_name="validation data of the training",
            metric_type=key,
            metric_value=value,
        )
        for key, value in metrics.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["ray-text-classification", content["decision"]["kind"]],
        base_model=base if _is_on_hub(base) else None,
        model_name=_title(content) if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _is_on_hub(base: str) -> bool:
    """Whether the name of a base model is one of the Hub. Paths of this machine do not belong into a card."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None and base[0] != "." and not Path(base).exists()


def _about(content: Mapping[str, Any]) -> str:
    decision, windows, training = content["decision"], content["windows"], content["training"]
    kinds = {
        "binary": "A binary text classifier",
        "multiclass": "A text classifier that gives each text one label",
        "multilabel": "A text classifier that gives each text any number of labels",
        "regression": "A model that gives each text a number",
    }
    text = kinds[decision["kind"]]
    if training:
        base = training["model"]
        name = f"`{base}`" if _is_on_hub(base) else f"weights in a folder `{Path(base).name}`"
        text += f", fine-tuned from {name} on {training['documents']:,} documents "
        text += f"(fingerprint `{training['fingerprint']}`)"
    length = windows["max_length"] or "up to 512"
    if windows["sliding_window"]:
        text += f".\nTexts of any length are read in windows of {length} tokens, whose scores are merged by "
        text += f"`{decision['merge']}`."
    else:
        text += f".\nOnly the first {length} tokens of a text are read."
    if content["reads_pairs"]:
        text += " It reads pairs of texts; the second text is the one that is cut into windows."
    if content["quantization"]:
        text += "\nIts weights are int8, for CPUs."
    return text


def _labels(content: Mapping[str, Any]) -> str:
    decision, per_label = content["decision"], _per_label(content)
    labels = decision["labels"]
    if not labels:
        return ""
    given = decision["thresholds"]
    with_threshold = labels[-1:] if decision["kind"] == "binary" else labels
    values = given if isinstance(given, (list, tuple)) else [given] * len(with_threshold)
    thresholds = dict(zip(with_threshold, values, strict=False))
    columns = {"precision": "precision", "recall": "recall", "support": "rows"} if per_label else {}
    lines = ["## Labels", "", f"| {' | '.join(['label', 'threshold', *columns.values()])} |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for label in labels:
        cells = [thresholds.get(label), *(per_label.get(label, {}).get(name) for name in columns)]
        lines.append(f"| {_cell(label)} | {' | '.join(map(_number, cells))} |")
    return "\n".join(lines)


def _per_label(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return precision, recall and support of each label. Those of a binary model come from its four counts."""
    metrics, labels = content["metrics"], content["decision"]["labels"]
    if content["decision"]["kind"] != "binary" or not {"tp", "tn", "fp", "fn"} <= metrics.keys():
        return dict(metrics.get("per_label", {}))
    tp, tn, fp, fn = (metrics[name] for name in ("tp", "tn", "fp", "fn"))
    return {
        label: {
            "precision": hits / (hits + wrong) if hits + wrong else None,
            "recall": hits / (hits + missed) if hits + missed else None,
            "support": hits + missed,
        }
        for label, hits, wrong, missed in ((labels[0], tn, fn, fp), (labels[1], tp, fp, fn))
    }


def _metrics(content: Mapping[str, Any]) -> str:
    measured = content["measured"]
    metrics = {name: value for name, value in content["metrics"].items() if isinstance(value, (int, float))}
    if not metrics:
        return ""
    lines = ["## Metrics", ""]
    if measured:
        lines += [f"On {measured['documents']:,} validation documents (fingerprint `{measured['fingerprint']}`):", ""]
    lines += ["| metric | value |", "|---|---|", *(f"| {name} | {_number(value)} |" for name, value in metrics.items())]
    if content["guarantees"]:
        found = content["guarantees"]
        lines += ["", f"Promised: {found['objective']} with confidence {found['confidence']:g}."]
    return "\n".join(lines)


def _limits(content: Mapping[str, Any]) -> str:
    lines = [
        "## Limits",
        "",
        "- The metrics hold for texts like the validation data. Watch other data with `pipelines drift`.",
        "- Best weights and thresholds were chosen on the validation data, so its metrics are slightly too good. "
        "Measure on rows that the training has not seen: `pipelines evaluate`.",
    ]
    if not content["metrics"]:
        lines[2:] = ["- It was not measured: there was no validation data. Measure it with `pipelines evaluate`."]
    if content.get("temperature", 1.0) != 1.0 or content.get("scales"):
        lines.append("- Its scores are calibrated. transformers does not do that: its scores differ.")
    return "\n".join(lines)


def _use(content: Mapping[str, Any]) -> str:
    lines = [
        "## Use",
        "",
        "```python",
        "import pipelines  # pip install ray-text-classification",
        "",
        'pipelines.Scorer.load("THIS_FOLDER").predict(["a text of any length"]).to_pandas()',
        "```",
        "",
        "```bash",
        "pipelines score THIS_FOLDER --input texts/ --output scored/",
        "pipelines serve THIS_FOLDER --local",
        "```",
    ]
    if not content["quantization"]:
        lines += [
            "",
            "With transformers, which reads only the beginning of a text and uses no thresholds:",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            'pipeline("text-classification", model="THIS_FOLDER", truncation=True)("a short text")',
            "```",
        ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if value == NEVER:
        return "never"
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
