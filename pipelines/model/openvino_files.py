"""Convert a classifier to OpenVINO's format, check it against PyTorch, and keep it in a cache on this machine.

OpenVINO compiles a model for the CPUs of Intel and AMD. It is an extra of this package (`[openvino]`).
A conversion takes a few seconds and needs PyTorch and transformers. The cache is used without both, so that a job or a
server on a machine that knows the model starts sooner. Cached are also the reasons why a model cannot be converted.

Imports torch and transformers only where a model is converted.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from pipelines.errors import ModelFolderError, first_line, is_out_of_memory
from pipelines.model.engine import padded
from pipelines.model.first_token import keep_first_token
from pipelines.model.openvino_model import OpenVinoDetails, OpenVinoModel, openvino
from pipelines.model_files import OPENVINO_FILES, cache_folder
from pipelines.model_folder import ModelFolder
from pipelines.settings import ComputeSettings
from pipelines.storage.locations import sync_folder

if TYPE_CHECKING:
    from pipelines.model.window_model import WindowModel
    from pipelines.text.template import Template

logger = logging.getLogger(__name__)
GRAPH, WEIGHTS, DETAILS = OPENVINO_FILES
REFUSED = "refused.json"
MASK = 3
"""Number of the input of an attention that is its mask."""
LOWEST_SCORE = -1e30
"""Score of what a token must not attend to. In bfloat16 too it is finite."""
CONVERSION = 4
"""Number of the way in which models are converted. It is part of the cache's keys."""
MOST_KEPT = 8
"""Number of models in the cache. The one that was not used for the longest time is removed first."""
LONGEST_CHECKED = 512
"""Tokens up to which every conversion is checked. Longer windows of a folder are checked, too."""
MOST_DIFFERENT = 1e-3
"""Largest difference from PyTorch, in float32, as a share of the largest logit or of the spread of the logits."""


class CannotConvertError(Exception):
    """The model does not run in OpenVINO, or gives other logits there."""


def is_installed() -> bool:
    """Whether OpenVINO is installed."""
    try:
        importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def converted(folder: ModelFolder, template: Template, *, must: bool = False) -> Path:
    """Return a folder with the converted model, from the cache or converted now.

    Args:
        folder: A finished model folder whose weights are verified.
        template: Special tokens and padding of its tokenizer.
        must: Whether to try again to convert a model that was refused before.

    Raises:
        CannotConvertError: The model does not run in OpenVINO, or not in the same way.
        ModelFolderError: The model cannot be opened.
    """
    try:
        place = cache_folder() / "openvino" / _key(folder)
    except RuntimeError as error:
        raise CannotConvertError(f"this user has no home folder for its cache ({error}); set XDG_CACHE_HOME") from error
    if not _is_complete(place) or (must and (place / REFUSED).is_file()):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):  # one process of the machine converts, and the others wait
                if must and (place / REFUSED).is_file():
                    shutil.rmtree(place)
                if not _is_complete(place):
                    _convert_into(place, folder, template)
                    _remove_oldest(place.parent)
        except OSError as error:
            raise CannotConvertError(
                f"its cache {place.parent} cannot be written ({first_line(error)}); set XDG_CACHE_HOME"
            ) from error
    if (place / REFUSED).is_file():
        raise CannotConvertError(json.loads((place / REFUSED).read_text())["reason"])
    with suppress(OSError):  # a cache that belongs to another user, or is read-only
        os.utime(place)
    return place


