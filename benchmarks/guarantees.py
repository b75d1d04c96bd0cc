"""Count how often a promised precision or recall is missed on new documents, and what the promise costs.

    python benchmarks/guarantees.py                                     # synthetic scores, whose truth is known
    python benchmarks/guarantees.py runs/demo/model docs/demo/emails    # real scores: drawn from all labelled documents

A draw takes some of the documents with replacement as valid documents. The truth is the precision or recall on all
documents. The plain optimum (`tune` without --confidence) is tuned on the same draws.
"""

import argparse
import json

import numpy as np

from pipelines.decisions.guarantees import guarantee_thresholds
from pipelines.decisions.metrics import tune_thresholds
from pipelines.settings import ComputeSettings, DataSettings, DecisionSettings

ROWS = (100, 1_000, 10_000)


def synthetic(rng, count=400_000):
    """Scores of three labels, of which one is rare, and one is hard to see."""
    rates, apart, scale = np.array([0.3, 0.02, 0.3]), np.array([2.5, 3.0, 1.5]), np.array([1.0, 1.0, 0.7])
    truth_DL = rng.random((count, 3)) < rates
    logits_DL = scale * (truth_DL * apart + rng.normal(size=(count, 3)) + np.log(rates / (1 - rates)) - apart / 2)
    return DecisionSettings(kind="multilabel", labels=("common", "rare", "hard")), truth_DL, logits_DL


def real(model, data, columns):
    """Scores of labelled documents."""
    from pipelines.evaluation.labelled import labelled_files, score_labelled
    from pipelines.model_folder import read_model_folder

    folder = read_model_folder(model)
    scored = score_labelled(folder, labelled_files(data, columns, folder.decision), columns, ComputeSettings())
    if folder.decision.kind == "binary":
        return folder.decision, scored.targets[:, None] == 1, scored.scores_DL[:, 1:]
    return folder.decision, scored.targets == 1, scored.scores_DL


def shares(truth_D, score_D, threshold):
    """Precision and recall of a threshold on all documents."""
    chosen_D = score_D >= np.float32(threshold)
    return (truth_D[chosen_D].mean() if chosen_D.any() else 1.0), truth_D[chosen_D].sum() / max(truth_D.sum(), 1)


def run(options):
    """Print a line of JSON for each objective and number of valid documents."""
    rng = np.random.default_rng(options.seed)
    if options.model:
        decision, truth_DL, scores_DL = real(
            options.model, options.data, DataSettings(label_column=options.label_column)
        )
    else:
        decision, truth_DL, logits_DL = synthetic(rng)
        scores_DL = (1 / (1 + np.exp(-logits_DL))).astype(np.float32)
    labels = decision.labels[-truth_DL.shape[1] :]
    as_multilabel = DecisionSettings(kind="multilabel", labels=labels)
    for objective in options.objectives:
        name, share = objective.split("=")
        for rows in ROWS:
            draws = [
                draw(rng, rows, truth_DL, scores_DL, as_multilabel, objective, options) for _ in range(options.draws)
            ]
            promised = np.array([one[0] for one in draws]).reshape(-1, len(labels), 3)
            plain = np.array([one[1] for one in draws]).reshape(-1, len(labels), 2)
            kept, other = (0, 1) if name == "precision" else (1, 0)
            other_name = "recall" if other else "precision"
            holds_RL = promised[:, :, 2] == 1
            missed_RL = holds_RL & (promised[:, :, kept] < float(share))
            missed_by_plain_RL = plain[:, :, kept] < float(share)
            line = {
                "objective": objective,
                "rows": rows,
                "draws": options.draws,
                "missed_at_most": round(1 - options.confidence, 4),
                "missed_worst_label": float(missed_RL.mean(axis=0).max()),
                "plain_missed_worst_label": float(missed_by_plain_RL.mean(axis=0).max()),
                "labels_with_promise": float(holds_RL.mean()),
            }
            if holds_RL.any():
                line[other_name] = float(promised[:, :, other][holds_RL].mean())
                line[f"plain_{other_name}"] = float(plain[:, :, other][holds_RL].mean())
            print(json.dumps({key: round(value, 4) if isinstance(value, float) else value
                              for key, value in line.items()}), flush=True)  # fmt: skip


def draw(rng, rows, truth_DL, scores_DL, decision, objective, options):
    """Tune on some documents. Return precision, recall and promise of each label, and those of the plain optimum."""
    some = rng.integers(0, len(truth_DL), rows)
    targets, scores = truth_DL[some].astype(np.float32), scores_DL[some]
    found = guarantee_thresholds(targets, scores, decision, objective=objective, confidence=options.confidence)
    plain = tune_thresholds(targets, scores, decision, objective).thresholds
    columns = list(zip(truth_DL.T, scores_DL.T, strict=True))
    return (
        [
            (*shares(*column, one.threshold), one.holds)
            for column, one in zip(columns, found.labels.values(), strict=True)
        ],
        [shares(*column, threshold) for column, threshold in zip(columns, plain, strict=True)],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--objectives", nargs="+", default=["precision=0.9", "recall=0.9"])
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())
