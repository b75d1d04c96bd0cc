"""Run many windows in one row without padding ("packing"), for models that use transformers' attention interface.

A packed row is one sequence of T tokens. Attention stays within each window, and position ids restart at every window.
The layers after the last token-wise layer (a pooler, a classification head) receive only the first token of each
window. Whether a model can be packed is tested when it is loaded, by comparing its packed and padded logits. There is
no table of model names.

On CUDA in half precision, attention is one call of a variable-length flash kernel. Elsewhere, neighbouring windows of
equal length share one unmasked attention call. A row whose windows are sorted by length therefore needs few calls.

Shapes: W windows, T tokens of all windows, N windows of one length, S their length, H heads, D head size, L labels.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pipelines_packed"
MOST_WRITTEN_OUT = 1024
"""Longest window, in tokens, for which bfloat16 training on a CPU keeps all attention weights for the gradient."""


@dataclass(frozen=True)
class Packing:
    """Positions of the windows in a packed row."""

    cu_seqlens: Tensor
    """(W + 1,) int32 offsets of the windows in the row, on the row's device."""
    runs: tuple[tuple[int, int], ...]
    """Groups of neighbouring windows of equal length: (length, number of windows). Later tokens are padding."""
    max_length: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, *, num_windows: int | None = None) -> Packing:
        """Return the packing of windows of these lengths, in this order.

        Args:
            lengths: Tokens of each window.
            device: Device of the row.
            num_windows: Number of real windows; the other windows are padding. None means that all are real.
        """
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
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each window of a packed row.

    The signature is that of transformers' `AttentionInterface`. transformers passes `packing` on from the call of the
    model. Without it, somebody calls the module in the usual way, and gets transformers' own attention.

    Args:
        module: The attention module; not used.
        query: (1, H, T, D).
        key: (1, H, T, D), possibly with fewer heads than query (grouped-query attention).
        value: Shape of key.
        attention_mask: None in a packed row.
        packing: Positions of the windows in the row.
        dropout: Probability that an attention weight is dropped.
        scaling: Factor of the attention scores. None means D ** -0.5.
        sliding_window: A value of w lets a token see the w - 1 tokens on either side. None means the whole window.
        others: Only for transformers' own attention.

    Returns:
        The output (1, T, H, D), and None in place of the attention weights.
    """
    if packing is None:
        if sliding_window is not None:
            others["sliding_window"] = sliding_window
        usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found: tuple[Tensor, None] = usual(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    assert attention_mask is None, "a packed row has no mask"
    reach = -1 if sliding_window is None else sliding_window - 1
    if _has_flash(query) and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler, which a CPU does not need

        shared = query.shape[1] // key.shape[1]  # query heads per key head
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
    return _attention_by_length(query, key, value, packing, dropout=dropout, scaling=scaling, reach=reach), None


def _has_flash(query: Tensor) -> bool:
    """Whether the variable-length flash kernel supports the query: half precision, on NVIDIA Ampere or later."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attention_by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    dropout: float,
    scaling: float | None,
    reach: int,
) -> Tensor:
    """Compute attention with one call per group of windows of equal length; the output of padding is 0."""
    pieces, start = [], 0
    for length, count in packing.runs:
        stop = start + length * count
        query_NHSD, key_NHSD, value_NHSD = (
            states[0, :, start:stop].view(states.shape[1], count, length, -1).transpose(0, 1)
            for states in (query, key, value)
        )
        band_SS = _band(length, reach, query.device)
        if query.device.type == "cpu" and (dropout or _trains_in_bfloat16(query, length)):
            out_NHSD = _attention_written_out(
                query_NHSD, key_NHSD, value_NHSD, band_SS, dropout=dropout, scaling=scaling
            )
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
    """Whether `_attention_written_out` is the better choice for training on a CPU in bfloat16.

    Up to MOST_WRITTEN_OUT tokens, its gradient is faster than that of PyTorch's kernel. Longer windows need too much
    memory for it.
    """
    return query.requires_grad and query.dtype == torch.bfloat16 and length <= MOST_WRITTEN_OUT


