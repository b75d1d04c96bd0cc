"""A drop-in for the classification models of Simple Transformers: change the import, keep the script.

The facades translate arguments to settings, data to documents, and answers to the shapes that scripts expect;
tokenizing, windows, training and scoring are the core's. What differs on purpose is in docs/simpletransformers.md.

Shapes: n texts, W windows of one text, L labels.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipelines.arguments import BY_NAME, ClassificationArgs, MultiLabelClassificationArgs
from pipelines.checkpoints import STATE_FILE
from pipelines.corpus import Corpus, LabelledDocuments
from pipelines.errors import DataError, ModelFolderError
from pipelines.evaluation import evaluate
from pipelines.folders import check_output, replace_files, replace_folder
from pipelines.frames import LabelledTexts, label_array, read_rows, split_pairs, text_array
from pipelines.labels import Decisions, decide, encode_labels
from pipelines.loop import Evaluation, Report, TrainLoop, TrainState
from pipelines.losses import resolve_loss
from pipelines.model import PROBLEM_TYPES, WindowModel, resolve_dtype, row_limit
from pipelines.model_folder import ModelFolder, seal
from pipelines.opening import (
    args_of_folder,
    check_metrics,
    device_of,
    loss_weights,
    open_config,
    refuse_keywords,
    reporter,
    warn_of_inert,
)
from pipelines.pretrained import quiet_transformers, save_tokenizer, uses_type_ids, vocabulary_size
from pipelines.returns import (
    InputExample,
    predicted,
    progress_lists,
    raw_outputs,
    write_progress,
    write_results,
    wrong_predictions,
)
from pipelines.scoring import DocumentScores, Scorer, plan_of
from pipelines.settings import TrainSettings, WindowSettings
from pipelines.steps import rank
from pipelines.tokenization import Documents
from pipelines.training import mean_loss, measure, watch_of, window_parts
from pipelines.translation import (
    compute_settings,
    count_labels,
    decision_settings,
    resolve_args,
    seed_of,
    theirs,
    train_settings,
    window_settings,
)
from pipelines.windows import leads_with_space

__all__ = [
    "ClassificationArgs",
    "ClassificationModel",
    "InputExample",
    "MultiLabelClassificationArgs",
    "MultiLabelClassificationModel",
]

Metric = Callable[[Any, Any], Any]


class ClassificationModel:
    """Binary and multi-class classification, and regression."""

    _args_class: type[ClassificationArgs] = ClassificationArgs
    _is_multilabel = False

    def __init__(
        self,
        model_type: str,
        model_name: str,
        tokenizer_type: str | None = None,
        tokenizer_name: str | None = None,
        num_labels: int | None = None,
        weight: Sequence[float] | None = None,
        args: Mapping[str, Any] | ClassificationArgs | None = None,
        use_cuda: bool | None = None,
        cuda_device: int = -1,
        **kwargs: Any,
    ) -> None:
        """Open pretrained or fine-tuned weights, by hub name or folder.

        use_cuda None takes a GPU when there is one. Further keywords go to Hugging Face's from_pretrained.
        Raises SettingsError and ModelFolderError for what cannot be had, before any weights are read.
        """
        refuse_keywords(kwargs)
        self.args = resolve_args(self._args_class, model_name, args, args_of_folder(Path(model_name)))
        self._their_type = model_type if model_type != "auto" else self.args.model_type or "auto"
        self.args.model_class = type(self).__name__
        self.args.model_name, self.args.model_type = model_name, model_type
        self.args.tokenizer_name, self.args.tokenizer_type = tokenizer_name or model_name, tokenizer_type or model_type
        warn_of_inert(self.args)
        if self.args.thread_count:
            torch.set_num_threads(self.args.thread_count)
        self.weight = loss_weights(weight)
        self.device = device_of(use_cuda, cuda_device)
        counted = count_labels(self.args, num_labels, is_multilabel=self._is_multilabel)
        self.config = open_config(model_type, model_name, counted, self.args)
        self.num_labels: int = self.config.num_labels
        self.results: dict[str, Any] = {}
        self._decision = decision_settings(self.args, self.num_labels, is_multilabel=self._is_multilabel)
        self._set_config_labels()
        self._folder = tempfile.TemporaryDirectory(prefix="pipelines-model-")
        more_tokens = self.args.special_tokens_list
        self._tokenizer = save_tokenizer(tokenizer_name or model_name, Path(self._folder.name), more_tokens)
        self._window_model = self._load(model_name, kwargs)
        self._working: WindowModel | None = None
        self._checkpoint = Path(model_name) if (Path(model_name) / STATE_FILE).is_file() else None
        self._scorer()

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; scoring and training go by the folder's tokenizer.json."""
        return AutoTokenizer.from_pretrained(self._folder.name, trust_remote_code=False)

    @property
    def model(self) -> torch.nn.Module:
        """The Hugging Face module."""
        return self._window_model.module

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
        """Fine-tune, keep the best weights where evaluate_during_training, save to output_dir.

        Returns (optimizer steps, mean loss), or (steps, progress lists by name) under evaluate_during_training.
        Opened on a checkpoint of an unfinished run, the first call goes on with that run.
        """
        self.args.update_from_dict(args or {})
        output = output_dir or self.args.output_dir
        check_output(output, self.args)
        eval_data = eval_data if eval_data is not None else eval_df
        if self.args.evaluate_during_training and eval_data is None:
            raise DataError("evaluate_during_training needs eval_df (or eval_data) in train_model")
        check_metrics(metrics)
        watch_of(self._train_settings(), self._decision, tuple(metrics))
        train = self._labelled(read_rows(train_df))
        valid = self._labelled(read_rows(eval_data)) if self.args.evaluate_during_training else None
        fit = self._fit_on_workers if self.args.num_workers else self.fit_documents
        state = fit(train, valid, output, metrics, reporter(is_quiet=self.args.silent or not verbose))
        if valid is None:
            return state.step, float(np.mean(state.losses))
        return state.step, progress_lists(state)

    def fit_documents(
        self,
        train: LabelledDocuments,
        valid: LabelledDocuments | None,
        output: str,
        metrics: Mapping[str, Metric],
        report: Report,
    ) -> TrainState:
        """The core of train_model, in this process or as one rank of a group; rank 0 writes the files."""
        scorer, settings = self._scorer(), self._train_settings()
        corpus, validation = Corpus.of(train), None if valid is None else Corpus.of(valid)
        validated = None if validation is None else validation.fingerprint
        loss = resolve_loss(settings, self._decision, corpus.targets)
        compute = compute_settings(self.args, self.device)

        def more(targets: NDArray[np.generic], decisions: Decisions, scores: DocumentScores) -> dict[str, Any]:
            return self._own_metrics(metrics, targets, decisions, scores)

        def evaluation() -> Evaluation:
            assert validation is not None
            return measure(scorer, validation, loss, compute, more)

        loop = TrainLoop(
            self._window_model,
            window_parts(scorer, corpus, settings),
            settings,
            loss,
            watch=watch_of(settings, self._decision, tuple(metrics)),
            evaluate=None if valid is None else evaluation,
            on_best=lambda loop: self._save_best(loop, output),
            on_checkpoint=lambda loop: self._save_checkpoint(loop, output),
            also={"validation data": validated, "metrics": sorted(metrics)},
            report=report,
        )
        self._go_on(loop)
        try:
            state = loop.run()
        finally:
            self._working = None  # a copy of weights that are others now
        if not self.args.no_save and rank() == 0:
            self.save_model(output)
            if valid is not None:
                write_progress(Path(output), state)
        return state

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
        """Metrics, raw outputs as `predict` gives them, and the texts that were predicted wrong.

        Further keywords are metrics of one's own, called with (true labels, predictions), or, where the name starts
        with prob_, with (true labels, raw outputs); their results win.
        """
        check_metrics(metrics)
        data = read_rows(eval_df)
        labelled = self._labelled(data)
        scores = self._scorer(working=True).score_documents(labelled.documents)
        decisions = decide(scores.scores_DL, self._decision, scores.votes_DL)
        loss = resolve_loss(self._train_settings(), self._decision, labelled.targets)
        result = theirs(evaluate(labelled.targets, scores.scores_DL, decisions, self._decision))
        result["eval_loss"] = mean_loss(scores, labelled.targets, loss)
        result |= self._own_metrics(metrics, labelled.targets, decisions, scores)
        self.results.update(result)
        if output_dir is not None:
            write_results(Path(output_dir), result)
        outputs = raw_outputs(scores, self._decision, by_window=self.args.sliding_window)
        return result, outputs, wrong_predictions(data, labelled.targets, predicted(decisions))

    def predict(self, to_predict: Sequence[Any], multi_label: bool = False) -> tuple[Any, Any]:
        """Predictions and raw outputs of texts, or of pairs given as [text_a, text_b].

        Predictions: label ids (n,), label names where labels_list gives them, 0/1 lists for several labels, values
        (n,) for regression. Raw outputs: logits (n, L) (several labels: probabilities; regression: values (n,)),
        or with sliding_window a list of n arrays (W, L).
        """
        if isinstance(to_predict, str):
            raise DataError("predict takes a list of texts; put the text into a list")
        rows = to_predict.tolist() if hasattr(to_predict, "tolist") else list(to_predict)
        scores = self._scorer(working=True).score_documents(self._documents(*split_pairs(rows)))
        found = predicted(decide(scores.scores_DL, self._decision, scores.votes_DL))
        outputs = raw_outputs(scores, self._decision, by_window=self.args.sliding_window)
        names = list(self.args.labels_list)
        if self.args.labels_map and not self._is_multilabel and self._decision.kind != "regression":
            return [names[label] for label in found], outputs
        return found, outputs

    def save_model(
        self,
        output_dir: str | None = None,
        optimizer: Any = None,
        scheduler: Any = None,
        model: Any = None,
        results: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a finished model folder, which `pipelines score` and `pipelines serve` take, with model_args.json.

        optimizer, scheduler and model are taken for Simple Transformers' sake: checkpoints keep the first two, and
        the weights are always this model's. results are written into eval_results.txt.
        """
        folder = Path(output_dir or self.args.output_dir)
        replace_files(folder, self._write)
        if results:
            write_results(folder, results)

    def save_model_args(self, output_dir: str) -> None:
        """Write model_args.json alone."""
        self.args.save(output_dir)

    def get_named_parameters(self) -> list[str]:
        """Names that custom_parameter_groups can use."""
        return [name for name, _ in self.model.named_parameters()]

    def _write(self, folder: Path) -> None:
        """Everything of a finished folder, into one that is not there yet."""
        shutil.copytree(self._folder.name, folder)
        self._window_model.save(folder)
        self.args.save(str(folder))
        windows = replace(self._windows(), max_length=self._scorer().plan.max_length)
        seal(ModelFolder(folder, windows, self._decision))

    def _windows(self) -> WindowSettings:
        return window_settings(self.args, None if self._their_type == "auto" else self._their_type)

    def _set_config_labels(self) -> None:
        names = list(self._decision.labels) or ["value"]
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: number for number, name in enumerate(names)}
        self.config.problem_type = PROBLEM_TYPES[self._decision.kind]

    def _load(self, model_name: str, kwargs: Mapping[str, Any]) -> WindowModel:
        torch.manual_seed(seed_of(self.args))
        try:
            with quiet_transformers():
                module = AutoModelForSequenceClassification.from_pretrained(
                    model_name, config=self.config, use_safetensors=True, dtype=torch.float32, **kwargs
                )
                if self.args.special_tokens_list:
                    size = max(vocabulary_size(Path(self._folder.name)), self.config.vocab_size)
                    module.resize_token_embeddings(size)
        except RuntimeError as error:
            raise ModelFolderError(
                f"the weights of {model_name} do not fit {self.num_labels} labels; give the number that it was trained "
                f"with, or ignore_mismatched_sizes=True for a new head"
            ) from error
        compute = replace(compute_settings(self.args, self.device), dtype="float32")
        type_ids = uses_type_ids(Path(self._folder.name))
        return WindowModel(module, self._tokenizer.template, compute, uses_type_ids=type_ids)

    def _scorer(self, *, working: bool = False) -> Scorer:
        """The core's scorer under the arguments as they are now; they may be changed between calls.

        Weights are kept in float32, by which training goes on exactly; working takes a copy in args.dtype.
        """
        self._decision = decision_settings(self.args, self.num_labels, is_multilabel=self._is_multilabel)
        windows, model_type = self._windows(), str(self.config.model_type)
        plan = plan_of(windows, self._tokenizer, model_type=model_type, model_limit=row_limit(self.model))
        self._tokenizer = self._tokenizer.with_lead_space(leads_with_space(windows, model_type))
        model = self._in_dtype() if working else self._window_model
        return Scorer(model, self._tokenizer, plan, self._decision)

    def _in_dtype(self) -> WindowModel:
        compute = compute_settings(self.args, self.device)
        if resolve_dtype(compute.dtype, self._window_model.device) == torch.float32:
            return self._window_model
        if self._working is None:
            self._working = self._window_model.copy(compute)
        return self._working

    def _train_settings(self) -> TrainSettings:
        return train_settings(self.args, self.device, **self._loss_weights())

    def _fit_on_workers(
        self,
        train: LabelledDocuments,
        valid: LabelledDocuments | None,
        output: str,
        metrics: Mapping[str, Metric],
        report: Report,
    ) -> TrainState:
        """fit_documents in Ray Train workers."""
        from pipelines.on_ray.facade import fit_on_workers  # a second of imports, and only here

        checkpoint, self._checkpoint = self._checkpoint, None
        facade = {"class": type(self), "model_type": self._their_type, "weights": self._loss_weights()}
        state, weights = fit_on_workers(
            facade, self.args, self.save_model, checkpoint, [train, valid], output, metrics, report
        )
        self.model.load_state_dict(weights)
        self._working = None
        if not self.args.no_save:
            self.save_model(output)
        return state

    def _go_on(self, loop: TrainLoop) -> None:
        """Where this model was opened on a checkpoint of the same run, take its place in it; once."""
        folder, self._checkpoint = self._checkpoint, None
        if folder is not None:
            try:
                loop.restore(folder)
            except ModelFolderError as error:
                warnings.warn(f"{error}; training starts anew from its weights", UserWarning, stacklevel=4)

    def _save_best(self, loop: TrainLoop, output: str) -> None:
        if not self.args.save_best_model or self.args.no_save or rank() > 0:
            return
        default = self.args.best_model_dir == BY_NAME["best_model_dir"].default
        folder = Path(output) / "best_model" if default else Path(self.args.best_model_dir)

        def write(aside: Path) -> None:
            self._write(aside)
            write_results(aside, theirs(loop.state.best_metrics))

        replace_folder(folder, write)

    def _save_checkpoint(self, loop: TrainLoop, output: str) -> None:
        """A model folder that train_model can go on from."""
        if self.args.no_save or rank() > 0:
            return
        ends_epoch = loop.is_epoch_end and self.args.save_model_every_epoch
        name = f"checkpoint-{loop.state.step}" + (f"-epoch-{loop.state.epoch}" if ends_epoch else "")

        def write(aside: Path) -> None:
            self._write(aside)
            if self.args.save_optimizer_and_scheduler:
                loop.save(aside)
            if loop.state.evaluations:
                write_results(aside, theirs(loop.state.evaluations[-1]))

        replace_folder(Path(output) / name, write)

    def _loss_weights(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def _documents(self, texts: list[str], pairs: list[str] | None) -> Documents:
        columns = {"text": text_array(texts)}
        if pairs is not None:
            columns["text_pair"] = text_array(pairs)
        documents = self._tokenizer.documents(pa.table(columns), *columns)
        bad = next(((row, error) for row, error in enumerate(documents.errors) if error), None)
        if bad is not None:
            raise DataError(f"text {bad[0]}: {bad[1]}")
        return documents

    def _labelled(self, data: LabelledTexts) -> LabelledDocuments:
        if data.labels is None:
            raise DataError("the data has no labels: it needs a column `labels`, or labels as its second column")
        if not data.texts:
            raise DataError("the data has no rows")
        names = list(self.args.labels_list) if self.args.labels_map and not self._is_multilabel else None
        labels = label_array(data.labels, self._decision, names)
        targets = encode_labels(pa.chunked_array([labels]), self._decision)
        return LabelledDocuments(self._documents(data.texts, data.pairs), targets)

    def _own_metrics(
        self,
        metrics: Mapping[str, Metric],
        targets: NDArray[np.generic],
        decisions: Decisions,
        scores: DocumentScores,
    ) -> dict[str, Any]:
        found, outputs = predicted(decisions), raw_outputs(scores, self._decision, by_window=self.args.sliding_window)
        if self._is_multilabel:  # whose metrics are given probabilities there
            found = scores.scores_DL.astype(np.float64)
        return {
            name: metric(targets, outputs if name.startswith("prob_") else found) for name, metric in metrics.items()
        }


class MultiLabelClassificationModel(ClassificationModel):
    """Any number of labels a text; the third positional argument is num_labels, as in Simple Transformers."""

    _args_class = MultiLabelClassificationArgs
    _is_multilabel = True

    def __init__(
        self,
        model_type: str,
        model_name: str,
        num_labels: int | None = None,
        pos_weight: Sequence[float] | None = None,
        args: Mapping[str, Any] | ClassificationArgs | None = None,
        use_cuda: bool | None = None,
        cuda_device: int = -1,
        **kwargs: Any,
    ) -> None:
        """Open pretrained or fine-tuned weights; 2 labels unless num_labels, labels_list or the weights say more."""
        self.pos_weight = loss_weights(pos_weight)
        super().__init__(
            model_type,
            model_name,
            num_labels=num_labels,
            args=args,
            use_cuda=use_cuda,
            cuda_device=cuda_device,
            **kwargs,
        )

    def train_model(  # type: ignore[override]  # its positions are those of Simple Transformers' own subclass
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
        """As for one label; metrics of one's own get probabilities (n, L)."""
        return super().train_model(
            train_df, multi_label, output_dir, show_running_loss, args, eval_df, verbose, eval_data, **metrics
        )

    def _loss_weights(self) -> dict[str, Any]:
        return {"pos_weight": self.pos_weight}
