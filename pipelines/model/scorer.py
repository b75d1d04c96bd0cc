"""`Scorer`: texts -> windows -> logits -> merged scores -> labels.

The predict, score and serve commands all compute scores here. Imports no Ray, and reads no files except those of the
model folder.

Shapes: D documents, W windows of all documents, L labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.decisions.columns import result_columns
from pipelines.decisions.early_exit import Margin, Reading, margin_of
from pipelines.decisions.labels import Decisions, decide, merged_scores, resolve_thresholds
from pipelines.errors import DataError
from pipelines.model.engine import SHORTEST_STEP, Engine
from pipelines.model.evidence import window_column
from pipelines.model.loading import load_engine
from pipelines.model_folder import ModelFolder, read_model_folder, verify_weights
from pipelines.progress import Progress
from pipelines.settings import (
    UNCALIBRATED,
    Calibration,
    ComputeSettings,
    DecisionSettings,
    EarlyExit,
    WindowSettings,
)
from pipelines.storage.columns import string_array, text_column_problem, with_missing_texts
from pipelines.storage.tables import as_table
from pipelines.text.pretrained import load_tokenizer
from pipelines.text.tokenization import CutDocuments, Documents, Tokenizer, Tokens, cut_documents
from pipelines.text.windows import (
    WindowPlan,
    Windows,
    concat_windows,
    count_votes,
    leads_with_space,
    most_tokens_of,
    resolve_plan,
)

CHUNK_ROWS = 1024
"""Texts that `predict` scores at once. With more, it shows its progress."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DocumentScores:
    """The model's results for D documents, before thresholds. All arrays are in document order."""

    scores_DL: NDArray[np.float32]
    """Merged probabilities (regression: values)."""
    votes_DL: NDArray[np.int64] | None
    """Number of windows in which each label has the largest logit. None unless the kind has a single label."""
    windows: Windows
    """Positions of the windows, in tokens of the text (of the second text of a pair)."""
    window_logits_WL: NDArray[np.float32]
    window_scores_WL: NDArray[np.float32]
    """Logits after activation: probabilities (regression: values)."""
    num_tokens_D: NDArray[np.int64]
    """Tokens of each document, without special tokens."""
    errors: list[str | None]
    """Why a document has no score, or None. After an error, the document's other values have no meaning."""
    all_windows_D: NDArray[np.int64] | None = None
    """With early exit: number of windows of each document. The arrays above have only those that were read."""

    @property
    def num_windows_D(self) -> NDArray[np.int64]:
        """Number of windows of each document; 0 for a document with an error."""
        return self._unless_error(self.windows.num_windows_D if self.all_windows_D is None else self.all_windows_D)

    @property
    def windows_read_D(self) -> NDArray[np.int64] | None:
        """With early exit: number of windows that were read of each document. None without."""
        return None if self.all_windows_D is None else self._unless_error(self.windows.num_windows_D)

    def _unless_error(self, values_D: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where([error is None for error in self.errors], values_D, 0)

    @property
    def truncated_D(self) -> NDArray[np.bool_]:
        """Whether some tokens of the document are in no window."""
        return self.windows.truncated_D

    def slice(self, start: int, stop: int) -> DocumentScores:
        """Return the slice of documents [start, stop)."""
        first, last = self.windows.offsets[start], self.windows.offsets[stop]
        return DocumentScores(
            self.scores_DL[start:stop],
            None if self.votes_DL is None else self.votes_DL[start:stop],
            self.windows.slice(start, stop),
            self.window_logits_WL[first:last],
            self.window_scores_WL[first:last],
            self.num_tokens_D[start:stop],
            self.errors[start:stop],
            None if self.all_windows_D is None else self.all_windows_D[start:stop],
        )


def concat_scores(pieces: Sequence[DocumentScores]) -> DocumentScores:
    """Concatenate slices of documents, in order."""
    votes = [piece.votes_DL for piece in pieces if piece.votes_DL is not None]
    planned = [piece.all_windows_D for piece in pieces if piece.all_windows_D is not None]
    return DocumentScores(
        np.concatenate([piece.scores_DL for piece in pieces]),
        np.concatenate(votes) if votes else None,
        concat_windows([piece.windows for piece in pieces]),
        np.concatenate([piece.window_logits_WL for piece in pieces]),
        np.concatenate([piece.window_scores_WL for piece in pieces]),
        np.concatenate([piece.num_tokens_D for piece in pieces]),
        [error for piece in pieces for error in piece.errors],
        np.concatenate(planned) if planned else None,
    )


def results_of(scores: DocumentScores, decision: DecisionSettings, *, prefix: str = "") -> pa.Table:
    """Return the output columns of scored documents under a decision, one row per document.

    Args:
        scores: Scored documents.
        decision: Kind, labels, thresholds and merge.
        prefix: Put before the name of every column.
    """
    return result_columns(
        decide(scores.scores_DL, decision, scores.votes_DL),
        scores.scores_DL,
        decision=decision,
        num_tokens_D=scores.num_tokens_D,
        num_windows_D=scores.num_windows_D,
        windows_read_D=scores.windows_read_D,
        truncated_D=scores.truncated_D,
        errors=scores.errors,
        prefix=prefix,
    )


class Scorer:
    """A model with its tokenizer, window plan and decision: everything between a text and its label.

    Several threads may use one scorer.

    Example:
        >>> scorer = Scorer.load("runs/spam")
        >>> scorer.predict(["a text of any length", None]).to_pandas()
    """

    def __init__(
        self,
        model: Engine,
        tokenizer: Tokenizer,
        plan: WindowPlan,
        decision: DecisionSettings,
        *,
        calibration: Calibration = UNCALIBRATED,
        early_exit: EarlyExit = "off",
        margin: Margin | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.decision = decision
        self.calibration = calibration
        self.early_exit = early_exit
        self._margin = margin if early_exit == "certified" else None

    def __repr__(self) -> str:
        model, decision = self.model, self.decision
        rows = "packed" if model.is_packed else "padded"
        where = f"{model.model_type} on {model.device_name}, {model.name} in {model.dtype_name}, {rows}"
        return f"Scorer({decision}; {where}; windows of {self.plan.max_length} tokens)"

    @classmethod
    def load(
        cls,
        location: str | PathLike[str] | ModelFolder,
        *,
        compute: ComputeSettings | None = None,
        thresholds: float | tuple[float, ...] | Mapping[str, float] | None = None,
        early_exit: EarlyExit = "off",
    ) -> Scorer:
        """Open a model folder. Errors are raised before any text is scored.

        Args:
            location: Path or URL of a model folder, a Hugging Face classifier or its name on the Hub, or a folder that
                was read already.
            compute: Device, dtype and other settings of the forward pass. None means the defaults.
            thresholds: Replaces the thresholds of the folder: one number, one per label, or {label: number}.
            early_exit: Whether texts are read only until their label is sure: off, exact or certified.

        Raises:
            ModelFolderError: The folder is not a finished model folder, or cannot be read.
            SettingsError: The settings do not fit the model or this machine.
        """
        folder = location if isinstance(location, ModelFolder) else read_model_folder(fspath(location))
        verify_weights(folder)
        decision = resolve_thresholds(thresholds, folder.decision)
        margin = margin_of(folder, decision, early_exit)
        tokenizer = load_tokenizer(folder.path, lead_space=leads_with_space(folder.windows, folder.model_type))
        model = load_engine(folder, tokenizer.template, compute or ComputeSettings())
        tokenizer.check_vocabulary(model.vocabulary, where=str(folder.path))
        plan = plan_of(folder.windows, tokenizer, model_type=folder.model_type, model_limit=model.row_limit)
        tokenizer = tokenizer.with_most_tokens(most_tokens_of(folder.windows))
        return cls(
            model, tokenizer, plan, decision, calibration=folder.calibration, early_exit=early_exit, margin=margin
        )

    def warm_up(self) -> None:
        """Run one text of each possible row length, so that no short request waits until a kernel is compiled."""
        for num_tokens in range(0, self.plan.budget + 1, SHORTEST_STEP):
            tokens = Tokens(np.full(num_tokens, self.tokenizer.template.pad_id, np.int32), np.array([0, num_tokens]))
            self.score_documents(Documents(tokens, None, [None]))

    def run_windows(self, most: int, length: int) -> int:
        """Run different windows of this many tokens of text at once, at most `most`. Returns their number of tokens."""
        pad_id = self.tokenizer.template.pad_id
        num_texts = min(most, length)
        ids = np.full((num_texts, length), pad_id, np.int32)
        ids[np.tri(num_texts, length, dtype=bool)] = 1 if pad_id == 0 else 0  # equal windows would be run once
        tokens = Tokens(ids.reshape(-1), np.arange(num_texts + 1) * length)
        cut = self.cut(Documents(tokens, None, [None] * num_texts))
        self.model.logits(cut)
        return int(cut.length_W.sum())

    def score_documents(self, documents: Documents) -> DocumentScores:
        """Score tokenized documents. A document whose logits are not finite gets an error."""
        cut = self.cut(documents)
        reading = self.reading(cut, self.decision)
        if reading is None:
            return self.merge(documents, cut, self.model.logits(cut))
        logits_WL = np.zeros((len(cut.windows.document_W), self.decision.num_labels), np.float32)
        while len(index_W := reading.next_windows()):
            logits_WL[index_W] = self.window_logits(cut, index_W)
            reading.add(index_W, logits_WL[index_W])
        return self.merge(documents, cut, logits_WL, reading)

    def reading(self, cut: CutDocuments, decision: DecisionSettings) -> Reading | None:
        """Begin to read documents until their labels under a decision are sure.

        A fitted margin holds only for the decision of this scorer; for others, labels are exactly those of a full read.

        Returns:
            None without early exit: all windows are read.
        """
        if self.early_exit == "off":
            return None
        margin = self._margin if decision == self.decision else None
        return Reading(cut.windows.offsets, decision, self.calibration, margin)

    def cut(self, documents: Documents) -> CutDocuments:
        """Cut tokenized documents into windows."""
        return cut_documents(documents.tokens, self.plan, self.tokenizer.template, documents.pair_tokens)

    def window_logits(self, cut: CutDocuments, index_W: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of some windows, in the order of index_W."""
        return self.model.logits(cut, index_W)

    def merge(
        self,
        documents: Documents,
        cut: CutDocuments,
        logits_WL: NDArray[np.float32],
        reading: Reading | None = None,
    ) -> DocumentScores:
        """Merge window logits into document scores and votes: those of all windows, or of those that count."""
        windows = cut.windows
        if reading is not None:
            windows, logits_WL = windows.where(reading.counts_W), logits_WL[reading.counts_W]
        offsets = windows.offsets
        finite_W = np.asarray(np.isfinite(logits_WL).all(axis=1))
        errors = list(documents.errors)
        for row in windows.document_W[np.flatnonzero(~finite_W)]:
            errors[row] = errors[row] or "the model's output is not finite"
        logits_WL = np.where(finite_W[:, None], logits_WL, np.float32(0))
        single = self.decision.kind in ("binary", "multiclass")
        votes_DL = count_votes(logits_WL, offsets) if single else None
        scored = merged_scores(logits_WL, offsets, self.decision, self.calibration)
        all_windows_D = None if reading is None else cut.windows.num_windows_D
        return DocumentScores(
            scored[0], votes_DL, windows, logits_WL, scored[1], documents.num_tokens_D, errors, all_windows_D
        )

    def decide(self, scores: DocumentScores, decision: DecisionSettings | None = None) -> Decisions:
        """Decide labels from scores, with the thresholds of this scorer or of another decision."""
        return decide(scores.scores_DL, decision or self.decision, scores.votes_DL)

    def results(self, scores: DocumentScores, *, prefix: str = "") -> pa.Table:
        """Return the output columns of scored documents, one row per document.

        The columns are predicted_label(s) or predicted_value, score, scores and so on; prefix is put before each name.
        """
        return results_of(scores, self.decision, prefix=prefix)

    def score_table(self, table: pa.Table, text_column: str = "text", text_pair_column: str | None = None) -> pa.Table:
        """Score the texts of an Arrow table: one row of output columns per input row."""
        return self._results_of(table, [text_column, *([] if text_pair_column is None else [text_pair_column])])

    def predict(self, texts: Any, *, windows: bool = False) -> pa.Table:
        """Score texts in memory: one row of output columns per text. None, NaN and NA give a row with an error.

        Many texts show their progress, as a bar in a notebook and on a terminal.

        Args:
            windows: Whether to add the column `windows`: for each window of a text its first code point, the one behind
                its last (of the second text of a pair), and its scores.
            texts: A text, a list of texts or of pairs (text, text_pair), a pandas or polars series, or a table (frame,
                dataset, columns by name, rows by name) with a column text, and text_pair for pairs.

        Raises:
            DataError: The texts have none of these forms, or a text is not a string.
        """
        table = _texts_in(texts)
        return self._results_of(table, table.column_names, windows=windows)

    def _results_of(self, table: pa.Table, columns: Sequence[str], *, windows: bool = False) -> pa.Table:
        """Score the texts of some columns, CHUNK_ROWS at a time."""
        found = []
        is_long = len(table) > CHUNK_ROWS
        with Progress(logger, "scored", total=len(table), unit="texts", is_shown=is_long) as progress:
            for start in range(0, max(len(table), 1), CHUNK_ROWS):
                chunk = table.slice(start, CHUNK_ROWS)
                scores = self.score_documents(self.tokenizer.documents(chunk, *columns))
                results = self.results(scores)
                if windows:
                    column = window_column(self.tokenizer, scores, chunk.column(columns[-1]), self.decision.labels)
                    results = results.append_column("windows", column)
                found.append(results)
                progress.advance(len(chunk))
        return pa.concat_tables(found)


def _texts_in(texts: Any) -> pa.Table:
    """Return texts in memory as a table with the column text, and text_pair for pairs."""
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        return _text_columns(pa.table({"text": texts}))
    if isinstance(texts, pa.RecordBatchReader):
        return _text_columns(texts.read_all())
    if isinstance(texts, Mapping) or hasattr(texts, "columns") or hasattr(texts, "column_names"):
        return _text_columns(as_table(texts))
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise DataError(f"predict takes a text, a list of texts or a table, not {type(texts).__name__}")
    values: Any = texts if hasattr(texts, "dtype") else list(texts)
    first = values[0] if isinstance(values, list) and values else None
    if isinstance(first, Mapping):
        return _text_columns(as_table(values))
    if isinstance(first, (list, tuple)):
        if any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in values):
            raise DataError("every pair must be (text, text_pair)")
        sides = {"text": 0, "text_pair": 1}
        return pa.table({name: string_array([pair[side] for pair in values]) for name, side in sides.items()})
    return pa.table({"text": string_array(values)})


def _text_columns(table: pa.Table) -> pa.Table:
    """Return the columns text and, if there is one, text_pair of a table."""
    names = [name for name in ("text", "text_pair") if name in table.column_names]
    table = with_missing_texts(table, names)
    problem = text_column_problem(table.schema, "text")
    if problem is not None:
        raise DataError(
            f"the table {problem}; rename the column of the texts to 'text', or give the column itself, or name it: "
            "pipelines.score(MODEL, TABLE, text_column=NAME)"
        )
    return table.select(names)


def rescored(scores: DocumentScores, decision: DecisionSettings, calibration: Calibration) -> DocumentScores:
    """Return the same logits, merged under another decision and calibration."""
    merged, of_windows = merged_scores(scores.window_logits_WL, scores.windows.offsets, decision, calibration)
    return replace(scores, scores_DL=merged, window_scores_WL=of_windows)


def plan_of(
    windows: WindowSettings, tokenizer: Tokenizer, *, model_type: str, model_limit: int | None = None
) -> WindowPlan:
    """Resolve window settings into a window plan for a tokenizer and a model.

    Args:
        windows: Window settings.
        tokenizer: Its special tokens are reserved in every window.
        model_type: Name of the architecture in config.json.
        model_limit: Longest input row of the model, in tokens. None means no limit.

    Raises:
        SettingsError: The settings do not fit the tokenizer or the model.
    """
    special = tokenizer.template.num_special_tokens(pair=False)
    return resolve_plan(windows, num_special_tokens=special, model_limit=model_limit, model_type=model_type)
