"""Weights to logits: a Hugging Face sequence classifier that takes ragged windows.

Device, arithmetic, padding or packing are settled here when a model is loaded. Knows no texts, no labels' names,
no ray.

Shapes: W windows, T tokens of all windows together, S tokens of the longest window, L labels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipelines.batching import token_batches
from pipelines.errors import ModelFolderError, SettingsError
from pipelines.labels import Scaling
from pipelines.model_folder import check_weights
from pipelines.packing import NAME as PACKED
from pipelines.packing import PackedRows, Packing
from pipelines.pretrained import quiet_transformers, uses_type_ids
from pipelines.settings import ComputeSettings, DecisionSettings, Dtype
from pipelines.tokenization import CutDocuments, InputRows, Template, assemble

PROBLEM_TYPES = {
    "binary": "single_label_classification",
    "multiclass": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""What configs of transformers call the dropout of attention's weights."""
SHORTEST_STEP = 8
"""Tokens: the lengths of short packed rows on a CPU are multiples of it."""
PADDED_MULTIPLE = 8
"""Padded rows are a multiple of this long: fewer shapes, aligned memory."""
ROUNDING, SLACK = 1e-6, 1e-3
"""Float32 logits of the checks at load (packed against padded, more padding against less) may differ by rounding,
relative to their size, and by a thousandth of what the windows differ among themselves."""


