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
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.classifier_config import class_names, decision_of, is_classifier, read_config
from pipelines.errors import DataError, ModelFolderError, OutputError, SettingsError, first_line
from pipelines.fields import parse
from pipelines.settings import UNCALIBRATED, Calibration, DecisionSettings, WindowSettings
from pipelines.storage.locations import absolute, filesystem_of, retried, shown, store_errors, sync_folder

PIPELINE_FILE = "pipeline.json"
FORMAT_VERSION = 1
OWN_TOKENIZER, THEIR_TOKENIZER = "tokenizer.json", "transformers"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
)
OPENVINO_FILES = ("openvino_model.xml", "openvino_model.bin", "openvino_model.json")
"""Files of a model that was converted to OpenVINO: its graph, its weights, and what is known of it besides."""
SHARD_INDEX = "model.safetensors.index.json"
"""File that says which weight is in which of several files."""
RUN_FILE = "_run.json"
"""A training run that is not finished has this file in its output folder."""
ADAPTER_CONFIG = "adapter_config.json"
"""A folder with this file contains a LoRA adapter of peft."""
CALIBRATION = ("temperature", "scales", "biases")
"""Names in pipeline.json of what is in `Calibration`."""
ASIDE = ".saving-"
"""Start of the name of a folder with files that are being saved. It is left behind if the process is killed."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "bpe.codes", "openvino_model.*")
"""The files that are fetched from the Hugging Face Hub. There is no pickle and no code among them."""
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
    tokenizer: str = OWN_TOKENIZER
    """How the tokenizer is opened: from the tokenizer.json that this package wrote, or as transformers opens it."""

    @property
    def model_type(self) -> str:
        """Name of the architecture in config.json."""
        return str(read_config(self.path).get("model_type", ""))

    @property
    def settings_hash(self) -> str:
        """Hash of all settings that change a result. It does not include the weights."""
        return _sha256(json.dumps(self._settings(), sort_keys=True).encode())

    def guarantees_of(self, decision: DecisionSettings) -> Mapping[str, Any]:
        """Return what is promised of the thresholds of a decision. A warning says if they are not the folder's."""
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
    if not _has_openvino(path):
        check_weights(path)
    try:
        content = json.loads(file.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ModelFolderError(
                f"{file} has format version {version}; this version of pipelines reads {FORMAT_VERSION}"
            )
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
            content.get("tokenizer", OWN_TOKENIZER),
        )
    except (ValueError, KeyError, TypeError, AttributeError, SettingsError) as error:
        raise ModelFolderError(f"{file} cannot be read: {error!r}; it may have been edited by hand") from error


