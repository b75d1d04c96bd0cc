"""Quantize a model folder to int8, if its labels and metrics on labelled data stay within a contract.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.decisions.labels import Decisions
from pipelines.decisions.metrics import LESS_IS_BETTER, METRICS, default_metric, evaluate, histograms_of
from pipelines.errors import DataError, JobError, ModelFolderError, SettingsError
from pipelines.evaluation.labelled import LabelledInput, labelled_input, open_for, shown_number
from pipelines.fields import check_range, check_types
from pipelines.model.engine import Engine
from pipelines.model.loading import load_engine
from pipelines.model.openvino_files import (
    CannotConvertError,
    convert,
    details_of,
    torch_model,
    write_model,
)
from pipelines.model.openvino_model import OpenVinoDetails, OpenVinoModel, processor_name
from pipelines.model.processor import slow_format
from pipelines.model.quantization import layers_by_format, nncf, quantized_graphs
from pipelines.model.scorer import DocumentScores, Scorer
from pipelines.model_files import TOKENIZER_FILES
from pipelines.model_folder import ModelFolder, check_is_new, new_folder, seal, verify_weights
from pipelines.settings import ComputeSettings, DataSettings, DecisionSettings, Dtype
from pipelines.storage.locations import shown
from pipelines.text.template import Template
from pipelines.text.tokenization import CutDocuments, Documents, concat_documents

LAYERS_SHOWN = 3
RESTS: tuple[Dtype, ...] = ("auto", "float32")
"""Settings dtype of what is not quantized, in the order in which they are tried, if the caller names none."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeOptions:
    """What `quantize_folder` keeps."""

    max_label_changes: float = 0.002
    """Largest share of documents whose label, or any of whose labels, may change."""
    max_drop: float = 0.002
    """How much the metric may drop. mae and rmse: how much they may grow, as a share of the targets' deviation."""
    metric: str | None = None
    """Name of the metric. None means that of the kind: auprc, mcc, auprc_macro or rmse."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "max_label_changes", self.max_label_changes, low=0, high=1)
        check_range(self, "max_drop", self.max_drop, low=0, high=1)

    def metric_of(self, decision: DecisionSettings) -> str:
        """Return the name of the metric. Raises SettingsError if the kind does not have it."""
        known = [name for name in METRICS[decision.kind] if name not in ("per_label", "tp", "tn", "fp", "fn")]
        name = default_metric(decision) if self.metric is None else self.metric
        if name not in known:
            raise SettingsError(f"metric={name} is not one of a {decision.kind} model: {', '.join(known)}")
        return name


@dataclass(frozen=True)
class QuantizeResult:
    """An int8 model folder, and how it differs from the one that it was made of."""

    model: str
    source: str
    documents: int
    label_changes: int
    metric: str
    metric_before: float | None
    metric_after: float | None
    score_shift: Mapping[str, float]
    """Mean absolute change of each label's scores (regression: of the value)."""
    largest_shift: float
    layers_int8: int
    layers_float: tuple[str, ...]
    """Layers with weights in float, because the contract would not hold otherwise, or because NNCF leaves them out."""
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"QuantizeResult {self.model}, made of {self.source}"]
        lines += [f"  {name}: {value}" for name, value in self.in_words().items() if name not in ("model", "source")]
        return "\n".join(lines)

    def in_words(self) -> dict[str, str]:
        """Return the result as it is shown to people."""
        kept = ", ".join(self.layers_float[:LAYERS_SHOWN])
        more = len(self.layers_float) - LAYERS_SHOWN
        shifts = ", ".join(f"{label} {value:.4f}" for label, value in self.score_shift.items())
        return {
            "model": self.model,
            "source": self.source,
            "labels changed": f"{self.label_changes} of {self.documents} documents",
            self.metric: f"{shown_number(self.metric_before)} before, {shown_number(self.metric_after)} after",
            "mean change of scores": f"{shifts}; at most {self.largest_shift:.4f}",
            "layers": f"{self.layers_int8} in int8, {len(self.layers_float)} in float"
            + (f" ({kept}{f' and {more} more' if more > 0 else ''})" if kept else ""),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the result as `pipelines quantize --json` prints it."""
        return {**asdict(self), "layers_float": list(self.layers_float)}


@dataclass(frozen=True)
class _Reference:
    """Labelled documents with the scores of the float model, against which others are compared."""

    scorer: Scorer
    documents: Documents
    cut: CutDocuments
    targets: NDArray[np.generic]
    good_D: NDArray[np.bool_]
    """Whether a document could be scored."""
    scores: DocumentScores
    metric: str
    options: QuantizeOptions
    fingerprint: str = ""
    """Of the labelled input."""

    def scored_by(self, model: Engine, index_W: NDArray[np.int64] | None = None) -> DocumentScores:
        """Score the documents with another model. With index_W, only these windows: the others keep their logits."""
        logits_WL = self.scores.window_logits_WL.copy()
        if index_W is None:
            index_W = np.arange(len(logits_WL))
        logits_WL[index_W] = model.logits(self.cut, index_W)
        return self.scorer.merge(self.documents, self.cut, logits_WL)

    def changed_D(self, scores: DocumentScores) -> NDArray[np.bool_]:
        """Return for each document whether any of its labels changed, or it lost its score. Others had none before."""
        before, after = (_labels(self.scorer.decide(found)) for found in (self.scores, scores))
        differ_D: NDArray[np.bool_] = (before != after).reshape(len(before), -1).any(axis=1)
        has_error_D = np.array([error is not None for error in scores.errors])
        changed_D: NDArray[np.bool_] = (differ_D | has_error_D) & self.good_D
        return changed_D

    def shift_DL(self, scores: DocumentScores) -> NDArray[np.float32]:
        """Return the absolute changes of the scores."""
        return np.where(self.good_D[:, None], np.abs(scores.scores_DL - self.scores.scores_DL), 0)

    def metrics_of(self, scores: DocumentScores) -> dict[str, Any]:
        """Return the metrics of the documents that could be scored."""
        decision, good_D = self.scorer.decision, self.good_D
        votes = None if scores.votes_DL is None else scores.votes_DL[good_D]
        chosen = replace(scores, scores_DL=scores.scores_DL[good_D], votes_DL=votes)
        return evaluate(self.targets[good_D], chosen.scores_DL, self.scorer.decide(chosen), decision)

    def drop(self, before: float | None, after: float | None) -> float:
        """Return how much worse the metric is: 0 if it was undefined, and infinitely if it has become undefined."""
        if before is None:
            return 0.0
        if after is None:
            return math.inf
        if self.metric in LESS_IS_BETTER:
            return (after - before) / max(float(self.targets[self.good_D].astype(np.float64).std()), 1e-9)
        return before - after

    def excess(self, scores: DocumentScores) -> float:
        """Return how far a model breaks the contract: 1 is just kept."""
        changes = float(self.changed_D(scores).sum()) / max(int(self.good_D.sum()), 1)
        drop = self.drop(self.metrics_of(self.scores)[self.metric], self.metrics_of(scores)[self.metric])
        options = self.options
        return max(changes / max(options.max_label_changes, 1e-9), drop / max(options.max_drop, 1e-9), 0.0)

    def validate(self, model: Engine, documents: Sequence[int]) -> tuple[float, list[float]]:
        """Compare a model on some documents, as `quantization.quantized_graphs` asks for it."""
        scores = self.scored_by(model, np.flatnonzero(np.isin(self.cut.windows.document_W, documents)))
        moved_D = self.shift_DL(scores).max(axis=1)
        return self.excess(scores), moved_D[list(documents)].tolist()


def quantize_folder(
    model: str,
    new: str,
    source: str | pa.Table,
    data: DataSettings,
    *,
    compute: ComputeSettings,
    options: QuantizeOptions,
) -> QuantizeResult:
    """Write an int8 model folder for CPUs, if few labels change on labelled data.

    Layers that would change too much stay in float: they are found one by one.

    Args:
        model: Model folder, a path or URL.
        new: New folder.
        source: Labelled file, folder or glob; or a table in memory.
        data: Which columns are read, and how many rows.
        compute: dtype of what is not quantized, and num_threads.
        options: The contract.

    Raises:
        UsageError: The model cannot be quantized, the new folder is not empty, or the data does not fit.
        JobError: The contract does not hold. Nothing was written.
    """
    folder = _checked(model, new, data, options)
    labelled = labelled_input(source, data, folder.decision)
    reference = _reference(folder, labelled, data, compute, options)
    template = reference.scorer.tokenizer.template
    try:
        graph, details = _converted(folder, template)
    except CannotConvertError as error:
        raise ModelFolderError(f"{shown(model)} cannot be quantized: {error}") from error
    graph, rest = _quantized(graph, details, reference, compute)
    details = replace(details, dtype="int8", rest=rest)
    with new_folder(new) as path:
        for name in ("config.json", *TOKENIZER_FILES):
            if (folder.path / name).is_file():
                shutil.copy(folder.path / name, path / name)
        write_model(graph, details, path)
        written = replace(folder, path=path, quantization={"format": "int8"})
        opened = load_engine(written, template, replace(compute, dtype="auto"))
        result = _finished(written, reference, opened, layers_by_format(graph), (model, new))
    if folder.guarantees or folder.early_exit:
        logger.warning("promises and early exit were fitted to the float scores: fit them again with pipelines tune")
    return result


def _checked(model: str, new: str, data: DataSettings, options: QuantizeOptions) -> ModelFolder:
    """Return the model folder, after all checks that need no data."""
    folder = open_for(model, data)
    if folder.quantization:
        raise ModelFolderError(f"{shown(model)} is an int8 model already; give the folder that it was made of")
    check_is_new(new)
    options.metric_of(folder.decision)
    nncf()
    if slow := slow_format(is_int8=True, is_bf16=False):
        logger.warning("%s", slow)
    verify_weights(folder)
    return folder


def _finished(
    folder: ModelFolder,
    reference: _Reference,
    opened: Engine,
    layers: tuple[list[str], list[str]],
    names: tuple[str, str],
) -> QuantizeResult:
    """Check the contract with the written model, as a job opens it, and finish its folder."""
    scores = reference.scored_by(opened)
    result = _compared(reference, scores, layers, names)
    _check_contract(result, reference)
    _seal(folder, result, reference, scores)
    return result


def _quantized(
    graph: Any, details: OpenVinoDetails, reference: _Reference, compute: ComputeSettings
) -> tuple[Any, Dtype]:
    """Return the first quantized model that keeps the contract, or the last, and the dtype of what is not quantized.

    This is float32 if the contract was measured with it: a processor with bfloat16 must not use that either.
    """
    template, compared = reference.scorer.tokenizer.template, itertools.count(1)

    def validate(model: Engine, documents: Sequence[int]) -> tuple[float, list[float]]:
        started = time.perf_counter()
        found = reference.validate(model, documents)
        logger.info(
            "searching the layers that must stay in float: %d models compared, the last on %d documents in %.0f s",
            next(compared), len(documents), time.perf_counter() - started,
        )  # fmt: skip
        return found

    logger.info("quantizing with %s documents, %s windows", len(reference.documents), len(reference.cut.length_W))
    candidates = quantized_graphs(
        graph,
        details,
        template,
        reference.cut,
        validate,
        num_documents=len(reference.documents),
        batch_tokens=compute.batch_tokens,
    )
    rests = RESTS if compute.dtype == "auto" else (compute.dtype,)
    for candidate in candidates:
        for rest in rests:
            model = OpenVinoModel.compile(candidate, details, template, replace(compute, dtype=rest))
            scores = reference.scored_by(model)
            if reference.excess(scores) <= 1:
                return candidate, model.rest
            logger.info(
                "int8, with dtype=%s for the rest, changes labels of %s of %s documents: more must stay in float",
                rest, reference.changed_D(scores).sum(), reference.good_D.sum(),
            )  # fmt: skip
    return candidate, model.rest


def _converted(folder: ModelFolder, template: Template) -> tuple[Any, OpenVinoDetails]:
    model = torch_model(folder, template)
    return convert(model, longest=folder.windows.max_length or 0), details_of(model)


def _reference(
    folder: ModelFolder,
    labelled: LabelledInput,
    data: DataSettings,
    compute: ComputeSettings,
    options: QuantizeOptions,
) -> _Reference:
    """Score the labelled documents in float32."""
    scorer = Scorer.load(folder, compute=replace(compute, dtype="float32", engine="auto", device="cpu"))
    tables = labelled.tables()
    documents = concat_documents([scorer.tokenizer.documents(table, *data.text_columns) for table in tables])
    cut = scorer.cut(documents)
    scores = scorer.merge(documents, cut, scorer.model.logits(cut))
    good_D = np.array([error is None for error in scores.errors])
    if not good_D.any():
        raise DataError(f"{labelled.source} has no row with a text that can be scored")
    metric = options.metric_of(folder.decision)
    return _Reference(scorer, documents, cut, labelled.targets, good_D, scores, metric, options, labelled.fingerprint)


def _compared(
    reference: _Reference, scores: DocumentScores, layers: tuple[list[str], list[str]], names: tuple[str, str]
) -> QuantizeResult:
    """Compare the scores of the int8 model with those in float32."""
    before, after = reference.metrics_of(reference.scores), reference.metrics_of(scores)
    shift_DL = reference.shift_DL(scores)[reference.good_D]
    labels = reference.scorer.decision.labels or ("value",)
    return QuantizeResult(
        model=shown(names[1]),
        source=shown(names[0]),
        documents=int(reference.good_D.sum()),
        label_changes=int(reference.changed_D(scores).sum()),
        metric=reference.metric,
        metric_before=before[reference.metric],
        metric_after=after[reference.metric],
        score_shift=dict(zip(labels, map(float, shift_DL.mean(axis=0)), strict=True)),
        largest_shift=float(shift_DL.max()),
        layers_int8=len(layers[0]),
        layers_float=tuple(layers[1]),
        metrics=after,
    )


def _check_contract(result: QuantizeResult, reference: _Reference) -> None:
    """Raise JobError unless the contract holds and something is quantized."""
    options = reference.options
    if options.max_label_changes and result.documents < (enough := math.ceil(1 / options.max_label_changes)):
        logger.warning(
            "%s documents say little about --max-label-changes %g: at least %s would be needed to see one change",
            f"{result.documents:,}", options.max_label_changes, f"{enough:,}",
        )  # fmt: skip
    if result.metric_before is None or len(np.unique(reference.targets[reference.good_D], axis=0)) < 2:
        logger.warning("all documents have the same target, so %s says nothing about the int8 model", result.metric)
    share = result.label_changes / result.documents
    drop = reference.drop(result.metric_before, result.metric_after)
    problems = []
    if share > options.max_label_changes:
        problems.append(
            f"{result.label_changes} of {result.documents} labels change ({share:.2%}; --max-label-changes allows "
            f"{options.max_label_changes:.2%})"
        )
    if drop > options.max_drop:
        problems.append(
            f"{result.metric} goes from {shown_number(result.metric_before)} to {shown_number(result.metric_after)} "
            f"(--max-drop allows {options.max_drop:g})"
        )
    if not result.layers_int8:
        problems.append("no layer could stay in int8")
    if problems:
        raise JobError(
            f"the int8 model breaks its contract: {'; '.join(problems)}, with {len(result.layers_float)} layers in "
            f"float. Nothing was written; allow more, or give more documents with --data"
        )


def _seal(folder: ModelFolder, result: QuantizeResult, reference: _Reference, scores: DocumentScores) -> None:
    """Write the new folder's pipeline.json."""
    options = reference.options
    measured = {name: value for name, value in result.to_json().items() if name not in ("model", "metrics")}
    histograms = histograms_of(scores.scores_DL[reference.good_D], folder.decision)
    quantization = {
        "format": "int8",
        **measured,
        "source_hash": folder.weights_hash,
        "max_label_changes": options.max_label_changes,
        "max_drop": options.max_drop,
        "processor": processor_name(),
    }
    seal(
        replace(
            folder,
            metrics=result.metrics,
            histograms=histograms,
            measured={"documents": result.documents, "fingerprint": reference.fingerprint},
            guarantees={},
            early_exit={},
            quantization=quantization,
        )
    )


def _labels(decisions: Decisions) -> NDArray[Any]:
    """Return the labels of documents in a form that can be compared. A regression has none."""
    if decisions.positive_DL is not None:
        return decisions.positive_DL
    if decisions.label_D is not None:
        return decisions.label_D
    assert decisions.value_D is not None
    return np.zeros(len(decisions.value_D), np.int64)
