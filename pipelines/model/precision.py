"""Run the body of a classifier in a narrow number format, and its classification head in float32.

A head maps a few hundred numbers to one logit per label. If it runs in bfloat16, which has 8 significant bits, a model
that has learned little gives the same score to most documents, and no threshold can separate them. The head is a small
part of the work: it sees only one vector per window, or per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class InFloat32:
    """The forward function of a layer, with inputs in float32 and without autocast."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer's own forward function."""
        args, kwargs = tree_map(_float32, (args, kwargs))
        devices = [value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with torch.autocast(devices[0] if devices else "cpu", enabled=False):
            return self.forward(*args, **kwargs)


def head_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a sequence classifier behind its body. Empty if the architecture has no separate body."""
    body: Any = getattr(module, "base_model", module)
    if body is module:
        return []
    layers = [child for child in module.children() if body not in child.modules()]
    return [layer for layer in layers if list(layer.parameters())]


def pooler_of(module: nn.Module) -> list[nn.Module]:
    """Return the pooler at the end of a classifier's body, in a list that is empty if there is none."""
    pooler = getattr(getattr(module, "base_model", module), "pooler", None)
    return [pooler] if isinstance(pooler, nn.Module) else []


def cast_body(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a float32 classifier to dtype, except for its pooler and its head.

    Both also run in float32 under autocast, in training and in evaluations.
    """
    head = head_of(module) + pooler_of(module)
    weights = [copy.deepcopy(layer.state_dict()) for layer in head] if dtype != torch.float32 else []
    module.to(dtype)
    for layer, own in zip(head, weights, strict=False):
        layer.float().load_state_dict(own)
    for layer in head:
        if not isinstance(layer.forward, InFloat32):  # a copy of a converted module has it already
            layer.forward = InFloat32(layer.forward)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
