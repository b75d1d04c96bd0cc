"""A folder of Simple Transformers, or any Hugging Face classifier, into a finished model folder.

A pickle of weights is read by torch's unpickler of tensors alone, which refuses anything that could run. Knows no ray.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForSequenceClassification

from pipelines.arguments import ClassificationArgs, MultiLabelClassificationArgs
from pipelines.errors import ModelFolderError, OutputError, SettingsError
from pipelines.model import row_limit
from pipelines.model_folder import PIPELINE_FILE, ModelFolder, seal
from pipelines.pretrained import quiet_transformers, save_tokenizer
from pipelines.scoring import plan_of
from pipelines.settings import DecisionSettings, Kind, WindowSettings
from pipelines.translation import count_labels, decision_settings, resolve_args, window_settings

KINDS_OF_PROBLEMS: dict[str, Kind] = {"multi_label_classification": "multilabel", "regression": "regression"}


def convert(old: str, new: str, kind: Kind | None = None) -> ModelFolder:
    """Write a model folder at new, which appears whole or not at all; old stays as it is.

    A folder with model_args.json keeps its arguments and the windows of Simple Transformers; for any other, kind says
    what its logits mean where config.json does not. Raises ModelFolderError for what is no classifier.
    """
    if kind is not None and kind not in get_args(Kind):
        raise SettingsError(f"--kind {kind} is none of: {', '.join(get_args(Kind))}")
    target = Path(new)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{new} is there and not empty; name a new folder")
    if (Path(old) / PIPELINE_FILE).is_file():
        raise ModelFolderError(f"{old} is a finished model folder already")
    module = _load(old)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        folder = _write(module, old, partial, kind)
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return ModelFolder(**{**vars(folder), "path": target})


def _load(old: str) -> Any:
    if not (Path(old) / "config.json").is_file():
        raise ModelFolderError(f"{old} has no config.json, so it is no Hugging Face model folder")
    try:
        with quiet_transformers():
            module, info = AutoModelForSequenceClassification.from_pretrained(
                old, weights_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except pickle.UnpicklingError as error:
        raise ModelFolderError(f"the pickle in {old} holds more than tensors and may be hostile; refused") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelFolderError(f"{old} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelFolderError(f"{old} lacks weights of the classifier ({missing}); fine-tune it first")
    return module


def _write(module: Any, old: str, folder: Path, kind: Kind | None) -> ModelFolder:
    tokenizer = save_tokenizer(old, folder)
    if (Path(old) / "model_args.json").is_file():
        windows, decision, args = _of_simpletransformers(old, module.config.num_labels, kind)
        args.save(str(folder))
    else:
        windows, decision = WindowSettings(), _decision_of(module.config, kind, old)
    if decision.num_labels != module.config.num_labels or (kind is not None and decision.kind != kind):
        raise SettingsError(
            f"{old} has {module.config.num_labels} logits, which is {decision.kind} and not {kind or decision.kind}"
        )
    plan = plan_of(windows, tokenizer, model_type=module.config.model_type, model_limit=row_limit(module))
    windows = WindowSettings(**{**vars(windows), "max_length": plan.max_length})
    with quiet_transformers():
        module.save_pretrained(folder)
    return seal(ModelFolder(folder, windows, decision))


def _of_simpletransformers(
    old: str, num_labels: int, kind: Kind | None
) -> tuple[WindowSettings, DecisionSettings, ClassificationArgs]:
    saved = json.loads((Path(old) / "model_args.json").read_text())
    is_multilabel = (
        saved.get("model_class") == "MultiLabelClassificationModel" if kind is None else kind == "multilabel"
    )
    args = resolve_args(MultiLabelClassificationArgs if is_multilabel else ClassificationArgs, old, None)
    args.model_class = "MultiLabelClassificationModel" if is_multilabel else "ClassificationModel"
    if kind is not None:
        args.regression = kind == "regression"
    if len(args.labels_list) != num_labels:
        args.labels_list, args.labels_map = [], {}
    count_labels(args, None if args.regression else num_labels, is_multilabel=is_multilabel)
    model_type = args.model_type if args.model_type != "auto" else None
    return window_settings(args, model_type), decision_settings(args, num_labels, is_multilabel=is_multilabel), args


def _decision_of(config: Any, kind: Kind | None, old: str) -> DecisionSettings:
    """From config.json; how many logits there are settles what it leaves open, but for one and several labels."""
    kind = kind or KINDS_OF_PROBLEMS.get(config.problem_type or "")
    if kind is None and config.problem_type is None and config.num_labels > 2:
        raise SettingsError(f"{old}/config.json does not say what its labels are; add --kind multiclass or multilabel")
    if kind is None:
        kind = {1: "regression", 2: "binary"}.get(config.num_labels, "multiclass")  # type: ignore[assignment]
    assert kind is not None
    labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    return DecisionSettings(kind=kind, labels=() if kind == "regression" else labels)
