"""A drop-in replacement for the classification models of Simple Transformers: only the import changes.

The two classes are facades. They translate arguments to settings, data to documents, and results to the shapes that
scripts expect. The core does tokenizing, windows, training and scoring. Intended differences are in
docs/reference/simpletransformers.md. Several threads may use one model: while one trains or predicts, the others wait.

Shapes: n texts, W windows of one text, L labels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.decisions.labels import decide
from pipelines.decisions.metrics import evaluate
from pipelines.errors import DataError, SettingsError
from pipelines.fields import plain
from pipelines.progress import hidden_progress
from pipelines.simpletransformers.arguments import ClassificationArgs, MultiLabelClassificationArgs
from pipelines.simpletransformers.engine import Engine, ModelSource
from pipelines.simpletransformers.inputs import read_rows, read_texts
from pipelines.simpletransformers.loading import (
    args_of_folder,
    check_metrics,
    device_of,
    loss_weights,
    refuse_keywords,
    warn_of_inert,
)
from pipelines.simpletransformers.outputs import (
    InputExample,
    predicted,
    progress_lists,
    raw_outputs,
    write_results,
    wrong_predictions,
)
from pipelines.simpletransformers.saving import check_output, replace_files
from pipelines.simpletransformers.training import FacadeRun, Metric, fit_documents, own_metrics
from pipelines.simpletransformers.translate import resolve_args, theirs, train_settings
from pipelines.training.checkpoints import STATE_FILE
from pipelines.training.fit import mean_loss
from pipelines.training.losses import resolve_loss
from pipelines.training.state import BestMetric
from pipelines.training_settings import TrainSettings


class ClassificationModel:
    """Binary and multi-class classification, and regression.

    Example:
        >>> model = ClassificationModel("bert", "bert-base-uncased", args={"num_train_epochs": 1})
        >>> model.train_model(train_df)
        >>> predictions, raw_outputs = model.predict(["a text", "another text"])
    """

    _args_class: type[ClassificationArgs] = ClassificationArgs
    _is_multilabel = False
    _weight_name = "weight"
    weight: Any = None
    """Loss weights of the labels, or None. May be changed between calls."""

    def __init__(
        self,
        model_type: str,
        model_name: str,
        tokenizer_type: str | None = None,
        tokenizer_name: str | None = None,
        num_labels: int | None = None,
        weight: Sequence[float] | Mapping[Any, float] | None = None,
        args: Mapping[str, Any] | ClassificationArgs | None = None,
        use_cuda: bool | None = None,
        cuda_device: int = -1,
        **kwargs: Any,
    ) -> None:
        """Open pretrained or fine-tuned weights, by hub name or folder.

        weight has one number per label, or maps labels to numbers. use_cuda=None uses a GPU if there is one. Further
        keywords are passed to Hugging Face's from_pretrained.

        Raises:
            SettingsError: Arguments are unknown or do not fit together. Most are found before weights are read.
            ModelFolderError: The weights cannot be opened.
        """
        refuse_keywords(kwargs, is_multilabel=self._is_multilabel)
        resolved = resolve_args(self._args_class, model_name, args, args_of_folder(Path(model_name)))
        known_type = model_type if model_type != "auto" else resolved.model_type or "auto"
        resolved.model_class = type(self).__name__
        resolved.model_name, resolved.model_type = model_name, model_type
        resolved.tokenizer_name, resolved.tokenizer_type = tokenizer_name or model_name, tokenizer_type or model_type
        warn_of_inert(resolved)
        if resolved.thread_count:
            torch.set_num_threads(resolved.thread_count)
        self.device = device_of(use_cuda, plain(cuda_device))
        source = ModelSource(
            model_type,
            model_name,
            tokenizer_name,
            plain(num_labels),
            is_multilabel=self._is_multilabel,
            keywords=kwargs,
        )
        self._engine = Engine(resolved, source, device=self.device, known_type=known_type)
        self._checkpoint = Path(model_name) if (Path(model_name) / STATE_FILE).is_file() else None
        self.config, self.num_labels = self._engine.config, self._engine.num_labels
        labels = self._engine.args.labels_list or list(range(self.num_labels))
        setattr(self, self._weight_name, loss_weights(weight, self._weight_name, labels))
        self._lock = threading.RLock()
        self.results: dict[str, Any] = {}
        self._engine.scorer()  # raises an error now if arguments do not fit the model

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle, without the lock."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of `__getstate__`."""
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @property
    def args(self) -> ClassificationArgs:
        """The arguments. They may be changed between calls."""
        return self._engine.args

    @args.setter
    def args(self, args: ClassificationArgs) -> None:
        if not isinstance(args, ClassificationArgs):
            raise SettingsError(
                f"args must be an Args object, not {type(args).__name__}; change single ones: model.args.name = value"
            )
        self._engine.args = args

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer. Tokens that are added to it are used and saved, if the embeddings are resized."""
        return self._engine.tokenizer

    @property
    def model(self) -> torch.nn.Module:
        """The Hugging Face module."""
        return self._engine.model.module

    def train_model(
        self,
        train_df: Any,
        multi_label: bool = False,
        output_dir: str | None = None,
        show_running_loss: bool = True,
        args: Mapping[str, Any] | None = None,
        eval_df: Any = None,
        verbose: bool = True,
        eval_data: Any = None,
        **metrics: Metric,
    ) -> tuple[int, float | dict[str, list[Any]]]:
        """Fine-tune and save to output_dir. With evaluate_during_training, the best weights are kept.

        If the model was opened from a checkpoint of an unfinished run, the first call resumes that run.

        Returns:
            (optimizer steps, mean loss), or (steps, progress lists by name) with evaluate_during_training.
        """
        with self._lock:
            return self._train(train_df, output_dir, args or {}, eval_data if eval_data is not None else eval_df,
                               is_silent=self.args.silent or not verbose, metrics=metrics)  # fmt: skip

    def _train(
        self,
        train_df: Any,
        output_dir: str | None,
        args: Mapping[str, Any],
        eval_data: Any,
        *,
        is_silent: bool,
        metrics: Mapping[str, Metric],
    ) -> tuple[int, float | dict[str, list[Any]]]:
        self.args.update_from_dict(args)
        output = output_dir or self.args.output_dir
        check_output(output, self.args)
        if self.args.evaluate_during_training and eval_data is None:
            raise DataError("evaluate_during_training needs eval_df (or eval_data) in train_model")
        check_metrics(metrics)
        settings = self._train_settings()
        BestMetric.of(settings, self._engine.decision, tuple(metrics))
        train = self._engine.labelled(read_rows(train_df, self._engine.label_columns))
        valid = (
            self._engine.labelled(read_rows(eval_data, self._engine.label_columns))
            if self.args.evaluate_during_training
            else None
        )
        checkpoint, self._checkpoint = self._checkpoint, None
        run = FacadeRun(train, valid, output, settings, metrics, checkpoint)
        with hidden_progress(is_silent):
            if self.args.num_workers:
                from pipelines.simpletransformers.workers import fit_on_workers  # imports Ray, only where it is used

                state = fit_on_workers(self._engine, run)
            else:
                state = fit_documents(self._engine, run)
        if valid is None:
            return state.step, float(np.mean(state.losses))
        return state.step, progress_lists(state)

    def eval_model(
        self,
        eval_df: Any,
        multi_label: bool = False,
        output_dir: str | None = None,
        verbose: bool = True,
        silent: bool = False,
        wandb_log: bool = False,
        **metrics: Metric,
    ) -> tuple[dict[str, Any], Any, list[InputExample]]:
        """Return metrics, raw outputs as from `predict`, and the texts with wrong predictions.

        Further keywords are metrics of the caller. They get (true labels, predictions). If the name starts with prob_,
        they get (true labels, raw outputs). Their results replace built-in metrics of the same name.
        """
        check_metrics(metrics)
        with self._lock:
            return self._evaluate(eval_df, output_dir, metrics)

    def _evaluate(
        self, eval_df: Any, output_dir: str | None, metrics: Mapping[str, Metric]
    ) -> tuple[dict[str, Any], Any, list[InputExample]]:
        data = read_rows(eval_df, self._engine.label_columns)
        labelled = self._engine.labelled(data)
        decision = self._engine.decision
        scores = self._engine.scorer(for_predictions=True).score_documents(labelled.documents)
        decisions = decide(scores.scores_DL, decision, scores.votes_DL)
        loss = resolve_loss(self._train_settings(), decision, labelled.targets)
        result = theirs(evaluate(labelled.targets, scores.scores_DL, decisions, decision))
        result["eval_loss"] = mean_loss(scores, labelled.targets, loss)
        result |= own_metrics(self._engine, metrics, labelled.targets, decisions, scores)
        self.results.update(result)
        if output_dir is not None:
            write_results(Path(output_dir), result)
        outputs = raw_outputs(scores, decision, by_window=self.args.sliding_window)
        return result, outputs, wrong_predictions(data, labelled.targets, predicted(decisions))

    def predict(self, to_predict: Any, multi_label: bool = False) -> tuple[Any, Any]:
        """Return predictions and raw outputs of texts, of pairs [text_a, text_b], or of a table with a column text.

        Returns:
            Predictions: label ids (n,), or label names if labels_list has them; 0/1 lists for multi-label; values (n,)
            for regression. Raw outputs: logits (n, L); probabilities for multi-label; values (n,) for regression. With
            sliding_window, raw outputs are a list of n arrays (W, L).
        """
        texts, pairs = read_texts(to_predict)
        with self._lock:
            scorer = self._engine.scorer(for_predictions=True)
            scores = scorer.score_documents(self._engine.documents(texts, pairs))
            found = predicted(scorer.decide(scores))
            outputs = raw_outputs(scores, scorer.decision, by_window=self.args.sliding_window)
            names = self._engine.label_names
        return (found if names is None else [names[label] for label in found]), outputs

    def save_model(
        self,
        output_dir: str | None = None,
        optimizer: Any = None,
        scheduler: Any = None,
        model: Any = None,
        results: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a finished model folder with model_args.json. `pipelines score` and `pipelines serve` can read it.

        optimizer, scheduler and model are ignored; Simple Transformers has these parameters. Only checkpoints contain
        the first two, and the weights are always those of this model. results are written to eval_results.txt.
        """
        folder = Path(output_dir or self.args.output_dir)
        with self._lock:
            replace_files(folder, self._engine.write)
        if results:
            write_results(folder, results)

    def save_model_args(self, output_dir: str) -> None:
        """Write only model_args.json."""
        self.args.save(output_dir)

    def get_named_parameters(self) -> list[str]:
        """Return the parameter names that custom_parameter_groups can use."""
        return [name for name, _ in self.model.named_parameters()]

    def _train_settings(self) -> TrainSettings:
        return train_settings(self.args, self.device, **{self._weight_name: getattr(self, self._weight_name)})


