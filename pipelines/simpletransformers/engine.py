"""The model of a facade: weights, tokenizer and config, and the core's settings from the facade's arguments.

A facade is one of the two classes in `models`.

Shapes: n texts, W windows of one text, L labels.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoTokenizer

from pipelines.decisions.labels import encode_labels
from pipelines.errors import DataError, ModelFolderError, SettingsError, first_line
from pipelines.model.devices import RANDOM, resolve_dtype
from pipelines.model.scorer import plan_of
from pipelines.model.torch_scorer import TorchScorer
from pipelines.model.weights import OPENING_ERRORS, load_module, row_limit, set_labels, set_pad_token, vocabulary_of
from pipelines.model.window_model import WindowModel
from pipelines.model_folder import ModelFolder, seal
from pipelines.settings import ComputeSettings, DecisionSettings, WindowSettings
from pipelines.simpletransformers.arguments import ClassificationArgs
from pipelines.simpletransformers.inputs import LabelledTexts, label_array, text_array
from pipelines.simpletransformers.loading import open_config
from pipelines.simpletransformers.translate import (
    compute_settings,
    count_labels,
    decision_settings,
    seed_of,
    window_settings,
)
from pipelines.text.pretrained import (
    num_tokens_of,
    save_tokenizer,
    uses_type_ids,
    write_tokenizer,
)
from pipelines.text.tokenization import Documents
from pipelines.text.windows import leads_with_space
from pipelines.training.corpus import LabelledDocuments


@dataclass(frozen=True)
class ModelSource:
    """The model that the caller of a facade wants to open."""

    model_type: str
    model_name: str
    tokenizer_name: str | None = None
    num_labels: int | None = None
    is_multilabel: bool = False
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords of Hugging Face's from_pretrained."""


