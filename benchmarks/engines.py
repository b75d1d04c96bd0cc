"""Score the same emails with every engine on this machine, and with other libraries: speed, and labels that change.

    python benchmarks/engines.py runs/demo/model --int8 runs/demo/int8 --simpletransformers st/bin/python
    python3 -m venv sbert && sbert/bin/pip install torch==2.13.0 "sentence-transformers[openvino]"
    pip install onnx onnxruntime
    python benchmarks/engines.py runs/demo/model --sentence-transformers sbert/bin/python

--int8 is a folder of `pipelines quantize`. benchmarks/simpletransformers_run.py says how to create its Python.
All systems score the demo's test emails, complete, in windows of 256 tokens with a stride of 0.8. Times are those of
tokenizing and scoring in one process, without the start: the least of some repeats for ours, one run for the others.
The Hugging Face pipeline, ONNX Runtime and sentence-transformers get the windows as texts. With early exit, the margin
is that of the folder (`pipelines tune --early-exit`). Labels are compared with those of PyTorch in float32.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from pipelines.errors import PipelinesError
from pipelines.model.openvino_model import processor_name
from pipelines.model.scorer import Scorer
from pipelines.settings import ComputeSettings

ROOT = Path(__file__).parent.parent
EMAILS = ROOT / "docs" / "demo" / "emails" / "test"
FEATURES = ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2")


def processor():
    """Name and features of this machine's processor."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in FEATURES if name in flags],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def least(run, repeats):
    """Result and least seconds of some repeats."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - started)
    return found, min(seconds)


def window_texts(scorer, emails, folder):
    """The text of every window, and the offsets of the documents in them."""
    from transformers import AutoTokenizer

    documents = scorer.tokenizer.documents(emails, "text", None)
    cut = scorer.cut(documents)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows, tokens = cut.windows, documents.tokens
    starts = tokens.offsets[windows.document_W]
    return [
        tokenizer.decode(tokens.ids[first + start : first + stop])
        for first, start, stop in zip(starts, windows.start_W, windows.stop_W, strict=True)
    ], windows.offsets


def merged(scores_W, offsets, threshold):
    """Labels of documents by the mean of their windows' scores."""
    return np.add.reduceat(scores_W, offsets[:-1]) / np.diff(offsets) >= threshold


def hugging_face(folder, texts, repeats):
    """Scores of the positive label by transformers' pipeline, and seconds."""
    from transformers import pipeline

    classifier = pipeline("text-classification", model=folder, device="cpu", top_k=None)
    name = classifier.model.config.id2label[1]

    def run():
        found = classifier(texts, batch_size=16, truncation=True, max_length=256)
        return np.array([next(one["score"] for one in row if one["label"] == name) for row in found])

    return least(run, repeats)