class WindowModel:
    """A sequence classifier on its device, and the way its windows are run."""

    def __init__(
        self, module: nn.Module, template: Template, compute: ComputeSettings, *, uses_type_ids: bool = False
    ) -> None:
        """Move a float32 module to its device and dtype, and decide whether its windows can be packed.

        uses_type_ids says whether the model's own tokenizer hands it the template's type ids (`uses_type_ids`).
        compute.num_threads, where given, sets the number of CPU threads of the whole process.
        """
        if compute.num_threads is not None:
            torch.set_num_threads(compute.num_threads)
        self.template = template
        self.device = resolve_device(compute.device)
        self.dtype = resolve_dtype(compute.dtype, self.device)
        self.batch_tokens = compute.batch_tokens
        self.module = module.to(self.device).eval()
        self._takes_type_ids = "token_type_ids" in inspect.signature(module.forward).parameters
        self._uses_type_ids = uses_type_ids and self._takes_type_ids
        self._row_length = 0
        self._scaling, self._last_layer = Scaling(), ""
        self._sees_padding = _sees_padding(self)
        self._packed = _packed_if_it_agrees(self) if compute.packing == "auto" else None
        _cast(self)

    @property
    def is_packed(self) -> bool:
        """Whether windows run in one row without padding."""
        return self._packed is not None

    @property
    def num_labels(self) -> int:
        """Logits per window."""
        return int(self.module.config.num_labels)  # type: ignore[union-attr, arg-type]

    @property
    def row_limit(self) -> int | None:
        """Longest input row that the model's positions allow, None for no limit."""
        return row_limit(self.module)

    @property
    def model_type(self) -> str:
        """The architecture as config.json names it."""
        return str(self.module.config.model_type)  # type: ignore[union-attr]

    def copy(self, compute: ComputeSettings) -> WindowModel:
        """The same weights run otherwise: in another dtype, or on another device."""
        module: Any = copy.deepcopy(self.module)
        if self.is_packed:
            module.set_attn_implementation("sdpa")  # before it is settled again
        return WindowModel(module, self.template, compute, uses_type_ids=self._uses_type_ids)

    def settle_rows(self, max_length: int) -> None:
        """Pad every row to max_length where the answer would otherwise depend on what a window was batched with.

        Nystromformer's convolution sees the padding; BigBird attends sparsely in long rows and fully in short ones.
        """
        config: Any = self.module.config
        is_sparse = False
        if config.model_type == "big_bird":
            is_sparse = max_length > (5 + 2 * config.num_random_blocks) * config.block_size
            self.module.bert.set_attention_type("block_sparse" if is_sparse else "original_full")  # type: ignore[union-attr, operator]
        self._row_length = max_length if is_sparse or self._sees_padding else 0

    def __call__(self, rows: InputRows) -> Tensor:
        """Logits (W, L) of the windows, on the device, in their order; differentiable where grad is on."""
        logits_WL = self.run_padded(rows) if self._packed is None else self.run_packed(self._packed, rows)
        if not self._last_layer:
            return logits_WL
        return logits_WL.float() * self._scaling.scale + self._scaling.mean

    def learn_scaled(self, scaling: Scaling, *, is_scaled: bool) -> bool:
        """From now on the module's own output is (logit - mean) / scale, and what `save` writes gives logits by itself.

        is_scaled says that it is so already, by a new head or a checkpoint; another's logits stay what they are. False,
        and nothing changes, where no last layer has a bias to carry the mean.
        """
        name = _last_layer(self)
        if name is None:
            return False
        self._scaling, self._last_layer = scaling, name
        if not is_scaled:
            layer: Any = self.module.get_submodule(name)
            with torch.no_grad():
                layer.weight.div_(scaling.scale)
                layer.bias.sub_(scaling.mean).div_(scaling.scale)
        return True

    def logits(self, cut: CutDocuments, index_W: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Logits (W, L) of every window of the documents, or of those asked for, computed batch by batch."""
        length_W = cut.length_W
        index_W = np.arange(len(length_W)) if index_W is None else index_W
        logits_WL = np.empty((len(length_W), self.num_labels), dtype=np.float32)
        if self.module.training:  # left so by a run that broke off, or by its owner
            self.module.eval()
        with torch.inference_mode():
            for batch in token_batches(length_W[index_W], batch_tokens=self.batch_tokens, padded=not self.is_packed):
                self._fill(logits_WL, cut, index_W[batch])
        return logits_WL[index_W]

    def _fill(self, logits_WL: NDArray[np.float32], cut: CutDocuments, index_W: NDArray[np.int64]) -> None:
        """Logits of some windows; where they do not fit into memory, half of them at a time, from now on."""
        try:
            logits_WL[index_W] = self(assemble(cut, self.template, index_W)).float().cpu().numpy()
            return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(index_W) == 1:
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = max(1, min(self.batch_tokens, int(cut.length_W[index_W].sum())) // 2)
        for part in np.array_split(index_W, 2):
            self._fill(logits_WL, cut, part)

    def run_packed(self, packed: PackedRows, rows: InputRows) -> Tensor:
        """Without padding: logits (W, L) of one row of all windows."""
        num_windows = len(rows.length_W)
        if self.device.type == "cpu":
            rows = _rounded_up(rows, self.template.pad_id)
        types_T = None
        if self._takes_type_ids:  # a model's own default is made for rows no longer than its positions
            types_T = self._to_device(rows.type_ids if self._uses_type_ids else np.zeros_like(rows.type_ids))
        packing = Packing.of(rows.length_W.tolist(), self.device, num_windows=num_windows)
        logits_WL = packed(self._to_device(rows.ids), types_T, packing)
        return logits_WL[:num_windows]

    def run_padded(self, rows: InputRows) -> Tensor:
        """The usual way: logits (W, L) of one padded batch with a mask."""
        length_W = rows.length_W
        longest = int(length_W.max())
        rounded = -(-longest // PADDED_MULTIPLE) * PADDED_MULTIPLE
        longest = rounded if self.row_limit is None else max(longest, min(rounded, self.row_limit))
        longest = max(longest, self._row_length)
        place_S = np.arange(longest)
        mask_WS = place_S < length_W[:, None]
        if self.template.pad_left:
            mask_WS = mask_WS[:, ::-1]
        ids_WS = np.full(mask_WS.shape, self.template.pad_id, dtype=np.int64)
        ids_WS[mask_WS] = rows.ids
        inputs = {"input_ids": self._to_device(ids_WS), "attention_mask": self._to_device(mask_WS.astype(np.int64))}
        if self._uses_type_ids:
            types_WS = np.zeros_like(ids_WS)
            types_WS[mask_WS] = rows.type_ids
            inputs["token_type_ids"] = self._to_device(types_WS)
        logits: Tensor = self.module(**inputs).logits
        return logits

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, weights in float32."""
        module: Any = self.module
        with quiet_transformers(), attention_of(module, "sdpa" if self.is_packed else None):
            state = {name: value.float().cpu() for name, value in self._weights().items()}
            module.save_pretrained(folder, state_dict=state)

    def snapshot(self) -> Callable[[Path], None]:
        """The module as it is now, for a checkpoint, copied off the device; the function returned writes it later.

        Files as `save` writes them, with the weights as they learn (`learn_scaled`). It leaves the module alone, which
        may be in training by then.
        """
        module: Any = self.module
        with attention_of(module, "sdpa" if self.is_packed else None):
            config = copy.deepcopy(module.config)
        weights = {
            name: value.detach().to("cpu", torch.float32, copy=True) for name, value in module.state_dict().items()
        }

        def write(folder: Path) -> None:
            config.save_pretrained(folder)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

        return write

    def _weights(self) -> dict[str, Tensor]:
        """Weights with which the module's own output is the logits."""
        weights: dict[str, Tensor] = dict(self.module.state_dict())
        if self._last_layer:
            weights[f"{self._last_layer}.weight"] = weights[f"{self._last_layer}.weight"] * self._scaling.scale
            bias = weights[f"{self._last_layer}.bias"]
            weights[f"{self._last_layer}.bias"] = bias * self._scaling.scale + self._scaling.mean
        return weights

    def _to_device(self, values: NDArray[np.int64]) -> Tensor:
        return to_device(values, self.device)


def _rounded_up(rows: InputRows, pad_id: int) -> InputRows:
    """The windows, and behind them some of padding, so that the row has one of few lengths.

    oneDNN compiles, and keeps, a kernel for each length that it meets. Lengths are multiples of SHORTEST_STEP, from
    256 tokens on of twice that, and of a 32nd of the next lower power of two where that is more.
    """
    total, longest = len(rows.ids), int(rows.length_W.max())
    step = max(SHORTEST_STEP if total < 256 else 2 * SHORTEST_STEP, 2 ** (total.bit_length() - 6))
    missing = -total % step
    if not missing:
        return rows
    lengths = np.full(-(-missing // longest), longest, np.int64)
    lengths[-1] -= lengths.sum() - missing
    ids = np.concatenate([rows.ids, np.full(missing, pad_id, np.int64)])
    types = np.concatenate([rows.type_ids, np.zeros(missing, np.int64)])
    return InputRows(ids, types, np.concatenate([rows.offsets, total + np.cumsum(lengths)]))


def load_model(path: Path, template: Template, compute: ComputeSettings, *, num_labels: int) -> WindowModel:
    """Load a finished classifier from safetensors, refusing remote code.

    Raises ModelFolderError where weights of the head are missing or their number is not num_labels.
    """
    check_weights(path)
    try:
        with quiet_transformers():
            module, info = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFolderError(
            f"the weights in {path} cannot be read: {_first_line(error)}; copy them again"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelFolderError(f"{path} lacks weights of the classifier ({', '.join(missing[:3])}); fine-tune it first")
    if module.config.num_labels != num_labels:
        raise ModelFolderError(
            f"{path}: config.json has {module.config.num_labels} labels and pipeline.json {num_labels}"
        )
    return WindowModel(module, template, compute, uses_type_ids=uses_type_ids(path))


def new_classifier(
    name: str, decision: DecisionSettings, *, seed: int, attention_dropout: float | None = None
) -> tuple[nn.Module, bool]:
    """Pretrained weights under a head for the decision's labels, and whether it is new; name is a hub name or a folder.

    A head of the right shape that the weights already have is kept; a new one is seeded. attention_dropout replaces
    the config's; raises SettingsError where the architecture has none.
    """
    torch.manual_seed(seed)
    names = list(decision.labels) or ["value"]
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                name,
                num_labels=decision.num_labels,
                id2label=dict(enumerate(names)),
                label2id={label: number for number, label in enumerate(names)},
                problem_type=PROBLEM_TYPES[decision.kind],
                trust_remote_code=False,
            )
            _set_attention_dropout(config, attention_dropout)
            module, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"--model {name} cannot be loaded as a sequence classifier: {_first_line(error)}; "
            f"give a folder or a hub name whose weights are safetensors"
        ) from error
    new_weights = [*info["missing_keys"], *(weight for weight, *_shapes in info["mismatched_keys"])]
    return module, any(not weight.startswith(f"{module.base_model_prefix}.") for weight in new_weights)


def _set_attention_dropout(config: Any, share: float | None) -> None:
    if share is None:
        return
    names = [name for name in ATTENTION_DROPOUTS if hasattr(config, name)]
    if not names:
        raise SettingsError(f"attention_dropout={share}: {config.model_type} has no dropout of attention's weights")
    for name in names:
        setattr(config, name, share)


def describe(name: str, *, attention_dropout: float | None = None) -> tuple[int | None, str]:
    """Longest input row (None for no limit) and model type of pretrained weights: a hub name or a folder.

    RoBERTa's kin count positions from padding_idx + 1, which costs them as many. Reads the config alone; raises
    ModelFolderError where there is none, or where a folder's weights are no safetensors, and SettingsError where
    attention_dropout is given for an architecture that has none.
    """
    if Path(name).is_dir():
        check_weights(Path(name))
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"--model {name} is no folder and no hub name: {_first_line(error)}") from error
    _set_attention_dropout(config, attention_dropout)
    with torch.device("meta"):
        return row_limit(AutoModelForSequenceClassification.from_config(config)), str(config.model_type)


def row_limit(module: Any) -> int | None:
    """Longest input row of a model by its config: its positions, less those that it leaves unused at the start."""
    limit = getattr(module.config, "max_position_embeddings", None)
    return int(limit) - first_position(module) if limit and limit > 0 else None


def first_position(module: nn.Module) -> int:
    """Position id of a row's first token: after the padding index of the position embeddings, where they have one."""
    for name, child in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding):
            return 0 if child.padding_idx is None else child.padding_idx + 1
    return 0


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of the values; no GPU is waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resolve_device(device: str) -> torch.device:
    """Auto is CUDA where there is any, else the CPU. Raises SettingsError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"device={device!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device={device!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return resolved


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Auto is bfloat16 where the processor has instructions for it (looked up, not timed), else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that tensors do not fit, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


@contextmanager
def attention_of(module: Any, name: str | None) -> Iterator[None]:
    """Another attention implementation for a while; None leaves it."""
    before = module.config._attn_implementation
    if name is not None:
        module.set_attn_implementation(name)
    try:
        yield
    finally:
        if name is not None:
            module.set_attn_implementation(before)


def _sees_padding(model: WindowModel) -> bool:
    """Whether logits change with the length of the padding, tried on three short windows in float32."""
    rows = _probe(model)
    with torch.inference_mode(), quiet_transformers():
        short_WL = model.run_padded(rows)
        model._row_length = 3 * PADDED_MULTIPLE
        long_WL = model.run_padded(rows)
        model._row_length = 0
    return not _agree(long_WL, short_WL)


def _probe(model: WindowModel) -> InputRows:
    """Three short windows of random tokens."""
    lengths = [7, 7, 4]
    size: int = model.module.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = np.random.default_rng(0).integers(min(10, size - 1), size, sum(lengths))
    return InputRows(ids, np.zeros_like(ids), np.concatenate([[0], np.cumsum(lengths)]))


def _agree(found_WL: Tensor, expected_WL: Tensor) -> bool:
    """Whether logits are the same up to rounding and a thousandth of what the windows differ among themselves."""
    spread = (expected_WL.amax(0) - expected_WL.amin(0)).max()
    return bool((found_WL - expected_WL).abs().max() <= ROUNDING * expected_WL.abs().max() + SLACK * spread)


def _last_layer(model: WindowModel) -> str | None:
    """Name of the linear layer with a bias whose outputs are the logits, None where there is none; tried out."""
    layers = [
        (name, layer)
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == model.num_labels and layer.bias is not None
    ]
    if not layers:
        return None
    name, layer = layers[-1]
    rows = _probe(model)
    with torch.inference_mode(), quiet_transformers():
        before_WL = model(rows)
        hook = layer.register_forward_hook(lambda _layer, _inputs, output: output + 1)
        try:
            after_WL = model(rows)
        finally:
            hook.remove()
    return name if torch.allclose(after_WL, before_WL + 1, atol=1e-3) else None


def _cast(model: WindowModel) -> None:
    """Put the module into its dtype, all but a single value's last layer: bfloat16 has 8 bits, and a year needs 11."""
    name = _last_layer(model) if model.num_labels == 1 and model.dtype != torch.float32 else None
    if name is None:
        model.module.to(model.dtype)
        return
    layer = model.module.get_submodule(name)
    weights = copy.deepcopy(layer.state_dict())
    model.module.to(model.dtype)
    layer.float().load_state_dict(weights)
    layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0].float(),))


def _packed_if_it_agrees(model: WindowModel) -> PackedRows | None:
    """Run three short windows both ways in float32; the packed way, left switched on, where logits agree."""
    module: Any = model.module
    rows = _probe(model)
    before = module.config._attn_implementation
    with torch.inference_mode(), quiet_transformers():
        padded_WL = model.run_padded(rows)
        try:
            module.set_attn_implementation(PACKED)
            packed = PackedRows(module, first_position=first_position(module))
            packed_WL = model.run_packed(packed, rows)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError):
            packed_WL = None  # a model that cannot take a packed row says so in many ways
        if packed_WL is not None and packed_WL.shape == padded_WL.shape and _agree(packed_WL, padded_WL):
            return packed
        module.set_attn_implementation(before)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
