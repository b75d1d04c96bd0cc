"""Quantize a classifier to int8 for CPUs with NNCF, and leave layers in float that would change too much.

NNCF ("neural network compression framework") is an extra of this package (`[quantize]`).

Shapes: W windows, L labels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SettingsError
from pipelines.model.engine import padded
from pipelines.model.openvino_model import OpenVinoDetails, OpenVinoModel, core, openvino
from pipelines.model.processor import has_int8
from pipelines.text.template import Template
from pipelines.text.tokenization import CutDocuments, assemble

CALIBRATION_WINDOWS = 128
"""Windows on which the ranges of activations are measured."""
SMOOTHING = 0.5
"""Share of the outliers of activations that is moved into the weights (SmoothQuant: Xiao et al., 2023)."""
RANKED_DOCUMENTS = 60
"""Documents by which layers are ranked, if some must stay in float."""
MOST_RESTORED = 6
"""Groups of layers that are put back to float, one after another, before the contract counts as broken."""
REMEDY = "pip install 'ray-text-classification[quantize]'"

Validate = Callable[[OpenVinoModel, Sequence[int]], tuple[float, list[float]]]
"""Takes a model and the numbers of documents. Returns how far the contract is broken by these documents (1: just kept),
and how much each document's scores moved."""


def nncf() -> Any:
    """Import NNCF. Raises SettingsError if it is not installed."""
    openvino()  # blocks the reports to Google Analytics
    try:
        import nncf
    except ImportError as error:
        raise SettingsError(f"pipelines quantize needs NNCF: {REMEDY}") from error
    nncf.set_log_level(logging.ERROR)
    return nncf


def quantized_graphs(
    graph: Any,
    details: OpenVinoDetails,
    template: Template,
    cut: CutDocuments,
    validate: Validate,
    *,
    num_documents: int,
    batch_tokens: int,
) -> Iterator[Any]:
    """Yield quantized models: first with all layers in int8, then with the most sensitive ones left in float.

    Args:
        graph: A model of OpenVINO in float32.
        details: What is known of it besides.
        template: Special tokens and padding of the tokenizer.
        cut: Documents with which it is calibrated.
        validate: Compares a model with the one in float. Layers are left in float, one by one, until it is content.
        num_documents: Number of documents to validate with.
        batch_tokens: Maximum number of tokens in one forward pass.
    """
    library = nncf()
    rows = [_row(cut, details, template, window) for window in _drawn(cut)]
    smooth = library.AdvancedSmoothQuantParameters(matmul=SMOOTHING)
    options = {
        "subset_size": len(rows),
        "model_type": library.ModelType.TRANSFORMER,
    }
    # Without 8-bit instructions, sums of two products of 8 bits are cut to 16 bits: weights then get 7 bits.
    fix = None if has_int8() else library.OverflowFix.ENABLE
    advanced = library.AdvancedQuantizationParameters(smooth_quant_alphas=smooth, overflow_fix=fix)
    with _calls_to_nncf():
        plain = library.quantize(graph.clone(), library.Dataset(rows), advanced_parameters=advanced, **options)
    yield plain

    def validation(compiled: Any, documents: Iterable[int]) -> tuple[float, list[float]]:
        model = OpenVinoModel(compiled, details, template, dtype="", batch_tokens=batch_tokens)
        excess, moved = validate(model, [int(document) for document in documents])
        return -1 - excess, [-value for value in moved]  # NNCF divides by the metric, so it is not 0

    with _calls_to_nncf():
        restored = library.quantize_with_accuracy_control(
            graph,
            library.Dataset(rows),
            library.Dataset(list(range(num_documents))),
            validation,
            max_drop=1.0,
            drop_type=library.DropType.ABSOLUTE,
            advanced_quantization_parameters=advanced,
            advanced_accuracy_restorer_parameters=library.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=RANKED_DOCUMENTS, num_ranking_workers=1, max_num_iterations=MOST_RESTORED
            ),
            **options,
        )
    yield restored


@contextmanager
def _calls_to_nncf() -> Iterator[None]:
    """Send NNCF's progress to stderr, and give it this process' Core instead of a new one for every model."""
    with redirect_stdout(sys.stderr), patch.multiple(openvino(), Core=core, compile_model=core().compile_model):
        yield


def layers_by_format(graph: Any) -> tuple[list[str], list[str]]:
    """Return the names of the layers with int8 weights, and of those with float weights."""
    quantized: list[str] = []
    kept: list[str] = []
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        weights = _constant(node.input_value(1).get_node())
        if weights is not None:
            name = node.get_friendly_name().split("/")[0].removeprefix("__module.module.")
            (quantized if weights.get_element_type().size == 1 else kept).append(name)
    return quantized, kept


def _constant(node: Any) -> Any:
    """Return the constant from which a node takes its values, through conversions and factors. None for activations."""
    while node.get_type_name() in ("Multiply", "Subtract", "Convert", "FakeQuantize", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _drawn(cut: CutDocuments) -> NDArray[np.int64]:
    """Draw windows from all documents, with a fixed seed."""
    filled = np.flatnonzero(cut.length_W > 0)
    size = min(CALIBRATION_WINDOWS, len(filled))
    return np.sort(np.random.default_rng(0).choice(filled, size, replace=False))


def _row(cut: CutDocuments, details: OpenVinoDetails, template: Template, window: int) -> dict[str, Any]:
    rows = assemble(cut, template, np.array([window]))
    batch = padded(rows, side=details.padding_side, pad_id=details.pad_id, row_limit=details.row_limit)
    return details.inputs(batch)
