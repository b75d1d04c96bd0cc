"""Many windows in one row without padding, for models that go through transformers' attention interface.

The row is one sequence of T tokens; attention stays within a window, positions restart at every window, and what
follows the last token-wise layer (a pooler, a classification head) is handed the windows' first tokens. Which
models can do that is found out by running both ways when a model is loaded, never from a table of names.

On CUDA in half precision attention is one variable-length flash kernel; elsewhere windows of equal length are
one unmasked call, so that rows whose windows are sorted by length need few calls.

Shapes: W windows, T tokens of all windows, N windows of one length, S their length, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "pipelines_packed"
MOST_WRITTEN_OUT = 1024
"""Tokens of a window whose attention weights are all held for the gradient where that is faster."""


@dataclass(frozen=True)
class Packing:
    """Where the windows of a packed row lie."""

    cu_seqlens: Tensor
    """(W + 1,) int32 offsets of the windows, on the row's device."""
    runs: tuple[tuple[int, int], ...]
    """Neighbouring windows of equal length: (length, number of windows). What they do not cover is padding."""
    max_length: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, *, num_windows: int | None = None) -> Packing:
        """The packing of windows of these lengths, in this order; from the num_windows-th on they are padding."""
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        runs = tuple((length, len(list(group))) for length, group in groupby(lengths[:num_windows]))
        return cls(offsets.to(device, non_blocking=True), runs, max(lengths))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each window of a packed row: (1, H, T, D) each to (1, T, H, D).

    The signature is transformers' (`AttentionInterface`); it passes what else a model says, and `packing`
    through from the model's own call. sliding_window w lets a token see the w - 1 to either side.
    """
    assert attention_mask is None, "a packed row has no mask"
    reach = -1 if sliding_window is None else sliding_window - 1
    if _has_flash(query) and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn  # it loads torch's compiler, which a CPU can do without

        shared = query.shape[1] // key.shape[1]  # heads of the query that share one of the key
        if shared > 1:
            key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
        query_THD, key_THD, value_THD = (states[0].transpose(0, 1) for states in (query, key, value))
        offsets, longest = packing.cu_seqlens, packing.max_length
        out = varlen_attn(
            query_THD, key_THD, value_THD, offsets, offsets, longest, longest,
            scale=scaling, window_size=(reach, reach),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    return _attention_by_length(query, key, value, packing, dropout, scaling, reach), None


def _has_flash(query: Tensor) -> bool:
    """Whether the variable-length kernel takes these: half precision, on NVIDIA's Ampere or later."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attention_by_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, scaling: float | None, reach: int
) -> Tensor:
    pieces, start = [], 0
    for length, count in packing.runs:
        stop = start + length * count
        query_NHSD, key_NHSD, value_NHSD = (
            states[0, :, start:stop].view(states.shape[1], count, length, -1).transpose(0, 1)
            for states in (query, key, value)
        )
        band_SS = _band(length, reach, query.device)
        if query.device.type == "cpu" and (dropout or _trains_in_bfloat16(query, length)):
            out_NHSD = _attention_written_out(query_NHSD, key_NHSD, value_NHSD, band_SS, dropout, scaling)
        else:
            out_NHSD = F.scaled_dot_product_attention(
                query_NHSD,
                key_NHSD,
                value_NHSD,
                attn_mask=band_SS,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        pieces.append(out_NHSD.transpose(1, 2).flatten(0, 1))
        start = stop
    if start < query.shape[2]:
        pieces.append(query.new_zeros(query.shape[2] - start, query.shape[1], value.shape[3]))
    return torch.cat(pieces).unsqueeze(0)


def _trains_in_bfloat16(query: Tensor, length: int) -> bool:
    """Where the gradient of PyTorch's kernel takes longer on a CPU than what is written out; beyond, memory counts."""
    return query.requires_grad and query.dtype == torch.bfloat16 and length <= MOST_WRITTEN_OUT


def _attention_written_out(
    query: Tensor, key: Tensor, value: Tensor, band_SS: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """What F.scaled_dot_product_attention says of (N, H, S, D), faster on a CPU in training.

    With dropout that draws a number for every weight; here 16 random bits decide.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores_NHSS = query @ (key * scaling).transpose(-1, -2)
    if band_SS is not None:
        scores_NHSS = scores_NHSS.masked_fill(~band_SS, float("-inf"))
    weights_NHSS = scores_NHSS.softmax(-1)
    if dropout:
        dropped = min(round(dropout * 2**16), 2**16 - 1)  # of all values that 16 bits can have
        bits = torch.empty(-(-weights_NHSS.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept_NHSS = bits[: weights_NHSS.numel()].view_as(weights_NHSS) >= dropped - 2**15
        weights_NHSS = weights_NHSS * kept_NHSS.to(weights_NHSS.dtype)
        value = value / (1 - dropped / 2**16)
    return weights_NHSS @ value


def _band(length: int, reach: int, device: torch.device) -> Tensor | None:
    """(S, S) true where two tokens are at most reach apart; None where every pair is."""
    if reach < 0 or reach >= length - 1:
        return None
    place = torch.arange(length, device=device)
    return (place[:, None] - place[None, :]).abs() <= reach


def _no_mask(*_: Any, **__: Any) -> None:
    """Packed attention keeps windows apart by itself."""


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _no_mask)


class PackedRows:
    """Runs packed rows through a module whose attention is set to NAME."""

    def __init__(self, module: nn.Module, *, first_position: int) -> None:
        """first_position is the position id of a window's first token (padding_idx + 1 in RoBERTa's kin)."""
        self._module = module
        self._first_position = first_position
        self._last_tokenwise = _last_tokenwise_child(module, self)

    def __call__(self, ids_T: Tensor, type_ids_T: Tensor | None, packing: Packing) -> Tensor:
        """Logits (W, L) of the windows of one packed row."""
        with self._first_tokens_after(self._last_tokenwise, packing):
            logits: Tensor = self._forward(self._module, ids_T, type_ids_T, packing).logits
        return logits

    def _forward(self, module: nn.Module, ids_T: Tensor, type_ids_T: Tensor | None, packing: Packing) -> Any:
        starts = packing.cu_seqlens[:-1].long()
        lengths = packing.cu_seqlens.diff().long()
        position_T = torch.arange(len(ids_T), device=ids_T.device)
        position_T = position_T - torch.repeat_interleave(starts, lengths, output_size=len(ids_T))
        inputs = {"input_ids": ids_T[None], "position_ids": (position_T + self._first_position)[None]}
        if type_ids_T is not None:
            inputs["token_type_ids"] = type_ids_T[None]
        return module(**inputs, packing=packing)

    @contextmanager
    def _first_tokens_after(self, child: nn.Module, packing: Packing) -> Iterator[None]:
        """Turn the child's output (1, T, H) into the windows' first tokens (W, 1, H) for what follows it."""
        starts = packing.cu_seqlens[:-1].long()

        def keep_first(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return output[0, starts, None]
            if isinstance(output, tuple):
                return (output[0][0, starts, None], *output[1:])
            output["last_hidden_state"] = output["last_hidden_state"][0, starts, None]
            return output

        hook = child.register_forward_hook(keep_first)
        try:
            yield
        finally:
            hook.remove()


def _last_tokenwise_child(module: nn.Module, rows: PackedRows) -> nn.Module:
    """The last direct part of the model's body that still gives one vector per token."""
    body = module.base_model
    assert isinstance(body, nn.Module)
    device = next(module.parameters()).device
    packing = Packing.of([2, 3], device)
    seen: list[nn.Module] = []

    def note(child: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == (1, 5):
            seen.append(child)

    hooks = [child.register_forward_hook(note) for child in body.children()]
    try:
        with torch.no_grad():
            rows._forward(body, torch.ones(5, dtype=torch.long, device=device), None, packing)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(f"{type(body).__name__} has no part that gives one vector per token")
    return seen[-1]
