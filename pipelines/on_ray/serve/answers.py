"""From a request body to a table of texts, and from scores to the predictions of a response. Knows no HTTP, no Ray."""

from __future__ import annotations

import pyarrow as pa

from pipelines.errors import DataError
from pipelines.labels import thresholds_by_label
from pipelines.on_ray.serve.schema import Pair, Prediction, WindowEvidence
from pipelines.scoring import DocumentScores, Scorer
from pipelines.settings import DecisionSettings


def as_table(inputs: list[str | Pair]) -> pa.Table:
    """Inputs as columns text (and text_pair). Raises DataError for a mixture and for lone surrogates."""
    rows = [item if isinstance(item, Pair) else Pair(text=item) for item in inputs]
    columns = {"text": [row.text for row in rows]}
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    if pairs:
        if len(pairs) < len(rows):
            raise DataError("some inputs have a text_pair and some have none; send them apart")
        columns["text_pair"] = pairs
    try:
        return pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()})
    except UnicodeEncodeError as error:
        raise DataError("an input is not valid Unicode: it holds a lone surrogate") from error


def predictions_of(
    scorer: Scorer, decision: DecisionSettings, scores: DocumentScores, with_windows: bool, texts: list[str]
) -> list[Prediction]:
    """One prediction per document; texts are those that were cut into windows."""
    decided = scorer.decide(scores, decision)
    names = list(decision.labels) or ["value"]
    thresholds = thresholds_by_label(decision)
    predictions = []
    for row, document_scores in enumerate(scores.scores_DL.tolist()):
        prediction = Prediction(
            scores=dict(zip(names, document_scores, strict=True)),
            thresholds=thresholds,
            num_tokens=int(scores.num_tokens_D[row]),
            num_windows=int(scores.num_windows_D[row]),
            truncated=bool(scores.truncated_D[row]),
            windows=_evidence(scorer, scores.part(row, row + 1), texts[row], names) if with_windows else None,
        )
        if decided.value_D is not None:
            prediction.value = float(decided.value_D[row])
        elif decided.positive_DL is not None:
            prediction.labels = [name for name, holds in zip(names, decided.positive_DL[row], strict=True) if holds]
        elif decided.label_D is not None and decided.score_D is not None and decided.label_D[row] >= 0:
            prediction.label = names[int(decided.label_D[row])]
            prediction.score = float(decided.score_D[row])
        predictions.append(prediction)
    return predictions


def _evidence(scorer: Scorer, scores: DocumentScores, text: str, names: list[str]) -> list[WindowEvidence]:
    """Each window's code points and scores."""
    spans = scorer.tokenizer.character_spans(text)
    evidence = []
    windows = zip(scores.windows.start_W, scores.windows.stop_W, scores.window_scores_WL.tolist(), strict=True)
    for start, stop, window_scores in windows:
        first, last = (int(spans[start, 0]), int(spans[stop - 1, 1])) if stop > start else (0, 0)
        evidence.append(WindowEvidence(start=first, end=last, scores=dict(zip(names, window_scores, strict=True))))
    return evidence
