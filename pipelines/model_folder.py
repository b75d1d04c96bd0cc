"""Read and write model folders. `train` writes them; `score` and `serve` read them.

A model folder is a Hugging Face folder (config.json, model.safetensors, tokenizer.json, ...) plus `pipeline.json`,
which says how texts are split into windows and how scores become labels. pipeline.json is written last and
atomically, so that a folder that contains it is complete. A Hugging Face classifier without pipeline.json opens with
the defaults. Weights are read from safetensors only; `pipelines.model` loads them.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.classifier_config import class_names, decision_of, is_classifier, read_config
from pipelines.errors import DataError, ModelFolderError, OutputError, SettingsError, first_line
from pipelines.fields import parse
from pipelines.model_card import write_card
from pipelines.model_files import (
    ADAPTER_CONFIG,
    ASIDE,
    PIPELINE_FILE,
    RUN_FILE,
    check_weights,
    has_openvino,
    hash_weights,
    hashed_names,
    local_folder,
)
from pipelines.settings import UNCALIBRATED, Calibration, DataSettings, DecisionSettings, WindowSettings
from pipelines.storage.locations import shown, sync_folder
from pipelines.version import VERSION

FORMAT_VERSION = 1
OWN_TOKENIZER, THEIR_TOKENIZER = "tokenizer.json", "transformers"
CALIBRATION = ("temperature", "scales", "biases")
"""Names in pipeline.json of what is in `Calibration`."""
COLUMNS = ("text_column", "text_pair_column", "label_column", "label_columns")
"""Settings of columns that a model folder remembers from its training."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFolder:
    """The content of pipeline.json, and the local path of the folder."""

    path: Path
    windows: WindowSettings
    decision: DecisionSettings
    calibration: Calibration = UNCALIBRATED
    metrics: Mapping[str, Any] = field(default_factory=dict)
    weights_hash: str = ""
    histograms: Mapping[str, Any] = field(default_factory=dict)
    """Score histograms of the validation data, by label (from `metrics.histograms_of`)."""
    reads_pairs: bool | None = None
    """Whether the model was trained on pairs of texts. None if this is unknown."""
    guarantees: Mapping[str, Any] = field(default_factory=dict)
    """What `tune --confidence` promises of the thresholds (`guarantees.Guarantees`). Empty without promises."""
    early_exit: Mapping[str, Any] = field(default_factory=dict)
    """The margin of `tune --early-exit` (`early_exit.Margin`). Empty without one."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """What `pipelines quantize` measured of its int8 model. Empty for a folder with float weights."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """The data of `metrics` and `histograms`: number of documents, and fingerprint. Empty if this is unknown."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """How the model was trained: base model, columns, settings, data (`training.fit`). Empty if this is unknown."""
    tokenizer: str = OWN_TOKENIZER
    """How the tokenizer is opened: from the tokenizer.json that this package wrote, or as transformers opens it."""

    def __repr__(self) -> str:
        windows = f"windows of {self.windows.max_length or 'up to 512'} tokens"
        metrics = [f"{name} {value:.4g}" for name, value in self.metrics.items() if isinstance(value, float)]
        valid = f"; valid {', '.join(metrics[:3])}" if metrics else ""
        return f"ModelFolder({self.path}; {self.decision}; {windows}, merge {self.decision.merge}{valid})"

    @property
    def model_type(self) -> str:
        """Name of the architecture in config.json."""
        return str(read_config(self.path).get("model_type", ""))

    @property
    def settings_hash(self) -> str:
        """Hash of all settings that change a result. It does not include the weights."""
        return _sha256(json.dumps(self._settings(), sort_keys=True).encode())

    def guarantees_of(self, decision: DecisionSettings, *, early_exit: str = "off") -> Mapping[str, Any]:
        """Return what is promised of the thresholds of a decision. A warning says why nothing is promised any more."""
        if self.guarantees and early_exit == "certified":
            logger.warning(
                "%s promises %s for texts that are read completely; early_exit=certified changes some labels, and "
                "nothing is promised of them",
                self.path.name, self.guarantees["objective"],
            )  # fmt: skip
            return {}
        if self.guarantees and decision != self.decision:
            logger.warning(
                "%s promises %s for its own thresholds; other thresholds are used, for which nothing is promised",
                self.path.name, self.guarantees["objective"],
            )  # fmt: skip
            return {}
        return self.guarantees

    def say_int8(self) -> None:
        """Log that the model is an int8 model, if it is one."""
        if self.quantization:
            logger.info(
                "%s is an int8 model for CPUs: %s of %s labels changed when it was made",
                self.path.name, self.quantization.get("label_changes"), self.quantization.get("documents"),
            )  # fmt: skip

    def check_texts(self, *, are_pairs: bool) -> None:
        """Check that the model was trained on the same kind of texts.

        Args:
            are_pairs: Whether the texts to score are pairs.

        Raises:
            DataError: The model was trained on pairs and the texts are single, or the other way round.
        """
        if self.reads_pairs and not are_pairs:
            raise DataError(
                "the model was trained on pairs of texts: give the second text too (text_pair, --text-pair-column)"
            )
        if self.reads_pairs is False and are_pairs:
            raise DataError(
                "the model was trained on single texts, but these are pairs: omit text_pair (--text-pair-column)"
            )

    def _settings(self) -> dict[str, Any]:
        return {
            "windows": dataclasses.asdict(self.windows),
            "decision": dataclasses.asdict(self.decision),
            **self._calibration(),
        }

    def _calibration(self) -> dict[str, Any]:
        """Return the calibration as in pipeline.json. Scales and biases are there only if there are some."""
        return {name: value for name, value in dataclasses.asdict(self.calibration).items() if value != ()}

    def to_json(self) -> dict[str, Any]:
        """Return the content of pipeline.json."""
        return {
            "format_version": FORMAT_VERSION,
            **self._settings(),
            "metrics": dict(self.metrics),
            "histograms": dict(self.histograms),
            "guarantees": dict(self.guarantees),
            "early_exit": dict(self.early_exit),
            "quantization": dict(self.quantization),
            "reads_pairs": self.reads_pairs,
            "measured": dict(self.measured),
            "training": dict(self.training),
            "tokenizer": self.tokenizer,
            "weights_hash": self.weights_hash,
            "settings_hash": self.settings_hash,
        }


def read_model_folder(location: str | Path) -> ModelFolder:
    """Read and check a finished model folder, or a Hugging Face classifier.

    Args:
        location: Local path, fsspec URL, or name on the Hugging Face Hub. A folder that is not on this machine is first
            copied to a local cache.

    Raises:
        ModelFolderError: The folder is missing or unfinished, has another format version, or has no safetensors.
        SettingsError: The folder has no pipeline.json, and its config.json does not define a kind.
    """
    path = local_folder(str(location))
    file = path / PIPELINE_FILE
    if not file.is_file():
        return _of_classifier(path, shown(str(location)))
    if not has_openvino(path):
        check_weights(path)
    try:
        content = json.loads(file.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ModelFolderError(_of_another_version(file, version, content.get("training", {})))
        (windows,) = parse(content["windows"], WindowSettings)
        (decision,) = parse(content["decision"], DecisionSettings)
        (calibration,) = parse({name: content[name] for name in CALIBRATION if name in content}, Calibration)
        if calibration.scales and len(calibration.scales) != decision.num_labels:
            raise SettingsError(f"there are {len(calibration.scales)} scales and {decision.num_labels} labels")
        return ModelFolder(
            path,
            windows,
            decision,
            calibration,
            content["metrics"],
            content["weights_hash"],
            content.get("histograms", {}),
            content.get("reads_pairs"),
            content.get("guarantees", {}),
            content.get("early_exit", {}),
            content.get("quantization", {}),
            content.get("measured", {}),
            content.get("training", {}),
            content.get("tokenizer", OWN_TOKENIZER),
        )
    except (ValueError, KeyError, TypeError, AttributeError, SettingsError) as error:
        raise ModelFolderError(f"{file} cannot be read: {error!r}; it may have been edited by hand") from error


def _of_another_version(file: Path, version: object, training: Mapping[str, Any]) -> str:
    """Return why a folder of another format version cannot be read."""
    problem = f"{file} has format version {version}, and this version of the package ({VERSION}) reads {FORMAT_VERSION}"
    if isinstance(version, int) and version > FORMAT_VERSION:
        newer = f"version {training['version']}" if "version" in training else "a newer version"
        return f"{problem}; upgrade to {newer}: pip install --upgrade ray-text-classification"
    return f"{problem}; train or convert the model again"


def with_columns_of_training(model: str, values: Mapping[str, Any], names: Sequence[str] = COLUMNS) -> dict[str, Any]:
    """Return settings with the columns on which a model was trained, for those that the settings do not name.

    Args:
        model: Model folder, a path or URL. If it cannot be read, nothing is added: opening it later says why.
        values: Settings by name.
        names: The settings to add.
    """
    try:
        columns = read_model_folder(model).training.get("columns", {})
    except (ModelFolderError, SettingsError):
        return dict(values)
    if "label_column" in values or "label_columns" in values:
        names = [name for name in names if not name.startswith("label")]
    found = {name: columns[name] for name in names if columns.get(name) and name not in values}
    usual = {field.name: field.default for field in dataclasses.fields(DataSettings)}
    if unusual := {name: value for name, value in found.items() if value != usual[name]}:
        logger.info("the columns are those of the training: %s", ", ".join(f"{k} {v}" for k, v in unusual.items()))
    return {**values, **found}


def _of_classifier(path: Path, where: str) -> ModelFolder:
    """Open a Hugging Face classifier without pipeline.json, with default windows and the labels of its config.json."""
    is_unfinished = (path / RUN_FILE).is_file() or any(path.glob(f"{ASIDE}*"))
    if is_unfinished or not ((path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()):
        has_run = (path / RUN_FILE).is_file()
        remedy = (
            "start its `pipelines train` again, which resumes it" if has_run else "create one with `pipelines train`"
        )
        raise ModelFolderError(f"{where} has no {PIPELINE_FILE}, so it is not a finished model folder; {remedy}")
    check_weights(path)
    config = read_config(path)
    if not is_classifier(config):
        raise ModelFolderError(
            f"{where} is a {class_names(config)[0]}, which has no classification head; fine-tune it first: "
            f"pipelines train --model {where}"
        )
    decision, is_guess = decision_of(config, where=where)
    weights_hash = hash_weights(path)
    folder = ModelFolder(path, WindowSettings(), decision, weights_hash=weights_hash, tokenizer=THEIR_TOKENIZER)
    if path not in _TOLD:
        _TOLD.add(path)
        guess = "" if not is_guess else " (or multilabel: config.json does not say)"
        logger.warning(
            "%s has no %s and opens with the defaults: kind %s%s, labels %s, windows of 512 tokens or the model's "
            "limit, stride %s, merge %s; `pipelines convert %s NEW` makes a model folder in which they can be changed",
            where, PIPELINE_FILE, decision.kind, guess, ", ".join(decision.labels) or "none", folder.windows.stride,
            decision.merge, where,
        )  # fmt: skip
    return folder


_TOLD: set[Path] = set()
"""Folders of which this process has said that they open with the defaults."""


def opens_as_transformers(path: Path) -> bool:
    """Whether a folder's tokenizer is opened as transformers opens it: that of a Hugging Face classifier.

    transformers takes some of its settings from other files than tokenizer.json, such as do_lower_case.
    """
    file = path / PIPELINE_FILE
    if file.is_file():
        return bool(json.loads(file.read_text()).get("tokenizer") == THEIR_TOKENIZER)
    return (path / "config.json").is_file()


def seal(folder: ModelFolder) -> ModelFolder:
    """Hash the weights and tokenizer files in folder.path, then write pipeline.json last and atomically.

    Returns:
        The folder with weights_hash set.
    """
    sealed = replace(folder, weights_hash=hash_weights(folder.path))
    sync_folder(folder.path)
    write_pipeline_file(sealed)
    return sealed


def write_pipeline_file(folder: ModelFolder) -> None:
    """Replace pipeline.json atomically. A reader sees the old or the new content, even if the writer is killed."""
    write_card(folder.path, json.loads(json.dumps(folder.to_json())))
    content = json.dumps(folder.to_json(), indent=2).encode() + b"\n"
    with tempfile.NamedTemporaryFile(dir=folder.path, prefix=".pipeline-", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, folder.path / PIPELINE_FILE)
    sync_folder(folder.path)


def check_is_new(new: str) -> Path:
    """Return the path of a folder to be made. Raises OutputError if it exists and is not an empty folder."""
    target = Path(new).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{new} exists and is not empty; give a new folder")
    return target


@contextmanager
def new_folder(new: str) -> Iterator[Path]:
    """Yield an empty folder, which gets its name when the block ends. After an error there is nothing.

    Args:
        new: Path of a folder that does not exist or is empty.

    Raises:
        OutputError: The folder exists and is not empty, or cannot be written.
    """
    target = check_is_new(new)
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        yield partial
        partial.chmod(0o755)
        partial.rename(target)  # replaces an empty folder
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{new} cannot be written: {first_line(error)}; give another folder") from error
        raise


def verify_weights(folder: ModelFolder) -> None:
    """Check that weights and tokenizer are those with which the folder was finished.

    The files are hashed once in each process, and again if they change.

    Raises:
        ModelFolderError: They have changed, or pipeline.json has no hash.
    """
    if not (folder.path / PIPELINE_FILE).is_file():  # a Hugging Face classifier: its hash is that of now
        return
    if _hash_of_now(folder.path) != folder.weights_hash:
        raise ModelFolderError(
            f"the weights or the tokenizer in {folder.path} are not those of its {PIPELINE_FILE}: they have changed "
            f"since the folder was finished; copy the whole folder again, or train or convert again"
        )


def _hash_of_now(path: Path) -> str:
    """Return `hash_weights`, from memory if no file has changed since it was computed."""
    files = tuple((name, (path / name).stat()) for name in hashed_names(path))
    key = tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files)
    if _HASHES.get(path, (None, ""))[0] != key:
        _HASHES[path] = (key, hash_weights(path))
    return _HASHES[path][1]


_HASHES: dict[Path, tuple[object, str]] = {}
"""The hashes that this process has computed, with the sizes and times of the files."""


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
