"""Run a classifier with OpenVINO, which compiles it for this machine's CPU.

Imports neither torch nor transformers.

Shapes: W windows, S tokens of the longest window, L labels.
"""

from __future__ import annotations

import functools
import os
import queue
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import ModelFolderError, SettingsError, first_line, is_out_of_memory
from pipelines.model.engine import Engine, PaddedRows, Side, padded
from pipelines.settings import ComputeSettings, Dtype
from pipelines.text.template import Template
from pipelines.text.tokenization import InputRows

THREADS_PER_STREAM = 4
"""Threads that work on one batch. More threads work on several batches at once."""
PASS_TOKENS = 2048
"""Maximum number of tokens in one forward pass. More do not fit into a CPU's caches."""
REMEDY = "pip install 'ray-text-classification[openvino]'"


@dataclass(frozen=True)
class OpenVinoDetails:
    """What is known of a converted model besides its graph."""

    num_labels: int
    model_type: str
    vocabulary: int | None
    row_limit: int | None
    pad_id: int
    padding_side: Side
    takes_type_ids: bool
    """Whether the graph has an input for token type ids."""
    uses_type_ids: bool
    """Whether these are the template's. If not, they are 0."""
    dtype: str = ""
    """int8 if weights are quantized. Empty if the number format is the caller's choice."""
    rest: Dtype = "auto"
    """With int8: the setting dtype of what is not quantized, with which the contract was measured."""

    def inputs(self, batch: PaddedRows) -> dict[str, NDArray[np.int64]]:
        """Return the inputs of the graph by name."""
        found = {"input_ids": batch.ids_WS, "attention_mask": batch.mask_WS}
        if self.takes_type_ids:
            found["token_type_ids"] = batch.types_WS if self.uses_type_ids else np.zeros_like(batch.types_WS)
        return found


