"""Windows a second in training, beside the Hugging Face Trainer and Simple Transformers, in one run.

    python benchmarks/train_vs_trainers.py WEIGHTS st/bin/python [--batch-size 8] [--steps 60]
    python benchmarks/random_model.py base && \\
        python benchmarks/train_vs_trainers.py base python --skip simpletransformers --batch-size 32   # on a GPU

The second argument is the Python of the virtual environment that benchmarks/simpletransformers_run.py describes, with
`accelerate` in it, which the Trainer needs. All windows of 256 of some of the demo's emails (the three cut them a token
or two apart). Each is timed from its tenth optimizer step to its last, by the same hook of torch, so that loading and
tokenizing count for none.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails" / "train"
SKIPPED = 10
"""Steps before the clock starts: kernels are chosen and memory is taken in these."""
RUNS = {
    "simpletransformers float32": {},
    "trainer float32": {"dtype": "float32"},
    "trainer bf16": {"dtype": "bfloat16"},
    "pipelines float32": {"dtype": "float32"},
    "pipelines auto": {"dtype": "auto"},
    "pipelines float32, no attention dropout": {"dtype": "float32", "attention_dropout": 0.0},
    "pipelines auto, no attention dropout": {"dtype": "auto", "attention_dropout": 0.0},
}


def emails(num_windows):
    """Texts and labels (1 = spam) of enough emails, whole, for about so many windows of 256 tokens."""
    import pyarrow.parquet as pq

    table = pq.read_table(EMAILS, columns=["text", "label"])
    texts, labels = table["text"].to_pylist(), [int(label == "spam") for label in table["label"].to_pylist()]
    enough, size = 0, 0
    while size < num_windows * 700:  # characters of a window
        size += len(texts[enough])
        enough += 1
    return texts[:enough], labels[:enough]


def simpletransformers(options):
    """Its own sliding windows; batches of its own."""
    import logging

    import pandas as pd
    from simpletransformers.classification import ClassificationModel

    logging.disable(logging.WARNING)
    arguments = {
        "sliding_window": True, "max_seq_length": 256, "train_batch_size": options.batch_size, "num_train_epochs": 1,
        "use_multiprocessing": False, "process_count": 1, "no_cache": True, "no_save": True, "silent": True,
        "save_model_every_epoch": False, "overwrite_output_dir": True, "output_dir": options.scratch,
    }  # fmt: skip
    texts, labels = emails(options.windows)
    on_gpu = options.device == "cuda"
    model = ClassificationModel("bert", options.weights, num_labels=2, args=arguments, use_cuda=on_gpu)
    model.train_model(pd.DataFrame({"text": texts, "labels": labels}))


def trainer(options):
    """Windows by the tokenizer's own overflow, padded to the longest of a batch."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(options.weights)
    texts, labels = emails(options.windows)
    cut = tokenizer(texts, truncation=True, max_length=256, stride=51, return_overflowing_tokens=True)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels[document]}
        for ids, mask, document in zip(
            cut["input_ids"], cut["attention_mask"], cut["overflow_to_sample_mapping"], strict=True
        )
    ]
    arguments = TrainingArguments(
        output_dir=options.scratch, per_device_train_batch_size=options.batch_size, num_train_epochs=1,
        bf16=options.dtype == "bfloat16", use_cpu=options.device == "cpu", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(options.weights, num_labels=2)
    Trainer(model, arguments, DataCollatorWithPadding(tokenizer), rows).train()


def pipelines(options):
    """`pipelines train`, in this process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.on_ray.train import TrainRequest, train

    texts, labels = emails(options.windows)
    pq.write_table(pa.table({"text": texts, "label": list(map(str, labels))}), f"{options.scratch}/emails.parquet")
    settings = {"train": f"{options.scratch}/emails.parquet", "model": options.weights, "kind": "binary", "epochs": 1,
                "output": f"{options.scratch}/model", "max_length": 256, "batch_size": options.batch_size,
                "train_dtype": options.dtype, "device": options.device, "num_workers": 0}  # fmt: skip
    if options.attention_dropout is not None:
        settings["attention_dropout"] = options.attention_dropout
    train(TrainRequest.parse(settings))


def timed(run, options):
    """Run it and print when its optimizer stepped."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times = []

    def note(*_):
        if len(times) in (SKIPPED, options.steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    run(options)
    steps = min(len(times) - 2, options.steps)  # the last batch of all may be a short one
    seconds = times[steps] - times[SKIPPED]
    print(json.dumps({"steps": len(times), "windows_per_s": (steps - SKIPPED) * options.batch_size / seconds}))


def main():
    """One line of JSON a run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    parser.add_argument("python")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", action="append", default=[], help="how names of runs to leave out begin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--attention-dropout", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.windows = options.steps * options.batch_size
    if options.run:
        with tempfile.TemporaryDirectory() as options.scratch:
            return timed(globals()[options.run], options)
    for name, settings in RUNS.items():
        system = name.split()[0]
        if name.startswith(tuple(options.skip)):
            continue
        command = [sys.executable if system == "pipelines" else options.python, __file__, options.weights, "-",
                   "--run", system, "--batch-size", str(options.batch_size), "--steps", str(options.steps),
                   "--device", options.device]  # fmt: skip
        for key, value in settings.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps({"system": name, **found, "windows_per_s": round(found["windows_per_s"], 1)}), flush=True)


if __name__ == "__main__":
    main()