def read_details(path: Path) -> OpenVinoDetails:
    """Read what is known of a converted model. Raises ModelFolderError if this cannot be read."""
    try:
        return OpenVinoDetails(**json.loads((path / DETAILS).read_text())["details"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelFolderError(f"{path / DETAILS} cannot be read: {error!r}; copy the folder again") from error


def write_model(model: Any, details: OpenVinoDetails, path: Path) -> None:
    """Write a model of OpenVINO with its details into an existing folder. Raises OSError if it cannot be written."""
    try:
        openvino().save_model(model, str(path / GRAPH), compress_to_fp16=False)
    except RuntimeError as error:  # OpenVINO's only error for a full disk, too
        raise OSError(first_line(error)) from error
    sizes = {name: (path / name).stat().st_size for name in (GRAPH, WEIGHTS)}
    (path / DETAILS).write_text(json.dumps({"details": asdict(details), "sizes": sizes}, indent=2) + "\n")


def _key(folder: ModelFolder) -> str:
    versions = [importlib.metadata.version(name) for name in ("openvino", "torch", "transformers")]
    longest_checked = max(folder.windows.max_length or 0, LONGEST_CHECKED)
    identity = json.dumps([folder.weights_hash, versions, CONVERSION, longest_checked])
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def _is_complete(place: Path) -> bool:
    """Whether the cache has a model, or the reason why there is none. A file that was cut is no model."""
    if (place / REFUSED).is_file():
        return True
    try:
        sizes: Mapping[str, int] = json.loads((place / DETAILS).read_text())["sizes"]
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert_into(place: Path, folder: ModelFolder, template: Template) -> None:
    """Convert a model into a new folder of the cache, or write down why it cannot be converted."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".converting-") as scratch:
        path = Path(scratch) / "model"
        path.mkdir()
        try:
            model = torch_model(folder, template)
            graph = convert(model, longest=folder.windows.max_length or 0)
            write_model(graph, details_of(model), path)
        except CannotConvertError as error:
            (path / REFUSED).write_text(json.dumps({"reason": str(error)}))
        sync_folder(path)
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)


def _remove_oldest(cache: Path) -> None:
    """Remove the models that were not used for the longest time. Processes that have them open keep them."""
    places = sorted((place for place in cache.iterdir() if place.is_dir() and not place.name.startswith(".")),
                    key=lambda place: place.stat().st_mtime)  # fmt: skip
    for place in places[:-MOST_KEPT]:
        shutil.rmtree(place, ignore_errors=True)


def torch_model(folder: ModelFolder, template: Template) -> WindowModel:
    """Open the model of a folder in PyTorch, in float32 on the CPU, without packing."""
    from pipelines.model.window_model import load_model

    compute = ComputeSettings(dtype="float32", device="cpu", packing="off")
    return load_model(folder.path, template, compute, num_labels=folder.decision.num_labels)


def details_of(model: WindowModel) -> OpenVinoDetails:
    """Describe a model that has been converted."""
    assert model.padding_side is not None
    return OpenVinoDetails(
        model.num_labels,
        model.model_type,
        model.vocabulary,
        model.row_limit,
        model.pad_id,
        model.padding_side,
        takes_type_ids=model.takes_type_ids,
        uses_type_ids=model.uses_type_ids,
    )


def convert(model: WindowModel, *, longest: int = 0) -> Any:
    """Convert a model, and compare the logits of windows of different lengths with those of PyTorch, in float32.

    Args:
        model: The model in PyTorch, in float32.
        longest: Tokens of the longest windows of its folder. Windows up to LONGEST_CHECKED are compared in any case.

    Raises:
        CannotConvertError: The model cannot be converted, or has other logits in OpenVINO.
    """
    from pipelines.model.probes import FAILURES, probe_rows  # loads torch
    from pipelines.model.weights import longrope_turn

    failures: tuple[type[Exception], ...] = (*FAILURES, *_conversion_failures(), ModelFolderError)
    config: Any = model.module.config
    if model.padding_side is None or config.is_encoder_decoder:
        raise CannotConvertError(f"{model.model_type} cannot run windows of different lengths in one padded batch")
    turn = longrope_turn(config)
    if turn is not None and (longest or model.row_limit or sys.maxsize) > turn:
        raise CannotConvertError(
            f"{model.model_type} reads windows of more than {turn} tokens in another way (longrope)"
        )
    limit = (model.row_limit or sys.maxsize) - model.template.num_special_tokens(pair=False)
    usual = list(dict.fromkeys(min(length, limit) for length in (7, LONGEST_CHECKED, 33, 4, 130)))
    batches = [usual, *([[min(longest, limit)]] if longest > LONGEST_CHECKED else [])]
    try:
        graph = _traced(model)
        compiled = OpenVinoModel.compile(graph, details_of(model), model.template, ComputeSettings(dtype="float32"))
        rows = [probe_rows(model, lengths) for lengths in batches]
        found_WL, expected_WL = (np.concatenate(list(map(one.run, rows))) for one in (compiled, model))
    except failures as error:
        if is_out_of_memory(error):
            raise
        raise CannotConvertError(f"{model.model_type} cannot be converted: {first_line(error)}") from error
    spread = max(float(np.ptp(expected_WL, axis=0).max()), 1e-2 * float(np.abs(expected_WL).max()))
    worst = float(np.abs(found_WL - expected_WL).max())
    if not worst <= MOST_DIFFERENT * spread:
        raise CannotConvertError(
            f"{model.model_type} has other logits in OpenVINO than in PyTorch: they differ by up to {worst:.2g}"
        )
    return graph


def _conversion_failures() -> tuple[type[Exception], ...]:
    """Return the errors of OpenVINO's conversion. They have no common type but Exception."""
    frontend = importlib.import_module(f"{openvino().__name__}.frontend")
    names = ("OpConversionFailure", "OpValidationFailure", "NotImplementedFailure", "GeneralFailure")
    return tuple(getattr(frontend, name) for name in names)


def _traced(model: WindowModel) -> Any:
    """Convert the module by tracing a small batch. All sizes stay free."""
    import torch

    from pipelines.model.probes import probe_rows
    from pipelines.text.pretrained import quiet_transformers

    class Logits(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.module(input_ids=input_ids, attention_mask=attention_mask, **types).logits

    batch = padded(probe_rows(model), side=model.padding_side, pad_id=model.pad_id)
    inputs = {"input_ids": torch.from_numpy(batch.ids_WS), "attention_mask": torch.from_numpy(batch.mask_WS)}
    if model.takes_type_ids:
        inputs["token_type_ids"] = torch.from_numpy(batch.types_WS)
    with warnings.catch_warnings(), quiet_transformers(), torch.inference_mode(), _without_cache(model.module.config):
        warnings.simplefilter("ignore")  # of the tracer, about each condition on a size
        graph = openvino().convert_model(Logits(model.module), example_input=inputs)
    _with_finite_masks(graph)
    keep_first_token(graph)
    return graph


def _with_finite_masks(graph: Any) -> None:
    """Replace the masks of attention that are booleans by numbers.

    A token of the padding that is further from the text than a sliding window reaches attends to nothing. OpenVINO
    computes NaN for it if the mask has booleans, and the next layer spreads that.
    """
    ops, boolean = importlib.import_module(f"{openvino().__name__}.opset13"), openvino().Type.boolean
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and node.get_input_size() > MASK:
            mask = node.input(MASK).get_source_output()
            if mask.get_element_type() == boolean:
                numbers = ops.select(mask, np.float32(0), np.float32(LOWEST_SCORE))
                node.input(MASK).replace_source_output(numbers.output(0))
    graph.validate_nodes_and_infer_types()


@contextmanager
def _without_cache(config: Any) -> Iterator[None]:
    """Let decoders compute no keys and values for a next token."""
    parts = [part for part in (config, config.get_text_config()) if getattr(part, "use_cache", False)]
    for part in parts:
        part.use_cache = False
    try:
        yield
    finally:
        for part in parts:
            part.use_cache = True
