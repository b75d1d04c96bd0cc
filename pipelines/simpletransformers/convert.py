"""Convert a folder of Simple Transformers, or any Hugging Face classifier, into a finished model folder.

Pickled weights are read with torch's weights-only unpickler, which refuses everything that could run code. Imports no
Ray.
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

from pipelines.errors import ModelFolderError, OutputError, SettingsError, first_line
from pipelines.model.scorer import plan_of
from pipelines.model.weights import row_limit
from pipelines.model_folder import PIPELINE_FILE, ModelFolder, seal
from pipelines.settings import DecisionSettings, Kind, WindowSettings
from pipelines.simpletransformers.arguments import ClassificationArgs, MultiLabelClassificationArgs
from pipelines.simpletransformers.translate import count_labels, decision_settings, resolve_args, window_settings
from pipelines.text.pretrained import quiet_transformers, save_tokenizer

KINDS_OF_PROBLEMS: dict[str, Kind] = {"multi_label_classification": "multilabel", "regression": "regression"}


def convert(old: str, new: str, kind: Kind | None = None) -> ModelFolder:
    """Convert the folder old into a model folder at new. The folder new is written completely or not at all.

    A folder with model_args.json keeps its arguments and the windows of Simple Transformers. The folder old does not
    change.

    Args:
        old: Folder of Simple Transformers, or of a Hugging Face classifier.
        new: Folder to create.
        kind: Meaning of the logits. None means that model_args.json or config.json defines it.

    Raises:
        ModelFolderError: old is not a classifier, cannot be read, or is a finished model folder already.
        OutputError: new exists and is not empty.
        SettingsError: kind is unknown, is needed, or does not fit the model.
    """
    if kind is not None and kind not in get_args(Kind):
        raise SettingsError(f"--kind {kind} is not one of: {', '.join(get_args(Kind))}")
    target = Path(new)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{new} exists and is not empty; give a new folder")
    if (Path(old) / PIPELINE_FILE).is_file():
        raise ModelFolderError(f"{old} is a finished model folder already; there is nothing to convert")
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
        raise ModelFolderError(f"{old} has no config.json, so it is not a Hugging Face model folder")
    try:
        with quiet_transformers():
            module, info = AutoModelForSequenceClassification.from_pretrained(
                old, weights_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except pickle.UnpicklingError as error:
        raise ModelFolderError(f"the pickle in {old} is refused: it contains objects other than tensors") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelFolderError(f"{old} cannot be read: {first_line(error)}") from error
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
            f"{old} has {module.config.num_labels} logits, which does not fit kind {kind or decision.kind}; "
            f"give the kind with --kind: {', '.join(get_args(Kind))}"
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
    """Return the decision by config.json.

    If it has no problem_type, the number of logits defines the kind. With more than two logits this is not possible,
    because the kind may be multiclass or multilabel.
    """
    kind = kind or KINDS_OF_PROBLEMS.get(config.problem_type or "")
    if kind is None and config.problem_type is None and config.num_labels > 2:
        raise SettingsError(f"{old}/config.json does not say what its labels mean; add --kind multiclass or multilabel")
    if kind is None:
        kind = {1: "regression", 2: "binary"}.get(config.num_labels, "multiclass")  # type: ignore[assignment]
    assert kind is not None
    labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    return DecisionSettings(kind=kind, labels=() if kind == "regression" else labels)
