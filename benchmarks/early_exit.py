"""What reading until sure saves and changes: windows, labels, time; and how often the promise of a fit is broken.

    python benchmarks/early_exit.py runs/demo/model docs/demo/emails

The margin is fitted on half of the documents, and used on the other half. For the promise, half of the documents are
drawn with replacement again and again; its truth is the share on all documents.
"""

import argparse
import json
import time

import numpy as np

from pipelines.decisions.calibration import WindowLogits
from pipelines.decisions.early_exit import _labels, fit_margin, replayed
from pipelines.errors import DataError
from pipelines.evaluation.labelled import labelled_files
from pipelines.model.scorer import Scorer, concat_scores
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings, DataSettings


def some_of(found, documents):
    """The window logits of some documents."""
    counts_D = np.diff(found.offsets)[documents]
    rows = [np.arange(found.offsets[one], found.offsets[one + 1]) for one in documents]
    return WindowLogits(
        found.logits_WL[np.concatenate(rows)], np.concatenate([[0], np.cumsum(counts_D)]), found.targets[documents]
    )


def timed(scorer, documents, repeats):
    """Scores, and the least seconds of some repeats."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        scores = scorer.score_documents(documents)
        seconds.append(time.perf_counter() - started)
    return scores, min(seconds)


def broken_promises(rng, found, folder, options):
    """Fit on draws of the documents. The share of draws whose rule keeps fewer labels than promised, on all of them."""
    full = _labels(found, folder.decision, folder.calibration)
    shares, broken, fitted_draws, read = {}, 0, 0, []
    size = len(found.targets)
    for _ in range(options.draws):
        drawn = some_of(found, rng.integers(0, size, size // 2))
        try:
            fitted = fit_margin(drawn, folder.decision, folder.calibration, share=options.share, confidence=0.95)
        except DataError:
            continue
        fitted_draws += 1
        rule = (fitted.margin, fitted.order, fitted.first)
        if rule not in shares:
            labels, read_D = replayed(found, folder.decision, folder.calibration, fitted)
            shares[rule] = ((labels == full).all(axis=1).mean(), read_D.sum() / found.offsets[-1])
        broken += shares[rule][0] < options.share
        read.append(shares[rule][1])
    return {
        "draws": options.draws,
        "fitted": fitted_draws,
        "broken": round(broken / max(fitted_draws, 1), 4),
        "may_be_broken": 0.05,
        "windows_read": round(float(np.mean(read)), 3) if read else None,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--share", type=float, default=0.99)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    folder, columns = read_model_folder(options.model), DataSettings(label_column=options.label_column)
    labelled = labelled_files(options.data, columns, folder.decision)
    scorer = Scorer.load(folder, compute=ComputeSettings(dtype=options.dtype))
    tables = [scorer.tokenizer.documents(table, "text") for table in labelled.tables()]
    scores = concat_scores([scorer.score_documents(table) for table in tables])
    good = np.flatnonzero([error is None for error in scores.errors])
    found = some_of(WindowLogits(scores.window_logits_WL, scores.windows.offsets, labelled.targets), good)
    order = rng.permutation(len(good))
    fitted = fit_margin(
        some_of(found, order[: len(order) // 2]), folder.decision, folder.calibration,
        share=options.share, confidence=0.95,
    )  # fmt: skip
    print(json.dumps({"fitted_on_half": fitted.to_json()}))
    everything = [table.take(np.arange(len(table))) for table in tables]
    from pipelines.text.tokenization import concat_documents

    other = concat_documents(everything).take(good[order[len(order) // 2 :]])
    full, seconds = timed(scorer, other, options.repeats)
    before = scorer.decide(full)
    print(json.dumps({"early_exit": "off", "seconds": round(seconds, 2), "windows": int(full.num_windows_D.sum())}))
    for mode in ("exact", "certified"):
        scorer.early_exit, scorer._margin = mode, fitted if mode == "certified" else None
        scores, taken = timed(scorer, other, options.repeats)
        after = scorer.decide(scores)
        one, two = (
            (before.label_D, after.label_D) if before.label_D is not None else (before.positive_DL, after.positive_DL)
        )
        changed = int((one != two).sum()) if one.ndim == 1 else int((one != two).any(axis=1).sum())
        print(json.dumps({
            "early_exit": mode, "seconds": round(taken, 2), "times_faster": round(seconds / taken, 2),
            "windows_read": round(float(scores.windows_read_D.sum() / scores.num_windows_D.sum()), 3),
            "labels_changed": changed, "documents": len(other),
        }))  # fmt: skip
    print(json.dumps(broken_promises(rng, found, folder, options)))