class Engine:
    """An open model. Its arguments may be changed between calls.

    Each call reads them again, except for those that are used when the model is opened, such as batch_tokens.
    """

    def __init__(
        self, args: ClassificationArgs, source: ModelSource, *, device: str, known_type: str | None = None
    ) -> None:
        """Open pretrained or fine-tuned weights.

        Args:
            args: The facade's arguments. labels_list and labels_map are completed in place.
            source: The model to open.
            device: Device of the model, such as cpu or cuda:0.
            known_type: Name of the architecture in Simple Transformers. Default: source.model_type.

        Raises:
            SettingsError: Arguments that do not fit together.
            ModelFolderError: Weights that cannot be opened.
        """
        self.args, self.device, self.is_multilabel = args, device, source.is_multilabel
        self._their_type = known_type or source.model_type
        counted = count_labels(args, source.num_labels, is_multilabel=source.is_multilabel)
        self.config = open_config(source.model_type, source.model_name, counted, args)
        self.num_labels: int = self.config.num_labels
        set_labels(self.config, self.decision)
        self._folder = tempfile.TemporaryDirectory(prefix="pipelines-model-")
        folder = Path(self._folder.name)
        self._tokenizer = save_tokenizer(
            source.tokenizer_name or source.model_name,
            folder,
            args.special_tokens_list,
            do_lower_case=args.do_lower_case if args.is_case_set else None,
        )
        set_pad_token(self.config, self._tokenizer.template.pad_id)
        if not args.special_tokens_list:
            self._tokenizer.check_vocabulary(vocabulary_of(self.config), where=source.model_name)
        module = self._load(source, folder)
        self._tokenizer.check_vocabulary(vocabulary_of(module.config), where=source.model_name)
        compute = replace(self.compute, dtype="float32")
        self.model = WindowModel(module, self._tokenizer.template, compute, uses_type_ids=uses_type_ids(folder))
        self._in_other_dtype: WindowModel | None = None
        self._copied_for: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle: the tokenizer's files instead of their folder."""
        files = {file.name: file.read_bytes() for file in Path(self._folder.name).iterdir() if file.is_file()}
        return {**self.__dict__, "_folder": files, "_in_other_dtype": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of `__getstate__`."""
        self.__dict__.update(state)
        self._folder = tempfile.TemporaryDirectory(prefix="pipelines-model-")
        for name, content in state["_folder"].items():
            Path(self._folder.name, name).write_bytes(content)

    @property
    def decision(self) -> DecisionSettings:
        """Kind, labels, merge and thresholds according to the current arguments."""
        return decision_settings(self.args, self.num_labels, is_multilabel=self.is_multilabel)

    @property
    def compute(self) -> ComputeSettings:
        """Settings of the forward pass according to the current arguments."""
        return compute_settings(self.args, self.device)

    @property
    def label_names(self) -> list[Any] | None:
        """Label names of the caller, by id, if predictions use them. Otherwise None."""
        uses_names = self.args.labels_map and not self.is_multilabel and self.decision.kind != "regression"
        return list(self.args.labels_list) if uses_names else None

    @property
    def label_columns(self) -> list[str]:
        """The argument label_columns, in the order of the labels.

        Raises:
            SettingsError: They are not the labels.
        """
        columns = list(self.args.label_columns)
        labels = list(map(str, self.args.labels_list)) or columns  # columns give their order to unnamed labels
        if columns and (set(columns) != set(labels) or len(columns) != self.num_labels):
            raise SettingsError(f"label_columns={columns} must be the labels of the model, which are {labels}")
        return labels if columns else []

    @property
    def model_type(self) -> str:
        """Name of the architecture in Simple Transformers, or "auto" if it is unknown."""
        return self._their_type

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return AutoTokenizer.from_pretrained(self._folder.name, trust_remote_code=False)

    def scorer(self, *, for_predictions: bool = False) -> TorchScorer:
        """Create a scorer according to the current arguments.

        The model keeps float32 weights, so that training continues exactly. With for_predictions, the scorer uses a
        copy in args.dtype.
        """
        self._use_added_tokens()
        windows, model_type = self._windows(), str(self.config.model_type)
        plan = plan_of(windows, self._tokenizer, model_type=model_type, model_limit=row_limit(self.model.module))
        tokenizer = self._tokenizer.with_lead_space(leads_with_space(windows, model_type))
        model = self._in_dtype() if for_predictions else self.model
        return TorchScorer(model, tokenizer, plan, self.decision)

    def documents(self, texts: list[Any], pairs: list[Any] | None) -> Documents:
        """Tokenize texts or pairs. Raises DataError if a text is missing or invalid."""
        columns = {"text": text_array(texts)}
        if pairs is not None:
            columns["text_pair"] = text_array(pairs)
        documents = self.scorer().tokenizer.documents(pa.table(columns), *columns)
        bad = next(((row, error) for row, error in enumerate(documents.errors) if error), None)
        if bad is not None:
            raise DataError(f"text {bad[0]}: {bad[1]}")
        return documents

    def labelled(self, data: LabelledTexts) -> LabelledDocuments:
        """Tokenize texts and encode their labels. Raises DataError if there are no rows or no labels."""
        if data.labels is None:
            raise DataError("the data has no labels: it needs a column `labels`, or labels as its second column")
        if not data.texts:
            raise DataError("the data has no rows")
        names = list(self.args.labels_list) if self.args.labels_map and not self.is_multilabel else None
        decision = self.decision
        targets = encode_labels(pa.chunked_array([label_array(data.labels, decision, names)]), decision)
        return LabelledDocuments(self.documents(data.texts, data.pairs), targets)

    def write(self, folder: Path) -> None:
        """Write a finished model folder to a path that does not exist yet."""
        self._use_added_tokens()
        shutil.copytree(self._folder.name, folder)
        self.model.save(folder)
        self.args.save(str(folder))
        windows = replace(self._windows(), max_length=self.scorer().plan.max_length)
        seal(ModelFolder(folder, windows, self.decision))

    def _use_added_tokens(self) -> None:
        """Use the tokens that the caller has added to `tokenizer`.

        Raises:
            ModelFolderError: The model's embeddings have not been resized for them.
        """
        opened = self.__dict__.get("tokenizer")  # the cached property: None if nobody has asked for it
        if opened is None or len(opened) == self._tokenizer.num_tokens:
            return
        size = self.model.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
        tokenizer = write_tokenizer(opened, Path(self._folder.name))
        if tokenizer.highest_id >= size:
            raise ModelFolderError(
                f"the tokenizer has {len(opened):,} tokens and the model {size:,} embeddings; resize them: "
                "model.model.resize_token_embeddings(len(model.tokenizer))"
            )
        self._tokenizer = tokenizer

    def _windows(self) -> WindowSettings:
        return window_settings(self.args, None if self._their_type == "auto" else self._their_type)

    def _load(self, source: ModelSource, folder: Path) -> Any:
        try:
            with RANDOM, torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.args))
                module, found = load_module(source.model_name, self.config, **source.keywords)
                found.check_body(source.model_name)
                if self.args.special_tokens_list:
                    module.resize_token_embeddings(max(num_tokens_of(folder), self.config.vocab_size))
        except OPENING_ERRORS as error:
            if "ignore_mismatched_sizes" in str(error):
                raise ModelFolderError(
                    f"the weights of {source.model_name} do not fit {self.num_labels} labels; give the number that it "
                    f"was trained with, or ignore_mismatched_sizes=True for a new head"
                ) from error
            raise ModelFolderError(
                f"the weights of {source.model_name} cannot be used: {first_line(error)}; check that config.json "
                f"belongs to them, or copy the folder again"
            ) from error
        return module

    def _in_dtype(self) -> WindowModel:
        """Return the model in args.dtype: the float32 model itself, or a copy."""
        compute = self.compute
        if resolve_dtype(compute.dtype, self.model.device) == torch.float32:
            return self.model
        narrow = self._in_other_dtype
        if narrow is None or self._copied_for != compute or not _same_weights(self.model.module, narrow.module):
            narrow, self._copied_for = self.model.copy(compute), compute
        self._in_other_dtype = narrow
        return narrow


def _same_weights(module: torch.nn.Module, narrow: torch.nn.Module) -> bool:
    """Whether a copy in a narrower dtype has the weights that the module has now. The caller may have changed them."""
    own, copied = module.state_dict(), narrow.state_dict()
    return own.keys() == copied.keys() and all(
        torch.equal(weight, own[name].to(weight.dtype)) for name, weight in copied.items()
    )
