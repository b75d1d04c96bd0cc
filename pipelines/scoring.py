"""`Scorer`: texts -> windows -> logits -> merged scores -> labels. The one truth behind predict, score and serve.

Knows no ray and no files beyond the model folder.

Shapes: D documents, W windows of all documents, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.labels import Decisions, activate, decide, resolve_thresholds
from pipelines.model import SHORTEST_STEP, WindowModel, load_model
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.pretrained import load_tokenizer
from pipelines.settings import ComputeSettings, DecisionSettings, WindowSettings
from pipelines.tables import result_columns
from pipelines.tokenization import CutDocuments, Documents, Tokenizer, Tokens, cut_documents
from pipelines.windows import (
    WindowPlan,
    Windows,
    concat_windows,
    count_votes,
    leads_with_space,
    merge_windows,
    resolve_plan,
)


@dataclass(frozen=True)
class DocumentScores:
    """What the model says of D documents, before thresholds. All arrays are in document order."""

    scores_DL: NDArray[np.float32]
    """Merged probabilities (regression: values)."""
    votes_DL: NDArray[np.int64] | None
    """Windows whose largest logit is each label; single label only."""
    windows: Windows
    """Where the windows lie, in tokens of the text (of a pair's second text)."""
    window_logits_WL: NDArray[np.float32]
    window_scores_WL: NDArray[np.float32]
    """Activated logits."""
    num_tokens_D: NDArray[np.int64]
    """Tokens of each document without special tokens."""
    errors: list[str | None]
    """Why a document has no score; its rows above are then without meaning."""

    @property
    def num_windows_D(self) -> NDArray[np.int64]:
        """Windows of each document; 0 where there is an error."""
        return np.where([error is None for error in self.errors], self.windows.num_windows_D, 0)

    @property
    def truncated_D(self) -> NDArray[np.bool_]:
        """Whether tokens of the document are in no window."""
        return self.windows.truncated_D

    def part(self, start: int, stop: int) -> DocumentScores:
        """Documents [start, stop)."""
        first, last = self.windows.offsets[start], self.windows.offsets[stop]
        return DocumentScores(
            self.scores_DL[start:stop],
            None if self.votes_DL is None else self.votes_DL[start:stop],
            self.windows.part(start, stop),
            self.window_logits_WL[first:last],
            self.window_scores_WL[first:last],
            self.num_tokens_D[start:stop],
            self.errors[start:stop],
        )


def concat_scores(parts: Sequence[DocumentScores]) -> DocumentScores:
    """The documents of all parts, in order."""
    votes = [part.votes_DL for part in parts if part.votes_DL is not None]
    return DocumentScores(
        np.concatenate([part.scores_DL for part in parts]),
        np.concatenate(votes) if votes else None,
        concat_windows([part.windows for part in parts]),
        np.concatenate([part.window_logits_WL for part in parts]),
        np.concatenate([part.window_scores_WL for part in parts]),
        np.concatenate([part.num_tokens_D for part in parts]),
        [error for part in parts for error in part.errors],
    )


def results_of(scores: DocumentScores, decision: DecisionSettings, *, prefix: str = "") -> pa.Table:
    """The output columns of scored documents under a decision, one row each."""
    return result_columns(
        decide(scores.scores_DL, decision, scores.votes_DL),
        scores.scores_DL,
        decision=decision,
        num_tokens_D=scores.num_tokens_D,
        num_windows_D=scores.num_windows_D,
        truncated_D=scores.truncated_D,
        errors=scores.errors,
        prefix=prefix,
    )


class Scorer:
    """A model with its tokenizer, windows and decision: everything between a text and its label."""

    def __init__(
        self,
        model: WindowModel,
        tokenizer: Tokenizer,
        plan: WindowPlan,
        decision: DecisionSettings,
        *,
        temperature: float = 1.0,
    ) -> None:
        model.settle_rows(plan.max_length)
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.decision = decision
        self.temperature = temperature

    @classmethod
    def load(
        cls,
        location: str | ModelFolder,
        *,
        compute: ComputeSettings | None = None,
        thresholds: float | tuple[float, ...] | Mapping[str, float] | None = None,
    ) -> Scorer:
        """Open a model folder (a path or URL, or one already read).

        thresholds override the folder's. Raises ModelFolderError and SettingsError before any work.
        """
        folder = read_model_folder(location) if isinstance(location, str) else location
        decision = resolve_thresholds(thresholds, folder.decision)
        tokenizer = load_tokenizer(folder.path, lead_space=leads_with_space(folder.windows, folder.model_type))
        model = load_model(
            folder.path, tokenizer.template, compute or ComputeSettings(), num_labels=decision.num_labels
        )
        plan = plan_of(folder.windows, tokenizer, model_type=folder.model_type)
        return cls(model, tokenizer, plan, decision, temperature=folder.temperature)

    def warm_up(self) -> None:
        """Run one text of each length that a short request may have, so that none of them waits for a kernel."""
        for num_tokens in range(0, self.plan.budget + 1, SHORTEST_STEP):
            tokens = Tokens(np.full(num_tokens, self.tokenizer.template.pad_id, np.int32), np.array([0, num_tokens]))
            self.score_documents(Documents(tokens, None, [None]))

    def score_documents(self, documents: Documents) -> DocumentScores:
        """Score tokenized documents. A document whose logits are not finite gets an error."""
        cut = self.cut(documents)
        return self.merge(documents, cut, self.model.logits(cut))

    def cut(self, documents: Documents) -> CutDocuments:
        """The windows of tokenized documents."""
        return cut_documents(documents.tokens, self.plan, self.tokenizer.template, documents.pair_tokens)

    def window_logits(self, cut: CutDocuments, index_W: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of some windows, in the order given; `merge` takes those of all."""
        return self.model.logits(cut, index_W)

    def merge(self, documents: Documents, cut: CutDocuments, logits_WL: NDArray[np.float32]) -> DocumentScores:
        """Window logits to document scores and votes."""
        offsets = cut.windows.offsets
        finite_W = np.asarray(np.isfinite(logits_WL).all(axis=1))
        errors = list(documents.errors)
        for row in cut.windows.document_W[np.flatnonzero(~finite_W)]:
            errors[row] = errors[row] or "the model's output is not finite"
        logits_WL = np.where(finite_W[:, None], logits_WL, np.float32(0))
        single = self.decision.kind in ("binary", "multiclass")
        votes_DL = count_votes(logits_WL, offsets) if single else None
        scored = _scores_of(logits_WL, offsets, self.decision, self.temperature)
        return DocumentScores(scored[0], votes_DL, cut.windows, logits_WL, scored[1], documents.num_tokens_D, errors)

    def decide(self, scores: DocumentScores, decision: DecisionSettings | None = None) -> Decisions:
        """Labels for scores, under this scorer's thresholds or another decision's."""
        return decide(scores.scores_DL, decision or self.decision, scores.votes_DL)

    def results(self, scores: DocumentScores, *, prefix: str = "") -> pa.Table:
        """The output columns of scored documents, one row each: predicted_label(s) or _value, score, scores, ..."""
        return results_of(scores, self.decision, prefix=prefix)

    def score_table(self, table: pa.Table, text_column: str = "text", text_pair_column: str | None = None) -> pa.Table:
        """Score the texts of an Arrow table: one row of output columns per row."""
        return self.results(self.score_documents(self.tokenizer.documents(table, text_column, text_pair_column)))

    def predict(self, texts: Sequence[str | None]) -> pa.Table:
        """Score a list of texts: one row of output columns per text; None gives a row with an error."""
        return self.score_table(pa.table({"text": pa.array(texts, pa.string())}))


def rescored(scores: DocumentScores, decision: DecisionSettings, temperature: float) -> DocumentScores:
    """The same logits under another temperature."""
    merged, of_windows = _scores_of(scores.window_logits_WL, scores.windows.offsets, decision, temperature)
    return replace(scores, scores_DL=merged, window_scores_WL=of_windows)


def _scores_of(
    logits_WL: NDArray[np.float32], offsets: NDArray[np.int64], decision: DecisionSettings, temperature: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Merged scores of documents, and those of their windows."""
    window_scores_WL = activate(logits_WL, decision.kind, temperature)
    return merge_windows(window_scores_WL, offsets, "max" if decision.merge == "max" else "mean"), window_scores_WL


def plan_of(
    windows: WindowSettings, tokenizer: Tokenizer, *, model_type: str, model_limit: int | None = None
) -> WindowPlan:
    """Window settings met with a tokenizer and a model. Raises SettingsError where they do not fit."""
    special = tokenizer.template.num_special_tokens(pair=False)
    return resolve_plan(windows, num_special_tokens=special, model_limit=model_limit, model_type=model_type)
