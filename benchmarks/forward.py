"""Measure the tokens per second of the forward pass alone: packed, padded, and in a plain transformers loop.

    python benchmarks/forward.py [--device cuda] [--hidden 768 --layers 12] [--windows 4096]

All three process the same windows, which are cut from texts of log-normal length. The model has BERT's shape and random
weights, because the speed does not depend on the weights. The plain loop does what the Hugging Face pipeline does: it
uses batches of 32 in input order, padded to the longest window of the batch.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from pipelines.model.devices import resolve_device, resolve_dtype
from pipelines.model.window_model import WindowModel
from pipelines.settings import ComputeSettings
from pipelines.text.template import Template
from pipelines.text.tokenization import CutDocuments, Tokens, assemble, cut_documents, offsets_of
from pipelines.text.windows import WindowPlan

TEMPLATE = Template((101,), (102,))


def make_windows(num_windows: int) -> CutDocuments:
    """Return documents with a median of 350 tokens that give num_windows windows of at most 512 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(350), 1.0, num_windows).astype(np.int64), 1)
    plan = WindowPlan(512, 510, 409)
    counts = np.where(lengths > 510, -(-(lengths - 510) // 409) + 1, 1)
    lengths = lengths[: int(np.searchsorted(np.cumsum(counts), num_windows)) + 1]
    ids = rng.integers(1000, 30000, lengths.sum()).astype(np.int32)
    return cut_documents(Tokens(ids, offsets_of(lengths)), plan, TEMPLATE)


def plain_loop(model: WindowModel, cut: CutDocuments) -> None:
    """Run batches of 32 windows in input order, each padded to its longest window."""
    with torch.inference_mode():
        for start in range(0, len(cut.length_W), 32):
            index_W = np.arange(start, min(start + 32, len(cut.length_W)))
            model.run_padded(assemble(cut, TEMPLATE, index_W), side="right").float().cpu()


def best_rate(run: Callable[[], object], num_tokens: int, device: torch.device) -> float:
    """Return the tokens per second of the fastest of three runs, after one warm-up run."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return num_tokens / min(seconds[1:])


def main() -> None:
    """Print one JSON line of rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    options = parser.parse_args()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    cut = make_windows(options.windows)
    num_tokens = int(cut.length_W.sum())
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // (32 if options.hidden < 512 else 64),
        intermediate_size=4 * options.hidden,
        num_labels=4,
    )
    rates = {}
    for packing in ("auto", "off"):
        compute = ComputeSettings(
            device=options.device, dtype=options.dtype, packing=packing, batch_tokens=options.batch_tokens
        )
        module = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))  # from_config modifies it
        model = WindowModel(module, TEMPLATE, compute)
        name = "packed" if model.is_packed else "padded"
        rates[name] = best_rate(lambda model=model: model.logits(cut), num_tokens, device)
    rates["plain"] = best_rate(lambda: plain_loop(model, cut), num_tokens, device)
    weights = sum(p.numel() for name, p in model.module.named_parameters() if "layer" in name)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "windows": len(cut.length_W),
        "tokens": num_tokens,
        **{f"{name}_tokens_per_s": round(rate) for name, rate in rates.items()},
        **{f"packed_over_{name}": round(rates["packed"] / rates[name], 2) for name in ("padded", "plain")},
        "packed_tflops": round(2 * weights * rates["packed"] / 1e12, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
