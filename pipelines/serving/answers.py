"""Convert a request body to a table of texts, and scores to the predictions of a response. Imports no Ray."""

from __future__ import annotations

import pyarrow as pa

from pipelines.decisions.labels import thresholds_by_label
from pipelines.errors import DataError
from pipelines.model.evidence import code_points
from pipelines.model.scorer import DocumentScores, Scorer
from pipelines.serving.schema import Pair, Prediction, WindowEvidence
from pipelines.settings import DecisionSettings


def as_table(inputs: list[str | Pair]) -> pa.Table:
    """Return the inputs as a table with the column text and, for pairs, text_pair.

    Raises:
        DataError: The inputs mix texts and pairs, or a text has a lone surrogate.
    """
    rows = [item if isinstance(item, Pair) else Pair(text=item) for item in inputs]
    columns = {"text": [row.text for row in rows]}
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    if pairs:
        if len(pairs) < len(rows):
            raise DataError("some inputs have a text_pair and others do not; send them in separate requests")
        columns["text_pair"] = pairs
    try:
        return pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()})
    except UnicodeEncodeError as error:
        raise DataError("an input is not valid Unicode: it contains a lone surrogate") from error


def predictions_of(
    scorer: Scorer, decision: DecisionSettings, scores: DocumentScores, with_windows: bool, texts: list[str]
) -> list[Prediction]:
    """Return one prediction per document.

    Args:
        scorer: The scorer that computed the scores.
        decision: Kind, labels and thresholds.
        scores: Scored documents.
        with_windows: Whether to include the windows and their scores.
        texts: The texts that were cut into windows (the second texts of pairs).
    """
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
            windows_read=None if scores.windows_read_D is None else int(scores.windows_read_D[row]),
            truncated=bool(scores.truncated_D[row]),
            windows=_evidence(scorer, scores.slice(row, row + 1), texts[row], names) if with_windows else None,
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
    """Return the code points and scores of each window of one document."""
    start_W, end_W = code_points(scorer.tokenizer, scores.windows, text)
    windows = zip(start_W.tolist(), end_W.tolist(), scores.window_scores_WL.tolist(), strict=True)
    return [
        WindowEvidence(start=start, end=end, scores=dict(zip(names, window_scores, strict=True)))
        for start, end, window_scores in windows
    ]