def _attention_written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    band_SS: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Compute F.scaled_dot_product_attention of (N, H, S, D) step by step, which is faster for training on a CPU.

    With dropout, PyTorch's function draws one random number per attention weight. This function uses 16 random bits.
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
        dropped = min(round(dropout * 2**16), 2**16 - 1)  # of the 2**16 values of 16 bits
        bits = torch.empty(-(-weights_NHSS.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept_NHSS = bits[: weights_NHSS.numel()].view_as(weights_NHSS) >= dropped - 2**15
        weights_NHSS = weights_NHSS * kept_NHSS.to(weights_NHSS.dtype)
        value = value / (1 - dropped / 2**16)
    return weights_NHSS @ value


def _band(length: int, reach: int, device: torch.device) -> Tensor | None:
    """Return an (S, S) mask that is true where two tokens are at most reach apart, or None if all pairs are.

    A negative reach means no limit.
    """
    if reach < 0 or reach >= length - 1:
        return None
    place = torch.arange(length, device=device)
    return (place[:, None] - place[None, :]).abs() <= reach


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Return no mask in a packed call, in which attention separates the windows itself; else transformers' own mask."""
    if _starts() is not None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
_CALL = threading.local()
"""The packed call of the current thread: `starts` has the position of each window's first token."""


def _starts() -> Tensor | None:
    return getattr(_CALL, "starts", None)


class PackedRows:
    """Runs packed rows through a module whose attention implementation is set to NAME. Several threads may use it."""

    def __init__(self, module: nn.Module, *, first_position: int) -> None:
        """Find the module's last token-wise layer, and let what follows it see only the windows' first tokens.

        Args:
            module: A sequence classifier.
            first_position: Position id of a window's first token (padding_idx + 1 in RoBERTa-like models).

        Raises:
            ValueError: No layer of the module gives one vector per token.
        """
        self._module = module
        self._first_position = first_position
        remove_hooks(module)
        self._last_tokenwise_child().register_forward_hook(keep_first_tokens)

    def __call__(self, ids_T: Tensor, type_ids_T: Tensor | None, packing: Packing) -> Tensor:
        """Return the logits (W, L) of the windows of one packed row.

        Args:
            ids_T: Token ids, special tokens included, (T,).
            type_ids_T: Token type ids, (T,). None if the module does not take any.
            packing: Positions of the windows in the row.
        """
        logits: Tensor = self._forward(self._module, ids_T, type_ids_T, packing).logits
        return logits

    def _forward(self, module: nn.Module, ids_T: Tensor, type_ids_T: Tensor | None, packing: Packing) -> Any:
        starts = packing.cu_seqlens[:-1].long()
        lengths = packing.cu_seqlens.diff().long()
        position_T = torch.arange(len(ids_T), device=ids_T.device)
        if self._first_position:  # RoBERTa-like: only tokens that are not the padding token are numbered
            padding = self._first_position - 1
            is_token_T = ids_T != padding
            counted_T = torch.cumsum(is_token_T, 0)
            before = torch.cat([counted_T.new_zeros(1), counted_T])[starts]
            numbers_T = counted_T - torch.repeat_interleave(before, lengths, output_size=len(ids_T))
            position_T = numbers_T * is_token_T + padding
        else:
            position_T = position_T - torch.repeat_interleave(starts, lengths, output_size=len(ids_T))
        inputs = {"input_ids": ids_T[None], "position_ids": position_T[None]}
        if type_ids_T is not None:
            inputs["token_type_ids"] = type_ids_T[None]
        _CALL.starts = starts
        try:
            return module(**inputs, packing=packing)
        finally:
            _CALL.starts = None

    def _last_tokenwise_child(self) -> nn.Module:
        """Return the last direct child of the model's body that still gives one vector per token."""
        body = self._module.base_model
        assert isinstance(body, nn.Module)
        device = next(self._module.parameters()).device
        packing = Packing.of([2, 3], device)
        seen: list[nn.Module] = []

        def note(child: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == (1, 5):
                seen.append(child)

        hooks = [child.register_forward_hook(note) for child in body.children()]
        try:
            with torch.no_grad():
                self._forward(body, torch.ones(5, dtype=torch.long, device=device), None, packing)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise ValueError(f"{type(body).__name__} has no child module that gives one vector per token")
        return seen[-1]


def keep_first_tokens(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Reduce a layer's output (1, T, hidden) to the windows' first tokens (W, 1, hidden), as a forward hook.

    The hook stays on the layer, and the windows are known per thread: a hook that was there only for the time of a
    call would also act on the calls of other threads. Without a packed call in this thread, nothing changes.
    """
    starts = _starts()
    if starts is None:
        return output
    if isinstance(output, Tensor):
        return output[0, starts, None]
    if isinstance(output, tuple):
        return (output[0][0, starts, None], *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][0, starts, None]
    return output


def remove_hooks(module: nn.Module) -> None:
    """Take the hooks of packing off a module. A copy of a packed module has them too."""
    for part in module.modules():
        for number, hook in list(part._forward_hooks.items()):
            if hook is keep_first_tokens:
                del part._forward_hooks[number]
