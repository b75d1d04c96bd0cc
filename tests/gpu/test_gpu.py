"""Tests that need a GPU: flash kernel on packed rows, half precision against the CPU, NCCL, no synchronization."""

import numpy as np
import pytest
import torch

from pipelines.model.packing import Packing, attention
from pipelines.model.scorer import Scorer
from pipelines.model.window_model import WindowModel
from pipelines.on_ray.train import train
from pipelines.settings import ComputeSettings
from pipelines.training.steps import Stepper
from tests import tiny
from tests.jobs import train_job
from tests.model.rows import PACKED, TEMPLATE, ragged
from tests.training.runs import make_job, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("reach", [None, 9])
@pytest.mark.parametrize("heads", [8, 2])
def test_flash_kernel_matches_grouped_calls(reach, heads):
    torch.manual_seed(0)
    lengths = [300, 300, 64, 5, 1]
    device = torch.device("cuda")
    query = torch.randn(1, 8, sum(lengths), 64, device=device)
    key, value = (torch.randn(1, heads, sum(lengths), 64, device=device) for _ in range(2))
    packing = Packing.of(lengths, device)
    exact, _ = attention(torch.nn.Identity(), query, key, value, None, packing=packing, sliding_window=reach)
    half = [states.bfloat16() for states in (query, key, value)]
    flash, _ = attention(torch.nn.Identity(), *half, None, packing=packing, sliding_window=reach)
    assert ((flash.float() - exact).norm() / exact.norm()).item() < 1e-2


@pytest.mark.parametrize("family", [*PACKED, "mpnet"])
def test_gpu_logits_match_cpu(family):
    def logits(device, dtype):
        module = tiny.classifier(family, num_labels=3, hidden_size=128, num_attention_heads=2, dim=128, n_heads=2)
        compute = ComputeSettings(device=device, dtype=dtype, batch_tokens=100)
        model = WindowModel(module, TEMPLATE, compute)
        assert model.is_packed == (family in PACKED)
        return model.logits(ragged())

    cpu = logits("cpu", "float32")
    spread = np.ptp(cpu)
    assert np.abs(logits("cuda", "float32") - cpu).max() < 3e-5 * spread
    assert np.abs(logits("cuda", "auto") - cpu).max() < 0.1 * spread


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_in_every_dtype(tmp_path, emails, dtype):
    compute = ComputeSettings(device="cuda", dtype="auto")
    job, train, valid = make_job(tmp_path, emails, compute=compute, train_dtype=dtype, learning_rate=1e-3)
    summary = run(job, train, valid)
    assert summary.packed
    first, last = np.mean(summary.losses[:10]), np.mean(summary.losses[-10:])
    assert last < first
    found = Scorer.load(job.output, compute=compute).score_documents(valid.documents)
    exact = Scorer.load(job.output, compute=ComputeSettings(device="cpu", dtype="float32"))
    np.testing.assert_allclose(found.scores_DL, exact.score_documents(valid.documents).scores_DL, atol=0.05)


def test_ray_train_over_nccl(training_data, tmp_path):
    summary = train(
        train_job(training_data, tmp_path / "out", num_workers=1, device="cuda", train_dtype="auto", dtype="auto")
    )
    assert summary.steps > 1
    assert np.isfinite(summary.losses).all()


def test_step_does_not_synchronize_device(tmp_path, emails, monkeypatch):
    settings = {"train_dtype": "bfloat16", "epochs": 1, "weight": (1.0, 2.0)}
    job, train, _ = make_job(tmp_path, emails, compute=ComputeSettings(device="cuda"), **settings)
    numbers, step = [], Stepper.__call__

    def watched(stepper, *arguments):
        numbers.append(arguments[1])
        if len(numbers) < 5:  # the first steps select kernels and allocate memory
            return step(stepper, *arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(stepper, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "__call__", watched)
    run(job, train)
    assert len(numbers) > 5