class MultiLabelClassificationModel(ClassificationModel):
    """Any number of labels per text. The third positional argument is num_labels, as in Simple Transformers."""

    _args_class = MultiLabelClassificationArgs
    _is_multilabel = True
    _weight_name = "pos_weight"
    pos_weight: Any = None
    """Loss weights of the labels' positive examples, or None. May be changed between calls."""

    def __init__(
        self,
        model_type: str,
        model_name: str,
        num_labels: int | None = None,
        pos_weight: Sequence[float] | Mapping[Any, float] | None = None,
        args: Mapping[str, Any] | ClassificationArgs | None = None,
        use_cuda: bool | None = None,
        cuda_device: int = -1,
        **kwargs: Any,
    ) -> None:
        """Open pretrained or fine-tuned weights. Default: 2 labels, if num_labels, labels_list and weights set none.

        pos_weight has one number per label, or maps labels to numbers.
        """
        refuse_keywords(kwargs, is_multilabel=True)
        super().__init__(
            model_type,
            model_name,
            num_labels=num_labels,
            weight=pos_weight,
            args=args,
            use_cuda=use_cuda,
            cuda_device=cuda_device,
            **kwargs,
        )

    def train_model(  # type: ignore[override]  # positions as in Simple Transformers' own subclass
        self,
        train_df: Any,
        multi_label: bool = True,
        eval_df: Any = None,
        output_dir: str | None = None,
        show_running_loss: bool = True,
        args: Mapping[str, Any] | None = None,
        verbose: bool = True,
        eval_data: Any = None,
        **metrics: Metric,
    ) -> tuple[int, float | dict[str, list[Any]]]:
        """As in `ClassificationModel`, but metrics of the caller get probabilities (n, L)."""
        return super().train_model(
            train_df, multi_label, output_dir, show_running_loss, args, eval_df, verbose, eval_data, **metrics
        )
