"""Checks of a loaded model with three short windows, which show how it can be run.

These checks decide how a model is run. There is no table of model names.

Shapes: W windows, L labels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.errors import ModelFolderError, first_line
from pipelines.model.engine import Side
from pipelines.model.packing import NAME as PACKED
from pipelines.model.packing import PackedRows, remove_hooks
from pipelines.model.weights import first_position, pad_token_of, vocabulary_of
from pipelines.text.pretrained import quiet_transformers
from pipelines.text.template import Template
from pipelines.text.tokenization import InputRows, Tokens, assemble, cut_documents, offsets_of
from pipelines.text.windows import WindowPlan

ROUNDING, SLACK = 1e-6, 1e-3
"""Tolerances of the float32 checks when a model is loaded (packed and padded, more and less padding).

Two results agree if they differ by at most ROUNDING times the largest logit, plus SLACK times the largest difference
between the windows.
"""
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)
"""Errors of a module that cannot run its input in the tested way."""
_SWITCHING = threading.RLock()


class Probed(Protocol):
    """What the checks need of a `WindowModel`."""

    module: nn.Module
    template: Template

    @property
    def num_labels(self) -> int:
        """Number of logits per window."""

    def __call__(self, rows: InputRows) -> Tensor:
        """Logits (W, L) of the windows."""

    def run_padded(self, rows: InputRows, *, side: Side | None, row_length: int = 0) -> Tensor:
        """Logits (W, L), computed as one padded batch."""

    def run_packed(self, packed: PackedRows, rows: InputRows) -> Tensor:
        """Logits (W, L), computed as one row without padding."""


@contextmanager
def attention_of(module: Any, name: str | None) -> Iterator[None]:
    """Use another attention implementation inside the context. None keeps the current one."""
    before = module.config._attn_implementation
    if name is not None:
        module.set_attn_implementation(name)
    try:
        yield
    finally:
        if name is not None:
            module.set_attn_implementation(before)


def attention_name(module: Any) -> str | None:
    """Return the name of the attention implementation in use."""
    name: str | None = module.config._attn_implementation
    return name


@contextmanager
def attention_for_length(module: nn.Module, length: int) -> Iterator[None]:
    """Let BigBird run rows of a length as it does in a new process: sparse attention in long rows, full in short ones.

    transformers switches to full attention at the first short row, and never back. Other models are not changed.
    Threads take turns, because the choice is a state of the module.
    """
    if not _is_block_sparse(module):
        yield
        return
    config: Any = module.config
    is_long = length > (5 + 2 * config.num_random_blocks) * config.block_size
    switch: Any = next(part for part in module.modules() if hasattr(part, "set_attention_type"))
    with _SWITCHING:
        switch.set_attention_type("block_sparse" if is_long else "original_full")
        yield


def _is_block_sparse(module: nn.Module) -> bool:
    return getattr(module.config, "attention_type", None) == "block_sparse"


def find_padding_side(model: Probed) -> Side | None:
    """Find out on which side windows can be padded so that their logits are those without padding.

    The tokenizer's side is tried first. A decoder with absolute positions must be padded on the right, whatever its
    tokenizer says. None means that windows must not be padded at all (convolutions, Fourier transforms, sampling).

    Raises:
        ModelFolderError: The model cannot run the three windows of the test.
    """
    if _is_block_sparse(model.module):  # the random blocks of a row depend on its length
        return None
    rows = probe_rows(model)
    sides: tuple[Side, Side] = ("left", "right") if model.template.pad_left else ("right", "left")
    with torch.inference_mode(), quiet_transformers():
        try:
            alone = [model.run_padded(rows.take(np.array([row])), side=None) for row in range(len(rows.length_W))]
        except FAILURES as error:
            model_type = model.module.config.model_type  # type: ignore[union-attr]
            raise ModelFolderError(
                f"the model ({model_type}) cannot run a short text: {type(error).__name__}: {first_line(error)}"
            ) from error
        for side in sides:
            with suppress(*FAILURES):  # models that cannot be padded on a side raise different errors
                if _agree(model.run_padded(rows, side=side, row_length=3 * max(rows.length_W)), torch.cat(alone)):
                    return side
    return None


def probe_rows(model: Probed, lengths: Sequence[int] = (7, 7, 4)) -> InputRows:
    """Return windows of random tokens, by default three short ones, with the special tokens of the template around."""
    config: Any = model.module.config
    template = model.template
    ends = np.atleast_1d(getattr(config, "eos_token_id", None) or [])
    special = {*template.prefix, *template.suffix, pad_token_of(config, template.pad_id), *map(int, ends)}
    size = vocabulary_of(config) or 128
    allowed = np.setdiff1d(np.arange(min(10, size - 1), size), list(special))
    content = np.random.default_rng(0).choice(allowed if len(allowed) else np.arange(size), sum(lengths))
    longest = max(lengths)
    plan = WindowPlan(max_length=longest + template.num_special_tokens(pair=False), budget=longest, step=longest)
    cut = cut_documents(Tokens(content, offsets_of(np.array(lengths))), plan, template)
    return assemble(cut, template, np.arange(len(lengths)))


def _agree(found_WL: Tensor, expected_WL: Tensor) -> bool:
    """Whether two results are equal within the tolerances ROUNDING and SLACK."""
    spread = (expected_WL.amax(0) - expected_WL.amin(0)).max()
    return bool((found_WL - expected_WL).abs().max() <= ROUNDING * expected_WL.abs().max() + SLACK * spread)


def find_last_layer(model: Probed) -> str | None:
    """Return the name of the linear layer with a bias whose outputs are the logits, or None.

    This is tested: adding 1 to the layer's output must add 1 to the logits.
    """
    layers = [
        (name, layer)
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == model.num_labels and layer.bias is not None
    ]
    if not layers:
        return None
    name, layer = layers[-1]
    rows = probe_rows(model)
    with torch.inference_mode(), quiet_transformers():
        before_WL = model(rows)
        hook = layer.register_forward_hook(lambda _layer, _inputs, output: output + 1)
        try:
            after_WL = model(rows)
        finally:
            hook.remove()
    return name if torch.allclose(after_WL, before_WL + 1, atol=1e-3) else None


def packed_if_equal(model: Probed) -> PackedRows | None:
    """Run three short windows packed and padded, in float32.

    Returns:
        If the logits agree: the packing, which is then switched on in the module. Otherwise None, and the module is
        unchanged.
    """
    module: Any = model.module
    rows = probe_rows(model)
    before = module.config._attn_implementation
    packed: PackedRows | None = None
    with torch.inference_mode(), quiet_transformers():
        padded_WL = model(rows)
        try:
            module.set_attn_implementation(PACKED)
            packed = PackedRows(module, first_position=first_position(module))
            packed_WL = model.run_packed(packed, rows)
        except FAILURES:
            packed_WL = None  # models that cannot take a packed row raise different errors
        if packed_WL is not None and packed_WL.shape == padded_WL.shape and _agree(packed_WL, padded_WL):
            return packed
        remove_hooks(module)
        module.set_attn_implementation(before)
    return None
