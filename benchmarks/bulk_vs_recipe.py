"""Compare the bulk job with a bare `Scorer` loop over texts in memory and with the usual Ray Data recipe, in one run.

    python benchmarks/bulk_vs_recipe.py runs/demo/model [--repeat 4] [--recipe-actors 2] [--gpus]

The recipe is the one that Ray's documentation shows for inference on text: read_parquet, one class with tokenizer and
model in an actor per CPU (or GPU), float32, batches padded to the window length, write_parquet. It gets the same
windows from this package's window plan, because otherwise it would truncate the texts. The rates cover the steady
phase, from the first finished unit or batch to the last.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy
from transformers import AutoModelForSequenceClassification

from pipelines.bulk.job import ScoreJob
from pipelines.model.scorer import Scorer
from pipelines.on_ray.cluster import connected
from pipelines.on_ray.score import score
from pipelines.settings import ComputeSettings
from pipelines.text.tokenization import assemble, cut_documents
from pipelines.text.windows import merge_windows

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails" / "test"


class Recipe:
    """Tokenizer and model in one actor, as in tutorials."""

    def __init__(self, model, device):
        from pipelines.model.scorer import plan_of
        from pipelines.model_folder import read_model_folder
        from pipelines.text.pretrained import load_tokenizer

        folder = read_model_folder(model)
        self.tokenizer = load_tokenizer(folder.path)
        self.plan = plan_of(folder.windows, self.tokenizer, model_type=folder.model_type)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder.path).to(device).eval()
        self.device = device

    def __call__(self, batch):
        """Score a batch of texts: a dictionary of columns."""
        tokens = self.tokenizer.encode(list(batch["text"]))
        cut = cut_documents(tokens, self.plan, self.tokenizer.template)
        scores = []
        with torch.inference_mode():
            for start in range(0, len(cut.length_W), 32):
                index = np.arange(start, min(start + 32, len(cut.length_W)))
                rows = assemble(cut, self.tokenizer.template, index)
                ids = np.zeros((len(index), self.plan.max_length), np.int64)
                mask = np.arange(self.plan.max_length) < rows.length_W[:, None]
                ids[mask] = rows.ids
                inputs = torch.from_numpy(ids).to(self.device), torch.from_numpy(mask.astype(np.int64)).to(self.device)
                scores.append(self.model(inputs[0], attention_mask=inputs[1]).logits.softmax(-1).cpu().numpy())
        merged = merge_windows(np.concatenate(scores), cut.windows.offsets, "mean")
        return {
            "score": merged[:, 1],
            "label": (merged[:, 1] >= 0.5).astype(int),
            "at": np.full(len(merged), time.time()),
        }


def steady(folder):
    """Return the rows per second between the first finished file and the last."""
    files = sorted((path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in Path(folder).rglob("*.parquet")
                   if not path.name.startswith("_"))  # fmt: skip
    return sum(rows for _, rows in files[1:]) / max(files[-1][0] - files[0][0], 1e-9)


def main():
    """Print one line of JSON per program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--recipe-actors", type=int, default=2)
    parser.add_argument("--gpus", action="store_true")
    parser.add_argument("--unit-bytes", type=int, default=60_000)
    options = parser.parse_args()
    table = pa.concat_tables([pq.read_table(EMAILS)] * options.repeat).combine_chunks()
    texts = table["text"].to_pylist()
    results = {}

    scorer = Scorer.load(options.model, compute=ComputeSettings())
    scorer.predict(texts[:8])
    size = max(1, options.unit_bytes // (table["text"].nbytes // len(texts)))
    started = time.perf_counter()
    for start in range(0, len(texts), size):
        scorer.predict(texts[start : start + size])
    results["bare Scorer loop"] = len(texts) / (time.perf_counter() - started)
    dtype = str(scorer.model.dtype)
    del scorer
    with tempfile.TemporaryDirectory() as base:
        source = Path(base) / "in"
        source.mkdir()
        for number in range(16):
            part = table.slice(number * len(table) // 16, (number + 1) * len(table) // 16 - number * len(table) // 16)
            pq.write_table(part, source / f"{number:02}.parquet")
        with connected():
            values = {"model": options.model, "input": str(source), "output": f"{base}/out"}
            summary = score(ScoreJob.parse({**values, "unit_bytes": options.unit_bytes}))
            results["bulk job"] = steady(f"{base}/out")
            ray.data.DataContext.get_current().target_max_block_size = 128 * 2**20
            dataset = ray.data.read_parquet(str(source)).repartition(16)
            dataset.map_batches(
                Recipe,
                fn_constructor_args=(options.model, "cuda" if options.gpus else "cpu"),
                batch_size=max(8, len(texts) // 32),
                compute=ActorPoolStrategy(size=options.recipe_actors),
                num_cpus=1,
                num_gpus=1 if options.gpus else None,
            ).write_parquet(f"{base}/recipe")
            at = pq.read_table(f"{base}/recipe")["at"].to_numpy()
            results["usual recipe, float32"] = (at > at.min()).sum() / (at.max() - at.min())
    for name, rate in results.items():
        print(json.dumps({"way": name, "rows_per_s": round(rate, 2),
                          "of bare": round(rate / results["bare Scorer loop"], 2),
                          "of recipe": round(rate / results["usual recipe, float32"], 2)}))  # fmt: skip
    print(json.dumps({"dtype": dtype, "rows": len(texts), "seconds by stage": summary.seconds}))


if __name__ == "__main__":
    main()
