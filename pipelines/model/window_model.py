"""Run a Hugging Face sequence classifier on windows of different lengths, from weights to logits.

When a model is loaded, this module chooses its device, its dtype, and whether windows are packed or padded. It does not
use texts or label names. Imports no Ray.

Shapes: W windows, T tokens of all windows together, S tokens of the longest window, L labels.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.decisions.labels import Scaling
from pipelines.errors import ModelFolderError, first_line, is_out_of_memory
from pipelines.model.devices import resolve_device, resolve_dtype, to_device
from pipelines.model.engine import SHORTEST_STEP, Engine, Side, padded
from pipelines.model.lora import has_adapter, save_trained, trained_weights
from pipelines.model.packing import NAME as PACKED
from pipelines.model.packing import PackedRows, Packing, remove_hooks
from pipelines.model.precision import cast_body
from pipelines.model.probes import (
    attention_for_length,
    attention_name,
    attention_of,
    find_last_layer,
    find_padding_side,
    packed_if_equal,
)
from pipelines.model.weights import (
    OPENING_ERRORS,
    load_module,
    longrope_turn,
    pad_token_of,
    row_limit,
    safe_config,
    save_module,
    set_pad_token,
    vocabulary_of,
)
from pipelines.model_files import check_weights
from pipelines.settings import ComputeSettings
from pipelines.text.pretrained import quiet_transformers, uses_type_ids
from pipelines.text.template import Template
from pipelines.text.tokenization import InputRows

logger = logging.getLogger(__name__)


class WindowModel(Engine):
    """A sequence classifier of PyTorch on its device, with the way in which its windows are run."""

    name = "torch"

    def __init__(
        self, module: nn.Module, template: Template, compute: ComputeSettings, *, uses_type_ids: bool = False
    ) -> None:
        """Move a float32 module to its device and dtype, and decide whether its windows can be packed.

        Args:
            module: A float32 sequence classifier.
            template: Special tokens, padding id and padding side of the tokenizer.
            compute: Device, dtype, batch_tokens and packing. If num_threads is set, it becomes the number of CPU
                threads of the whole process.
            uses_type_ids: Whether the model's own tokenizer passes the template's type ids to it (`uses_type_ids`).

        Raises:
            SettingsError: This machine does not have the device.
            ModelFolderError: The module cannot run three short windows.
        """
        if compute.num_threads is not None:
            torch.set_num_threads(compute.num_threads)
        self.template = template
        self.device = resolve_device(compute.device)
        self.dtype = resolve_dtype(compute.dtype, self.device)
        self.batch_tokens = compute.batch_tokens
        self.module = module.to(self.device).eval()
        self.takes_type_ids = "token_type_ids" in inspect.signature(module.forward).parameters
        self.uses_type_ids = uses_type_ids and self.takes_type_ids
        self.pad_id = pad_token_of(module.config, template.pad_id)
        self._scaling, self._last_layer = Scaling(), ""
        self._packed: PackedRows | None = None
        self.padding_side = find_padding_side(self)
        if compute.packing == "auto":
            self._packed = packed_if_equal(self)
        cast_body(self.module, self.dtype)
        if self.dtype != torch.float32:
            self._check_dtype()

    @property
    def is_packed(self) -> bool:
        """Whether windows run in one row without padding."""
        return self._packed is not None

    @property
    def num_labels(self) -> int:
        """Number of logits per window."""
        return int(self.module.config.num_labels)  # type: ignore[union-attr, arg-type]

    @property
    def row_limit(self) -> int | None:
        """Longest input row, in tokens, that the model's positions allow. None means no limit."""
        return row_limit(self.module)

    @property
    def model_type(self) -> str:
        """Name of the architecture in config.json."""
        return str(self.module.config.model_type)  # type: ignore[union-attr]

    @property
    def vocabulary(self) -> int | None:
        """Number of entries of the vocabulary. None if the architecture has none."""
        return vocabulary_of(self.module.config)

    @property
    def dtype_name(self) -> str:
        """Number format of the forward pass."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """Where the model runs."""
        return str(self.device)

    def copy(self, compute: ComputeSettings) -> WindowModel:
        """Return a copy of the weights under other compute settings, such as another dtype or device."""
        module: Any = copy.deepcopy(self.module)
        if self.is_packed:
            remove_hooks(module)
            module.set_attn_implementation("sdpa")  # the constructor decides again whether to pack
        copied = WindowModel(module, self.template, compute, uses_type_ids=self.uses_type_ids)
        copied._scaling, copied._last_layer = self._scaling, self._last_layer
        return copied

    def __call__(self, rows: InputRows) -> Tensor:
        """Return the logits (W, L) of the windows, in their order, on the device.

        The logits are differentiable where gradients are enabled.
        """
        is_packed = self._packed is not None and attention_name(self.module) == PACKED  # the caller may have changed it
        logits_WL = self.run_packed(self._packed, rows) if is_packed else self._run_in_groups(rows)
        if not self._last_layer:
            return logits_WL
        return logits_WL.float() * self._scaling.scale + self._scaling.mean

    def learn_scaled(self, scaling: Scaling, *, is_scaled: bool) -> bool:
        """Let the module itself output (logit - mean) / scale.

        Calling this object still returns logits. `save` converts the weights back, so that the saved model outputs
        logits.

        Args:
            scaling: Mean and scale of the labels.
            is_scaled: Whether the module's output is scaled already (a new head, or a checkpoint). If not, the weights
                of the last layer are converted, so that the logits do not change.

        Returns:
            False, and nothing changes, if the model has no last linear layer with a bias for the mean.
        """
        name = find_last_layer(self)
        if name is None:
            return False
        self._scaling, self._last_layer = scaling, name
        if not is_scaled:
            layer: Any = self.module.get_submodule(name)
            with torch.no_grad():
                layer.weight.div_(scaling.scale)
                layer.bias.sub_(scaling.mean).div_(scaling.scale)
        return True

    def run(self, rows: InputRows) -> NDArray[np.float32]:
        """Return the logits (W, L) of the windows of one batch, in their order."""
        if any(part.training for part in self.module.modules()):  # left on by an interrupted run, or by the caller
            self.module.eval()
        with torch.inference_mode():
            found: NDArray[np.float32] = self(rows).float().cpu().numpy()
        return found

    def _free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def run_packed(self, packed: PackedRows | None, rows: InputRows) -> Tensor:
        """Return the logits (W, L) of all windows, computed as one row without padding."""
        assert packed is not None
        num_windows = len(rows.length_W)
        if self.device.type == "cpu":
            rows = _rounded_up(rows, self.pad_id)
        types_T = None
        if self.takes_type_ids:  # the model's default type ids cover only rows up to its number of positions
            types_T = self._to_device(rows.type_ids if self.uses_type_ids else np.zeros_like(rows.type_ids))
        packing = Packing.of(rows.length_W.tolist(), self.device, num_windows=num_windows)
        logits_WL = packed(self._to_device(rows.ids), types_T, packing)
        return logits_WL[:num_windows]

    def _run_in_groups(self, rows: InputRows) -> Tensor:
        """Return the logits (W, L) of windows that cannot be packed, with one padded batch per `_group_W`."""
        group_W = self._group_W(rows)
        if (group_W == group_W[0]).all():
            return self.run_padded(rows, side=self.padding_side)
        indices = [np.flatnonzero(group_W == group) for group in np.unique(group_W)]
        pieces = [self.run_padded(rows.take(index_W), side=self.padding_side) for index_W in indices]
        order_W = np.argsort(np.concatenate(indices))
        return torch.cat(pieces)[self._to_device(order_W)]

    def _group_W(self, rows: InputRows) -> NDArray[np.int64]:
        """Return a number for each window. Windows with the same number can be in one padded batch.

        If padding would change the logits, only windows of equal length share a batch. Encoder-decoders of transformers
        refuse a batch whose rows have different numbers of end tokens. Models with longrope read all rows of a batch as
        long ones if one is.
        """
        length_W = rows.length_W
        group_W = np.zeros_like(length_W) if self.padding_side else length_W
        config: Any = self.module.config
        if config.is_encoder_decoder:
            is_end_T = np.isin(rows.ids, config.eos_token_id)
            num_ends_W = np.add.reduceat(is_end_T.astype(np.int64), rows.offsets[:-1])
            group_W = group_W * (num_ends_W.max() + 1) + num_ends_W
        if (turn := longrope_turn(config)) is not None:
            group_W = 2 * group_W + (length_W > turn)
        return group_W

    def run_padded(self, rows: InputRows, *, side: Side | None, row_length: int = 0) -> Tensor:
        """Return the logits (W, L) of all windows, computed in the usual way: one batch with a mask.

        Args:
            rows: The windows.
            side: Side of the padding. None means that all windows have the same length, and no padding is added.
            row_length: Pad rows to at least this length.
        """
        batch = padded(rows, side=side, pad_id=self.pad_id, row_length=row_length, row_limit=self.row_limit)
        inputs = {"input_ids": self._to_device(batch.ids_WS), "attention_mask": self._to_device(batch.mask_WS)}
        if self.uses_type_ids:
            inputs["token_type_ids"] = self._to_device(batch.types_WS)
        with attention_for_length(self.module, batch.ids_WS.shape[1]):
            logits: Tensor = self.module(**inputs).logits
        return logits

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, with weights in float32."""
        module: Any = self.module
        with attention_of(module, "sdpa" if self.is_packed else None):
            save_module(module, folder, {name: value.float().cpu() for name, value in self.own_weights().items()})

    def snapshot(self) -> Callable[[Path], None]:
        """Copy the weights that training changes to CPU memory, for a checkpoint.

        Unlike `save`, this keeps the weights as they are trained: scaled, if `learn_scaled` was called.

        Returns:
            A function that writes config.json and model.safetensors into a folder, or trained.safetensors with LoRA.
            It does not use the module, so training may continue before it is called.
        """
        module: Any = self.module
        with attention_of(module, "sdpa" if self.is_packed else None):
            config = copy.deepcopy(module.config)
        is_lora = has_adapter(module)
        weights = {
            name: value.detach().to("cpu", torch.float32, copy=True) for name, value in trained_weights(module).items()
        }

        def write(folder: Path) -> None:
            if is_lora:
                save_trained(weights, folder)
                return
            config.save_pretrained(folder)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

        return write

    def own_weights(self) -> dict[str, Tensor]:
        """Return the weights with which the module's own output is the logits."""
        weights: dict[str, Tensor] = dict(self.module.state_dict())
        if self._last_layer:
            weights[f"{self._last_layer}.weight"] = weights[f"{self._last_layer}.weight"] * self._scaling.scale
            bias = weights[f"{self._last_layer}.bias"]
            weights[f"{self._last_layer}.bias"] = bias * self._scaling.scale + self._scaling.mean
        return weights

    def _check_dtype(self) -> None:
        """Run one short row. Raises ModelFolderError if the architecture cannot run in the dtype (FNet)."""
        ids = np.full(SHORTEST_STEP, self.pad_id, np.int64)
        ids[-1] = self.pad_id + 1 if self.pad_id == 0 else 0  # some token that is not padding
        row = InputRows(ids, np.zeros_like(ids), np.array([0, len(ids)]))
        try:
            with torch.inference_mode():
                self(row)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            name = str(self.dtype).removeprefix("torch.")
            raise ModelFolderError(
                f"{self.model_type} cannot run in {name} on {self.device}: {first_line(error)}; set dtype=float32"
            ) from error

    def _to_device(self, values: NDArray[np.int64]) -> Tensor:
        return to_device(values, self.device)