def onnx_int8(folder, texts, repeats):
    """Scores of the positive label by ONNX Runtime with dynamically quantized weights, and seconds."""
    import tempfile

    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tokenizer(["one text", "another text, longer"], padding=True, return_tensors="pt")
    with tempfile.TemporaryDirectory() as scratch:
        plain, quantized = f"{scratch}/plain.onnx", f"{scratch}/int8.onnx"
        axes = {name: {0: "windows", 1: "tokens"} for name in names}
        torch.onnx.export(model, tuple(example[name] for name in names), plain, input_names=names,
                          output_names=["logits"], dynamic_axes=axes, dynamo=False)  # fmt: skip
        quantize_dynamic(plain, quantized)
        session = onnxruntime.InferenceSession(quantized, providers=["CPUExecutionProvider"])
    order = np.argsort([-len(text) for text in texts])

    def run():
        scores_W = np.zeros(len(texts))
        for batch in np.array_split(order, -(-len(order) // 16)):
            some = [texts[row] for row in batch]
            inputs = tokenizer(some, padding=True, truncation=True, max_length=256, return_tensors="np")
            logits_WL = session.run(None, {name: inputs[name].astype(np.int64) for name in names})[0]
            odds_WL = np.exp(logits_WL - logits_WL.max(axis=1, keepdims=True))
            scores_W[batch] = (odds_WL / odds_WL.sum(axis=1, keepdims=True))[:, 1]
        return scores_W

    return least(run, repeats)


SENTENCE_TRANSFORMERS = """
import json, sys, time
import numpy as np
from sentence_transformers import CrossEncoder
folder, texts = sys.argv[1], json.load(sys.stdin)
model = CrossEncoder(folder, backend="openvino", device="cpu", max_length=256)
model.predict([[text] for text in texts[:16]])
started = time.perf_counter()
scores = model.predict([[text] for text in texts], batch_size=16, apply_softmax=True, show_progress_bar=False)
print(json.dumps({"seconds": time.perf_counter() - started, "scores": np.asarray(scores)[:, 1].tolist()}))
"""


def sentence_transformers(python, folder, texts):
    """Scores of the positive label by sentence-transformers' CrossEncoder with OpenVINO, and seconds."""
    command = [python, "-c", SENTENCE_TRANSFORMERS, folder]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImportError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return np.array(found["scores"]), found["seconds"]


def main() -> None:
    """Print a line of JSON per system."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--int8")
    parser.add_argument("--simpletransformers", help="Python of an environment that has it")
    parser.add_argument("--sentence-transformers", help="Python of an environment that has it")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(processor()), flush=True)
    emails = pq.read_table(EMAILS).select(["text"])
    expected, slowest = None, None

    def show(name, seconds, labels=None, **more):
        nonlocal slowest
        slowest = slowest or seconds
        changed = None if labels is None else sum(a != b for a, b in zip(labels, expected, strict=True))
        print(json.dumps({"system": name, "seconds": round(seconds, 2), "rows_per_s": round(len(emails) / seconds, 1),
                          "times_as_fast": round(slowest / seconds, 2), "labels_changed": changed, **more}),
              flush=True)  # fmt: skip

    reference = Scorer.load(options.folder, compute=ComputeSettings(engine="torch", dtype="float32"))
    table, seconds = least(lambda: reference.predict(emails), 1)
    expected = table["predicted_label"].to_pylist()
    if options.simpletransformers:
        script = str(ROOT / "benchmarks" / "simpletransformers_run.py")
        command = [options.simpletransformers, script, "predict", options.folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        show("Simple Transformers, float32", json.loads(done.stdout.splitlines()[-1])["predict_seconds"])
    texts, offsets = window_texts(reference, emails, options.folder)
    positive, threshold = reference.decision.labels[-1], reference.decision.thresholds[-1]
    others = {
        "Hugging Face pipeline, float32": lambda: hugging_face(options.folder, texts, 1),
        "ONNX Runtime, int8 dynamic": lambda: onnx_int8(options.folder, texts, 1),
    }
    if options.sentence_transformers:
        others["sentence-transformers, OpenVINO float32"] = lambda: sentence_transformers(
            options.sentence_transformers, options.folder, texts
        )
    for name, run in others.items():
        try:
            scores_W, needed = run()
        except ImportError as error:
            print(json.dumps({"system": name, "skipped": str(error)}), flush=True)
            continue
        labels = merged(scores_W, offsets, threshold)
        show(name, needed, [positive if label else reference.decision.labels[0] for label in labels])
    show("ours: torch, float32", seconds, expected)
    ways = [("torch", "bfloat16", options.folder), ("openvino", "float32", options.folder),
            ("openvino", "bfloat16", options.folder)]  # fmt: skip
    if options.int8:
        ways.append(("openvino", "auto", options.int8))
    for engine, dtype, folder in ways:
        for early_exit in ("off", "exact", "certified"):
            try:
                scorer = Scorer.load(folder, compute=ComputeSettings(engine=engine, dtype=dtype), early_exit=early_exit)
            except PipelinesError as error:
                print(json.dumps({"skipped": str(error)}), flush=True)
                continue
            scorer.predict(emails.slice(0, 20))
            table, seconds = least(lambda scorer=scorer: scorer.predict(emails), options.repeats)
            windows = table["num_windows"].to_numpy().sum()
            read = table["windows_read"].to_numpy().sum() if "windows_read" in table.column_names else windows
            show(f"ours: {engine}, {scorer.model.dtype_name}, early_exit={early_exit}", seconds,
                 table["predicted_label"].to_pylist(), windows_read=round(float(read / windows), 3))  # fmt: skip


if __name__ == "__main__":
    main()