def _of_classifier(path: Path, where: str) -> ModelFolder:
    """Open a Hugging Face classifier without pipeline.json, with default windows and the labels of its config.json."""
    is_unfinished = (path / RUN_FILE).is_file() or any(path.glob(f"{ASIDE}*"))
    if is_unfinished or not ((path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()):
        raise ModelFolderError(
            f"{where} has no {PIPELINE_FILE}, so it is not a finished model folder; create one with `pipelines train`"
        )
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


def model_location(value: str) -> str:
    """Return a model's location as an absolute path. URLs, and names on the Hugging Face Hub, are unchanged."""
    return value if is_hub_name(value) else absolute(value)


def is_hub_name(value: str) -> bool:
    """Whether a location can only be a name on the Hugging Face Hub: it is no path on this machine, and no URL."""
    return HUB_NAME.fullmatch(value) is not None and not Path(value).exists()


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


def check_weights(path: Path) -> None:
    """Raise ModelFolderError unless the folder has a config.json and safetensors weights."""
    if (path / ADAPTER_CONFIG).is_file():
        raise ModelFolderError(f"{path} is a LoRA adapter; merge it into its model: pipelines convert {path} NEW")
    if not (path / "config.json").is_file():
        raise ModelFolderError(f"{path} has no config.json, so it is not a Hugging Face model folder")
    if any(path.glob("*.safetensors")):
        _check_shards(path)
        return
    if _has_openvino(path):
        raise ModelFolderError(
            f"{path} is an int8 model, which can be scored and served, but not changed or trained; use the folder that "
            f"it was made of"
        )
    pickles = [file.name for pattern in PICKLES for file in sorted(path.glob(pattern))]
    if pickles:
        raise ModelFolderError(
            f"{path} holds its weights as a pickle ({pickles[0]}), which can run code when it is opened; "
            f"convert it to safetensors: pipelines convert {path} NEW"
        )
    raise ModelFolderError(f"{path} has no *.safetensors weights")


def _has_openvino(path: Path) -> bool:
    """Whether a folder has no other weights than those of `pipelines quantize`."""
    return all((path / name).is_file() for name in OPENVINO_FILES) and not any(path.glob("*.safetensors"))


def _check_shards(path: Path) -> None:
    """Raise ModelFolderError if the index of sharded weights names a file that is not in the folder."""
    file = path / SHARD_INDEX
    if not file.is_file():
        return
    try:
        names = set(json.loads(file.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(f"{file} cannot be read: {error!r}; copy the folder again") from error
    wrong = [name for name in names if Path(str(name)).name != name or not (path / name).is_file()]
    if wrong:
        raise ModelFolderError(f"{file} names {wrong[0]!r}, which is not a file in the folder; copy the folder again")


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
    files = tuple((name, (path / name).stat()) for name in _hashed_names(path))
    key = tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files)
    if _HASHES.get(path, (None, ""))[0] != key:
        _HASHES[path] = (key, hash_weights(path))
    return _HASHES[path][1]


_HASHES: dict[Path, tuple[object, str]] = {}
"""The hashes that this process has computed, with the sizes and times of the files."""


def hash_weights(path: Path) -> str:
    """Return the SHA-256 over names and contents of config.json, the weights and the tokenizer files."""
    digest = hashlib.sha256()
    for name in _hashed_names(path):
        digest.update(f"{name}\0{file_sha256(path / name)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _hashed_names(path: Path) -> list[str]:
    names = {file.name for file in path.glob("*.safetensors")} | {"config.json"}
    if _has_openvino(path):
        names.update(OPENVINO_FILES)
    return sorted(names | {name for name in (*TOKENIZER_FILES, SHARD_INDEX) if (path / name).is_file()})


def local_folder(location: str) -> Path:
    """Return the local path of a model folder. A folder at a URL, or on the Hub, is first copied to a local cache.

    The folder is copied once. All its files appear together, because the copy is renamed when it is complete. Only the
    files directly in the folder are copied: the checkpoints of an unfinished run are in subfolders.

    Args:
        location: Local path, fsspec URL, or name on the Hugging Face Hub. The cache of URLs is in $XDG_CACHE_HOME
            (default ~/.cache).

    Raises:
        ModelFolderError: A local folder does not exist, a URL cannot be listed or has no files, or the Hub does not
            have the name.
    """
    if "://" not in location:
        path = Path(location).expanduser()
        return path.resolve() if path.is_dir() else _from_hub(location)
    cache = cache_folder()
    filesystem, remote = filesystem_of(location)
    with store_errors(ModelFolderError, f"{shown(location)} cannot be listed"):
        files = filesystem.find(remote, maxdepth=1, detail=True)
    if not files:
        raise ModelFolderError(f"{shown(location)} is empty or does not exist")
    identity = json.dumps([location, files], sort_keys=True, default=str)  # sizes, times and tags, if any
    target = cache / _sha256(identity.encode())[7:23]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # one process per machine copies, the others wait
            if not target.is_dir():
                _fetch(filesystem, sorted(files), target, location)
    return target


def cache_folder() -> Path:
    """Return the folder of this machine's copies and conversions of models: in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ray-text-classification"


def _from_hub(name: str) -> Path:
    """Return the local copy of a model of the Hugging Face Hub. transformers and the Hub's own library share it."""
    problem = f"{name} is not a folder; give a model folder that `pipelines train` wrote"
    if not HUB_NAME.fullmatch(name):
        raise ModelFolderError(problem)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelFolderError(f"{problem}, or a model of the Hugging Face Hub ({first_line(error)})") from error


def _fetch(filesystem: Any, files: Sequence[str], target: Path, location: str) -> None:
    """Copy a remote folder's files, check the hash of the weights, and rename the copy into place."""
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".fetch-"))
    try:
        places = [str(partial / posixpath.basename(file)) for file in files]
        retried(lambda: filesystem.get(list(files), places))
        file = partial / PIPELINE_FILE
        sealed = json.loads(file.read_text()).get("weights_hash") if file.is_file() else None
        if sealed and hash_weights(partial) != sealed:
            raise ModelFolderError(
                f"{shown(location)} has changed since it was written: its weights or tokenizer do not match the hash "
                f"in pipeline.json; upload the whole folder again"
            )
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