def _rounded_up(rows: InputRows, pad_id: int) -> InputRows:
    """Append windows of padding, so that packed rows have few different lengths.

    oneDNN compiles and keeps one kernel per length. Row lengths are therefore multiples of a step. The step is
    SHORTEST_STEP, or twice that for rows of 256 tokens or more, but at least 1/32 of the largest power of two that is
    not above the row length.
    """
    total, longest = len(rows.ids), int(rows.length_W.max())
    step = max(SHORTEST_STEP if total < 256 else 2 * SHORTEST_STEP, 2 ** (total.bit_length() - 6))
    missing = -total % step
    if not missing:
        return rows
    lengths = np.full(-(-missing // longest), longest, np.int64)
    lengths[-1] -= lengths.sum() - missing
    ids = np.concatenate([rows.ids, np.full(missing, pad_id, np.int64)])
    types = np.concatenate([rows.type_ids, np.zeros(missing, np.int64)])
    return InputRows(ids, types, np.concatenate([rows.offsets, total + np.cumsum(lengths)]))


def load_model(path: Path, template: Template, compute: ComputeSettings, *, num_labels: int) -> WindowModel:
    """Load a finished classifier from safetensors. Never runs remote code.

    Args:
        path: Model folder.
        template: Special tokens and padding of the folder's tokenizer.
        compute: Device, dtype, batch_tokens, packing and num_threads.
        num_labels: Number of logits that the model must have.

    Raises:
        ModelFolderError: The weights cannot be read, weights of the head are missing, or config.json has another number
            of labels.
        SettingsError: This machine does not have the device.
    """
    check_weights(path)
    try:
        with quiet_transformers():
            config = safe_config(str(path))
        set_pad_token(config, template.pad_id)
        module, found = load_module(str(path), config)
    except OPENING_ERRORS as error:
        raise ModelFolderError(
            f"the model in {path} cannot be opened: {first_line(error)}; check config.json, or copy the folder again"
        ) from error
    if found.unexpected:
        logger.warning(
            "%s has %d weights that its config.json has no place for, such as %s: they are not used",
            path, len(found.unexpected), found.unexpected[0],
        )  # fmt: skip
    found.check_all(str(path))
    if module.config.num_labels != num_labels:
        raise ModelFolderError(
            f"{path}: config.json has {module.config.num_labels} labels and pipeline.json {num_labels}; both must agree"
        )
    return WindowModel(module, template, compute, uses_type_ids=uses_type_ids(path))