def openvino() -> Any:
    """Import OpenVINO. Its conversion would report its use to Google Analytics, so the module for that is blocked.

    Raises:
        SettingsError: OpenVINO is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise SettingsError(f"OpenVINO is not installed: {REMEDY}") from error
    return openvino


@functools.cache
def core() -> Any:
    """Return OpenVINO's Core, which stays as long as the process.

    A Core gives the thread that creates it another stack for signal handlers, which it unmaps at its end. Where two of
    them end in the order in which they began, that thread is left with the unmapped stack of the first one, and its
    next signal (Ctrl-C, SIGTERM) is a segmentation fault. So there is one, and it is created in a thread that ends.

    Raises:
        SettingsError: OpenVINO is not installed.
    """
    library = openvino()

    def create() -> Any:
        created = library.Core()
        created.get_property("CPU", "FULL_DEVICE_NAME")  # loads the part that sets the stack
        return created

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(create).result()


class OpenVinoModel(Engine):
    """A compiled classifier. Windows are padded to the longest of their batch."""

    name = "openvino"

    def __init__(
        self,
        compiled: Any,
        details: OpenVinoDetails,
        template: Template,
        *,
        dtype: str,
        batch_tokens: int,
        source: tuple[Any, ComputeSettings] | None = None,
    ) -> None:
        """Take a model that OpenVINO has compiled.

        Args:
            compiled: The compiled model.
            details: What is known of it besides.
            template: Special tokens and padding of the tokenizer.
            dtype: The number format for which it was compiled.
            batch_tokens: Maximum number of tokens in one forward pass.
            source: What it was compiled of and for, to compile it again in another process.
        """
        self._source = source
        self.template, self.details, self.batch_tokens = template, details, batch_tokens
        self._dtype = dtype
        streams = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="openvino") if streams > 1 else None

    @classmethod
    def compile(
        cls, graph: Any, details: OpenVinoDetails, template: Template, compute: ComputeSettings
    ) -> OpenVinoModel:
        """Compile a model for this machine.

        Args:
            graph: A model of OpenVINO, or the path of its file.
            details: What is known of it besides.
            template: Special tokens and padding of the tokenizer.
            compute: dtype (an int8 model has its own), batch_tokens and num_threads (all cores by default).

        Raises:
            SettingsError: OpenVINO is not installed, or does not have the dtype.
            ModelFolderError: OpenVINO cannot compile the model.
        """
        dtype = _resolve_dtype(details.rest if details.dtype else compute.dtype)
        threads = compute.num_threads or os.cpu_count() or 1
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": max(1, threads // THREADS_PER_STREAM),
            "ENABLE_CPU_PINNING": False,  # replicas on one machine would take the same cores
        }
        try:
            compiled = core().compile_model(graph, "CPU", options)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ModelFolderError(f"OpenVINO cannot compile it: {first_line(error)}; use engine=torch") from error
        source = (graph, compute)
        return cls(compiled, details, template, dtype=dtype, batch_tokens=compute.batch_tokens, source=source)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the model as its files, from which another process compiles it again."""
        if self._source is None:
            raise TypeError("this model has no files, so it cannot be pickled; open its folder in the other process")
        graph, compute = self._source
        if isinstance(graph, str):
            files = (Path(graph).read_bytes(), Path(graph).with_suffix(".bin").read_bytes())
        else:
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch) / "model.xml"
                openvino().save_model(graph, str(place), compress_to_fp16=False)
                files = (place.read_bytes(), place.with_suffix(".bin").read_bytes())
        return _compiled_again, (*files, self.details, self.template, compute)

    @property
    def num_labels(self) -> int:
        """Number of logits per window."""
        return self.details.num_labels

    @property
    def row_limit(self) -> int | None:
        """Longest input row, in tokens, that the model's positions allow. None means no limit."""
        return self.details.row_limit

    @property
    def model_type(self) -> str:
        """Name of the architecture in config.json."""
        return self.details.model_type

    @property
    def vocabulary(self) -> int | None:
        """Number of entries of the vocabulary. None if the architecture has none."""
        return self.details.vocabulary

    @property
    def dtype_name(self) -> str:
        """Number format of the forward pass. int8 if weights are quantized."""
        return self.details.dtype or self._dtype

    @property
    def rest(self) -> Dtype:
        """The setting dtype with which other processors compute what is not quantized in this format, or exacter."""
        return "float32" if self._dtype == "float32" else "auto"

    @property
    def device_name(self) -> str:
        """Where the model runs."""
        return "cpu"

    @property
    def is_packed(self) -> bool:
        """Whether windows run in one row without padding: never."""
        return False

    def run(self, rows: InputRows) -> NDArray[np.float32]:
        """Return the logits (W, L) of the windows of one batch, in their order."""
        details = self.details
        batch = padded(rows, side=details.padding_side, pad_id=details.pad_id, row_limit=details.row_limit)
        request = self._requests.get()
        try:
            found: NDArray[np.float32] = request.infer(details.inputs(batch), share_inputs=True)[0]
        finally:
            self._requests.put(request)
        return found.astype(np.float32, copy=False)

    def _pass_tokens(self) -> int:
        return min(self.batch_tokens, PASS_TOKENS)

    def _run_all(self, run_batch: Callable[[NDArray[np.int64]], None], batches: Sequence[NDArray[np.int64]]) -> None:
        """Run batches, as many at once as there are streams."""
        if self._pool is None or len(batches) < 2:
            super()._run_all(run_batch, batches)
            return
        for _ in self._pool.map(run_batch, batches):
            pass


def _compiled_again(
    graph: bytes, weights: bytes, details: OpenVinoDetails, template: Template, compute: ComputeSettings
) -> OpenVinoModel:
    """Compile a model that was pickled. It stays as it is in memory, so that it can be pickled again."""
    return OpenVinoModel.compile(core().read_model(graph, weights), details, template, compute)


def processor_name() -> str:
    """Return the name of this machine's processor."""
    return str(core().get_property("CPU", "FULL_DEVICE_NAME"))


def _resolve_dtype(dtype: Dtype) -> str:
    """Return the number format: auto means bfloat16 if the processor has instructions for it."""
    if dtype == "float16":
        raise SettingsError("engine=openvino runs in float32 or bfloat16, not in float16; set dtype or engine=torch")
    if dtype != "auto":
        return dtype
    return "bfloat16" if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "float32"
