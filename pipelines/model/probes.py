"""Checks of a loaded model with three short windows, which show how it can be run.

These checks decide how a model is run. There is no table of model names.

Shapes: W windows, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.model.packing import NAME as PACKED
from pipelines.model.packing import PackedRows
from pipelines.model.weights import first_position
from pipelines.text.pretrained import quiet_transformers
from pipelines.text.tokenization import InputRows

ROUNDING, SLACK = 1e-6, 1e-3
"""Tolerances of the float32 checks when a model is loaded (packed and padded, more and less padding).

Two results agree if they differ by at most ROUNDING times the largest logit, plus SLACK times the largest difference
between the windows.
"""


class Probed(Protocol):
    """What the checks need of a `WindowModel`."""

    module: nn.Module

    @property
    def num_labels(self) -> int:
        """Number of logits per window."""

    def __call__(self, rows: InputRows) -> Tensor:
        """Logits (W, L) of the windows."""

    def run_padded(self, rows: InputRows, *, row_length: int | None = None) -> Tensor:
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


def sees_padding(model: Probed) -> bool:
    """Whether logits depend on the amount of padding, tested with three short windows in float32."""
    rows = _probe(model)
    with torch.inference_mode(), quiet_transformers():
        short_WL = model.run_padded(rows)
        long_WL = model.run_padded(rows, row_length=3 * max(rows.length_W))
    return not _agree(long_WL, short_WL)


def _probe(model: Probed) -> InputRows:
    """Return three short windows of random tokens."""
    lengths = [7, 7, 4]
    size: int = model.module.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = np.random.default_rng(0).integers(min(10, size - 1), size, sum(lengths))
    return InputRows(ids, np.zeros_like(ids), np.concatenate([[0], np.cumsum(lengths)]))


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
    rows = _probe(model)
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
    rows = _probe(model)
    before = module.config._attn_implementation
    packed: PackedRows | None = None
    with torch.inference_mode(), quiet_transformers():
        padded_WL = model.run_padded(rows)
        try:
            module.set_attn_implementation(PACKED)
            packed = PackedRows(module, first_position=first_position(module))
            packed_WL = model.run_packed(packed, rows)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError):
            packed_WL = None  # models that cannot take a packed row raise different errors
        if packed_WL is not None and packed_WL.shape == padded_WL.shape and _agree(packed_WL, padded_WL):
            return packed
        if packed is not None:
            packed.remove()
        module.set_attn_implementation(before)
    return None
