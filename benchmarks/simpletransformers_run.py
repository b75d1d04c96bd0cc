"""Run Simple Transformers on the demo's emails, for comparison. It runs in its own virtual environment:

    python3 -m venv st && st/bin/pip install torch==2.13.0 && st/bin/pip install simpletransformers==0.70.8
    st/bin/python benchmarks/simpletransformers_run.py train WEIGHTS OUT --seed 42      # the demo's budget
    st/bin/python benchmarks/simpletransformers_run.py predict runs/demo/model          # the demo's folder

The script prints one line of JSON. Multiprocessing is off, because its workers fork after a forward pass and hang.
"""

import argparse
import json
import logging
import os
import resource
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pandas as pd
from simpletransformers.classification import ClassificationModel
from sklearn.metrics import matthews_corrcoef

EMAILS = os.path.join(os.path.dirname(__file__), "..", "docs", "demo", "emails")
COMMON = {
    "use_multiprocessing": False,
    "use_multiprocessing_for_evaluation": False,
    "process_count": 1,
    "sliding_window": True,
    "max_seq_length": 256,
    "reprocess_input_data": True,
    "overwrite_output_dir": True,
    "no_cache": True,
    "no_save": True,
    "silent": True,
    "save_model_every_epoch": False,
    "save_eval_checkpoints": False,
}


def read(split: str) -> pd.DataFrame:
    """Return one split with the columns text and labels (1 = spam)."""
    emails = pd.read_parquet(os.path.join(EMAILS, split))
    return pd.DataFrame({"text": emails["text"], "labels": (emails["label"] == "spam").astype(int)})


def main() -> None:
    """Train with the demo's budget or open a folder. Then predict the test emails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "predict"])
    parser.add_argument("model")
    parser.add_argument("output", nargs="?", default="runs/simpletransformers")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--windows", action="store_true", help="train on all windows, not only on each email's first")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    arguments = {
        **COMMON,
        "output_dir": options.output,
        "manual_seed": options.seed,
        "num_train_epochs": 1,
        "train_batch_size": 8,
        "learning_rate": 1e-4,
        "eval_batch_size": 32,
        "sliding_window": options.windows if options.what == "train" else True,
    }
    model = ClassificationModel("bert", options.model, num_labels=2, args=arguments, use_cuda=False)
    result = {"what": options.what, "seed": options.seed}
    if options.what == "train":
        started = time.perf_counter()
        model.train_model(read("train").head(400))
        result["train_seconds"] = round(time.perf_counter() - started, 1)
        model.args.sliding_window = True
    test = read("test")
    started = time.perf_counter()
    predictions, _ = model.predict(test["text"].tolist())
    result["predict_seconds"] = round(time.perf_counter() - started, 1)
    result["mcc"] = round(matthews_corrcoef(test["labels"], list(predictions)), 4)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
