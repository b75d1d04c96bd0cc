"""Measure what it saves to compute only the first token in a model's last layer (pipelines/model/first_token.py).

    python benchmarks/last_layer.py runs/demo/model
    python benchmarks/last_layer.py runs/demo/model --int8   # also quantized by NNCF, without a contract

Both forms of the model run on the same windows, in turns. Times are the least of some repeats.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq

from pipelines.model import openvino_files
from pipelines.model.first_token import keep_first_token
from pipelines.model.openvino_model import OpenVinoModel
from pipelines.model.quantization import quantized_graphs
from pipelines.model.scorer import Scorer
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails" / "valid"


def compare(name, graph, details, template, dtype):
    """Print a line for each shape of a batch."""
    cut = graph.clone()
    places = keep_first_token(cut)
    compute = ComputeSettings(dtype=dtype)
    models = [OpenVinoModel.compile(each, details, template, compute)._requests.get() for each in (graph, cut)]
    for windows, tokens in ((8, 256), (16, 66), (1, 66)):
        rows = np.random.default_rng(0).integers(1000, details.vocabulary, (windows, tokens))
        inputs = {"input_ids": rows, "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}
        if not details.takes_type_ids:
            del inputs["token_type_ids"]
        logits = [model.infer(inputs)[0].copy() for model in models]
        least = [np.inf, np.inf]
        for _ in range(20):
            for number, model in enumerate(models):
                began = time.perf_counter()
                model.infer(inputs)
                least[number] = min(least[number], time.perf_counter() - began)
        line = {"model": name, "places": places, "windows": windows, "tokens": tokens,
                "whole_ms": round(1000 * least[0], 1), "first_ms": round(1000 * least[1], 1),
                "times_as_fast": round(least[0] / least[1], 3),
                "largest_difference": float(np.abs(logits[0] - logits[1]).max())}  # fmt: skip
        print(json.dumps(line), flush=True)


def main():
    """Print lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--int8", action="store_true")
    options = parser.parse_args()
    logging.getLogger("pipelines").setLevel(logging.ERROR)
    folder = read_model_folder(options.model)
    scorer = Scorer.load(folder, compute=ComputeSettings(engine="torch", dtype="float32"))
    template = scorer.tokenizer.template
    with mock.patch.object(openvino_files, "keep_first_token"):
        model = openvino_files.torch_model(folder, template)
        graph = openvino_files.convert(model, longest=folder.windows.max_length or 0)
    details = openvino_files.details_of(model)
    compare("float", graph, details, template, options.dtype)
    if options.int8:
        documents = scorer.tokenizer.documents(pq.read_table(EMAILS).slice(0, 100), "text", None)
        candidates = quantized_graphs(
            graph, details, template, scorer.cut(documents), None, num_documents=0, batch_tokens=2048
        )
        compare("int8", next(candidates), details, template, options.dtype)


if __name__ == "__main__":
    main()
