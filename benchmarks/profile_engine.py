"""Where the time of a forward pass goes with OpenVINO, and how far it is from what this machine can multiply.

    python benchmarks/profile_engine.py runs/demo/model docs/demo/emails/test
    python benchmarks/profile_engine.py runs/demo/int8 docs/demo/emails/test

Prints the share of each kind of layer, from OpenVINO's own counters, and the multiplications per second of all linear
layers beside those of a large product of matrices in the same number format (PyTorch with oneDNN).
"""

import argparse
import collections
import json
import os
import time

import numpy as np
import pyarrow.parquet as pq
import torch

from pipelines.model.openvino_files import GRAPH, converted, read_details
from pipelines.model.openvino_model import core
from pipelines.model.scorer import Scorer
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings

MOST_WINDOWS = 400


def best_rate(dtype):
    """Multiplications per second of a product of two large matrices."""
    size = 2048
    if dtype == "int8":
        left = torch.randint(-127, 127, (size, size), dtype=torch.int8)
        product = torch._int_mm
    else:
        left = torch.randn(size, size, dtype=getattr(torch, dtype))
        product = torch.matmul
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        product(left, left)
        seconds.append(time.perf_counter() - began)
    return size**3 / min(seconds)


def counted(folder, template, details, dtype):
    """The model, compiled with counters."""
    graph = folder.path if folder.quantization else converted(folder, template)
    hint = {"bfloat16": "bf16", "float32": "f32"}.get(dtype, "bf16")
    options = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1}
    return core().compile_model(str(graph / GRAPH), "CPU", {**options, "INFERENCE_NUM_THREADS": os.cpu_count()})


def main():
    """Print lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    options = parser.parse_args()
    folder = read_model_folder(options.model)
    scorer = Scorer.load(folder, compute=ComputeSettings(engine="openvino"))
    dtype, template = scorer.model.dtype_name, scorer.tokenizer.template
    table = pq.read_table(options.data).slice(0, 100)
    cut = scorer.cut(scorer.tokenizer.documents(table, "text", None))
    index_W = np.arange(min(len(cut.length_W), MOST_WINDOWS))
    scorer.window_logits(cut, index_W)
    began = time.perf_counter()
    scorer.window_logits(cut, index_W)
    seconds, tokens = time.perf_counter() - began, int(cut.length_W[index_W].sum())
    graph = folder.path if folder.quantization else converted(folder, template)
    details = read_details(graph)
    compiled = counted(folder, template, details, dtype)
    length = int(scorer.plan.budget)
    rows = np.full((8, length), 7, np.int64)
    inputs = {"input_ids": rows, "attention_mask": np.ones_like(rows)}
    if details.takes_type_ids:
        inputs["token_type_ids"] = np.zeros_like(rows)
    request = compiled.create_infer_request()
    for _ in range(3):
        request.infer(inputs)
    shares = collections.Counter()
    for layer in request.profiling_info:
        shares[layer.node_type] += layer.real_time.total_seconds()
    whole = sum(shares.values())
    config = json.loads((folder.path / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    whole_layer = 4 * hidden**2 + 2 * hidden * inner
    per_token = (layers - 1) * whole_layer + 2 * hidden**2  # the last layer's keys and values (first_token.py)
    print(json.dumps({"model": options.model, "dtype": dtype, "tokens_per_s": round(tokens / seconds)}))
    for kind, value in shares.most_common(8):
        print(json.dumps({"layer": kind, "share": round(value / whole, 3)}))
    reached, best = per_token * tokens / seconds, best_rate(dtype)
    print(json.dumps({"linear_gmac_per_s": round(reached / 1e9), "best_gmac_per_s": round(best / 1e9),
                      "share_of_best": round(reached / best, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
