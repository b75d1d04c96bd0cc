"""The files of a model folder: which there are, where they come from, and their hashes.

A folder at a URL or on the Hugging Face Hub is first copied to a local cache. Imports neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.errors import ModelFolderError, first_line
from pipelines.storage.locations import absolute, filesystem_of, retried, shown, store_errors

PIPELINE_FILE = "pipeline.json"
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
ASIDE = ".saving-"
"""Start of the name of a folder with files that are being saved. It is left behind if the process is killed."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "bpe.codes", "openvino_model.*")
"""The files that are fetched from the Hugging Face Hub. There is no pickle and no code among them."""


def model_location(value: str) -> str:
    """Return a model's location as an absolute path. URLs, and names on the Hugging Face Hub, are unchanged."""
    return value if is_hub_name(value) else absolute(value)


def is_hub_name(value: str) -> bool:
    """Whether a location can only be a name on the Hugging Face Hub: it is no path on this machine, and no URL."""
    return HUB_NAME.fullmatch(value) is not None and not Path(value).exists()


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
    target = cache / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # one process per machine copies, the others wait
            if not target.is_dir():
                _fetch(filesystem, sorted(files), target, location)
    return target


def cache_folder() -> Path:
    """Return the folder of this machine's copies and conversions of models: in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ray-text-classification"


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


def check_weights(path: Path) -> None:
    """Raise ModelFolderError unless the folder has a config.json and safetensors weights."""
    if (path / ADAPTER_CONFIG).is_file():
        raise ModelFolderError(f"{path} is a LoRA adapter; merge it into its model: pipelines convert {path} NEW")
    if not (path / "config.json").is_file():
        raise ModelFolderError(f"{path} has no config.json, so it is not a Hugging Face model folder")
    if any(path.glob("*.safetensors")):
        _check_shards(path)
        return
    if has_openvino(path):
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


def has_openvino(path: Path) -> bool:
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


def hash_weights(path: Path) -> str:
    """Return the SHA-256 over names and contents of config.json, the weights and the tokenizer files."""
    digest = hashlib.sha256()
    for name in hashed_names(path):
        digest.update(f"{name}\0{file_sha256(path / name)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def hashed_names(path: Path) -> list[str]:
    names = {file.name for file in path.glob("*.safetensors")} | {"config.json"}
    if has_openvino(path):
        names.update(OPENVINO_FILES)
    return sorted(names | {name for name in (*TOKENIZER_FILES, SHARD_INDEX) if (path / name).is_file()})
