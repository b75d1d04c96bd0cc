"""Compare the training speed with the Hugging Face Trainer and Simple Transformers, in windows per second, in one run.

    python benchmarks/train_vs_trainers.py WEIGHTS st/bin/python [--batch-size 8] [--steps 60]
    python benchmarks/random_model.py base && \\
        python benchmarks/train_vs_trainers.py base python --skip simpletransformers --batch-size 32   # on a GPU

The second argument is the Python of the virtual environment that benchmarks/simpletransformers_run.py describes. It
must also contain `accelerate`, which the Trainer needs. The data are all windows of 256 tokens of some of the demo's
emails. The windows of the three systems differ by a token or two. Each system is timed from its tenth optimizer step to
its last, with the same torch hook, so loading and tokenizing are not counted.
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
"""Steps before the clock starts. In these steps kernels are selected and memory is allocated."""
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
    """Return complete emails and their labels (1 = spam), enough for about num_windows windows of 256 tokens."""
    import pyarrow.parquet as pq

    table = pq.read_table(EMAILS, columns=["text", "label"])
    texts, labels = table["text"].to_pylist(), [int(label == "spam") for label in table["label"].to_pylist()]
    enough, size = 0, 0
    while size < num_windows * 700:  # characters per window
        size += len(texts[enough])
        enough += 1
    return texts[:enough], labels[:enough]


def simpletransformers(options):
    """Train with Simple Transformers, with its own sliding windows and batches."""
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
    """Train with the Hugging Face Trainer. The tokenizer cuts the windows. Batches are padded to their longest."""
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
    """Run `pipelines train` in this process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.on_ray.train import train
    from pipelines.training.job import TrainJob

    texts, labels = emails(options.windows)
    pq.write_table(pa.table({"text": texts, "label": list(map(str, labels))}), f"{options.scratch}/emails.parquet")
    settings = {"train": f"{options.scratch}/emails.parquet", "model": options.weights, "kind": "binary", "epochs": 1,
                "output": f"{options.scratch}/model", "max_length": 256, "batch_size": options.batch_size,
                "train_dtype": options.dtype, "device": options.device, "num_workers": 0}  # fmt: skip
    if options.attention_dropout is not None:
        settings["attention_dropout"] = options.attention_dropout
    train(TrainJob.parse(settings))


def timed(run, options):
    """Run a system and print its number of optimizer steps and its windows per second."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times = []

    def note(*_):
        if len(times) in (SKIPPED, options.steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    run(options)
    steps = min(len(times) - 2, options.steps)  # the very last batch can be shorter
    seconds = times[steps] - times[SKIPPED]
    print(json.dumps({"steps": len(times), "windows_per_s": (steps - SKIPPED) * options.batch_size / seconds}))


def main():
    """Print one line of JSON per run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    parser.add_argument("python")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", action="append", default=[], help="skip the runs whose names start with this text")
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
