import numpy as np
import pytest
import torch

from pipelines.model.devices import resolve_dtype
from pipelines.model.packing import Packing, attention
from pipelines.model.window_model import WindowModel
from pipelines.settings import ComputeSettings
from pipelines.text.tokenization import InputRows
from tests import tiny
from tests.model.rows import PACKED, TEMPLATE, ragged

PADDED = ["mpnet", "deberta-v2"]


def load(family, packing="auto", dtype="float32"):
    compute = ComputeSettings(dtype=dtype, device="cpu", packing=packing, batch_tokens=100)
    return WindowModel(tiny.classifier(family, num_labels=3), TEMPLATE, compute)


@pytest.mark.parametrize("family", PACKED)
def test_packed_equals_padded(family):
    packed, padded = load(family), load(family, packing="off")
    assert packed.is_packed
    assert not padded.is_packed
    logits_WL = packed.logits(ragged())
    np.testing.assert_allclose(logits_WL, padded.logits(ragged()), atol=1e-5)
    assert np.ptp(logits_WL, axis=0).min() > 0.01, "logits must differ between windows for a useful test"


@pytest.mark.parametrize("family", PADDED)
def test_unpackable_family_falls_back_to_padding(family):
    model = load(family)
    assert not model.is_packed
    np.testing.assert_array_equal(model.logits(ragged()), load(family, packing="off").logits(ragged()))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_logits_do_not_depend_on_batch(family):
    model = load(family)
    together = model.logits(ragged())
    model.batch_tokens = 1
    np.testing.assert_allclose(together, model.logits(ragged()), atol=1e-5)


def test_attention_mask_of_packed_windows():
    torch.manual_seed(0)
    lengths = [5, 5, 3, 1]
    query, key, value = (torch.randn(1, 2, sum(lengths), 8, dtype=torch.float64) for _ in range(3))
    found, _ = attention(
        torch.nn.Identity(), query, key, value, None,
        packing=Packing.of(lengths, torch.device("cpu")), scaling=0.3, sliding_window=3,
    )  # fmt: skip
    window = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    allowed = (window[:, None] == window) & ((place[:, None] - place).abs() <= 2)
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2))


def test_explicit_attention_matches_sdpa():
    from pipelines.model.packing import _attention_written_out

    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    kernel = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(_attention_written_out(*inputs, None, dropout=0.0, scaling=None), kernel(*inputs))
    gradients = [
        torch.autograd.grad(run().square().sum(), inputs)
        for run in (lambda: _attention_written_out(*inputs, None, dropout=0.0, scaling=None), lambda: kernel(*inputs))
    ]
    torch.testing.assert_close(*gradients)


def test_grouped_key_value_heads():
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    packing = Packing.of([6], torch.device("cpu"))
    grouped, _ = attention(torch.nn.Identity(), query, key, value, None, packing=packing)
    repeated = [states.repeat_interleave(2, dim=1) for states in (key, value)]
    whole, _ = attention(torch.nn.Identity(), query, *repeated, None, packing=packing)
    torch.testing.assert_close(grouped, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_dropout_rate_and_scaling(dtype):
    torch.manual_seed(0)
    lengths, share = [32, 32], 0.3
    query, key = (torch.randn(1, 4, 64, 32, dtype=dtype) for _ in range(2))
    value = torch.eye(32, dtype=dtype).repeat(1, 2, 1, 1).expand(1, 2, 32, 32).repeat(1, 1, 2, 1)  # output = weights
    key = key[:, :2]  # two query heads share one key head

    def weights(dropout):
        packing = Packing.of(lengths, torch.device("cpu"))
        return attention(torch.nn.Identity(), query, key, value, None, packing=packing, dropout=dropout,
                         sliding_window=20)[0]  # fmt: skip

    whole = weights(0.0)
    draws = torch.stack([weights(share) for _ in range(50)])
    allowed = (whole > 0).expand_as(draws)
    assert (draws[~allowed] == 0).all(), "masked weights stay zero"
    kept = draws[allowed] != 0
    assert abs(kept.double().mean() - (1 - share)) < 0.005
    assert abs(kept.view(50, -1).double().std(0).mean() - (share * (1 - share)) ** 0.5) < 0.01, "masks differ by draw"
    torch.testing.assert_close(draws[allowed][kept], (whole / (1 - share)).expand_as(draws)[allowed][kept],
                               rtol=1e-4 if dtype == torch.float64 else 0.03, atol=0)  # fmt: skip
    assert torch.isfinite(weights(1.0)).all(), "no division by zero"
    torch.manual_seed(1)
    first = weights(share)
    torch.manual_seed(1)
    assert (weights(share) == first).all()


def test_bfloat16_accuracy_and_auto_dtype():
    difference = np.abs(load("bert", dtype="bfloat16").logits(ragged()) - load("bert").logits(ragged())).max()
    assert 0 < difference < 0.1
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    assert resolve_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


def test_packed_rows_are_padded_to_few_lengths():
    from pipelines.model.window_model import _rounded_up

    lengths = set()
    for total in range(1, 5000):
        rows = _rounded_up(InputRows(np.ones(total, np.int64), np.zeros(total, np.int64), np.array([0, total])), 0)
        assert (rows.ids[:total] == 1).all()
        assert rows.offsets[:2].tolist() == [0, total]
        assert rows.offsets[-1] == len(rows.ids) == len(rows.type_ids)
        assert rows.length_W.min() > 0
        assert rows.length_W.max() == total, "no window is longer than requested"
        assert len(rows.ids) - total < max(8, total / 16)
        lengths.add(len(rows.ids))
    assert len(lengths) < 160
