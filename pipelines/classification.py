"""A drop-in for the classification models of Simple Transformers: change the import, keep the script.

The facades translate arguments to settings, data to documents, and answers to the shapes that scripts expect;
tokenizing, windows, training and scoring are the core's. What differs on purpose is in docs/simpletransformers.md.

Shapes: n texts, W windows of one text, L labels.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipelines.arguments import BY_NAME, ClassificationArgs, MultiLabelClassificationArgs
from pipelines.errors import DataError, ModelFolderError, OutputError, SettingsError
from pipelines.evaluation import evaluate
from pipelines.frames import LabelledTexts, label_array, read_rows, split_pairs
from pipelines.labels import Decisions, decide, encode_labels
from pipelines.loop import STATE_FILE, TENSORS_FILE, Evaluation, Report, TrainLoop, TrainState
from pipelines.losses import resolve_loss
from pipelines.model import PROBLEM_TYPES, WindowModel, resolve_device, row_limit
from pipelines.model_folder import ModelFolder, check_weights, seal
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
from pipelines.settings import TrainSettings
from pipelines.steps import rank
from pipelines.tokenization import Documents
from pipelines.training import LabelledDocuments, cut_windows, mean_loss, measure, watch_of
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

MODEL_TYPES = {
    "bertweet": "roberta",
    "bigbird": "big_bird",
    "debertav2": "deberta-v2",
    "herbert": "bert",
    "xlmroberta": "xlm-roberta",
}
"""Their names of architectures that are not Hugging Face's."""
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
        self.args = resolve_args(self._args_class, model_name, args)
        self.args.model_name, self.args.model_type = model_name, model_type
        self.args.tokenizer_name, self.args.tokenizer_type = tokenizer_name or model_name, tokenizer_type or model_type
        _warn_of_inert(self.args)
        if self.args.thread_count:
            torch.set_num_threads(self.args.thread_count)
        self.weight = None if weight is None else tuple(float(value) for value in weight)
        self.device = _device(use_cuda, cuda_device)
        counted = count_labels(self.args, num_labels, is_multilabel=self._is_multilabel)
        self.config = _config(model_type, model_name, counted, self.args)
        self.num_labels: int = self.config.num_labels
        self.results: dict[str, Any] = {}
        self._decision = decision_settings(self.args, self.num_labels, is_multilabel=self._is_multilabel)
        self._set_config_labels()
        self._folder = tempfile.TemporaryDirectory(prefix="pipelines-model-")
        more_tokens = self.args.special_tokens_list
        self.tokenizer = save_tokenizer(tokenizer_name or model_name, Path(self._folder.name), more_tokens)
        self._window_model = self._load(model_name, kwargs)
        self._checkpoint = Path(model_name) if (Path(model_name) / STATE_FILE).is_file() else None
        self._scorer()

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
        _check_output(output, self.args)
        eval_data = eval_data if eval_data is not None else eval_df
        if self.args.evaluate_during_training and eval_data is None:
            raise DataError("evaluate_during_training needs eval_df (or eval_data) in train_model")
        _check_metrics(metrics)
        watch_of(self._train_settings(), self._decision, tuple(metrics))
        train = self._labelled(read_rows(train_df))
        valid = self._labelled(read_rows(eval_data)) if self.args.evaluate_during_training else None
        fit = self._fit_on_workers if self.args.num_workers else self.fit_documents
        state = fit(train, valid, output, metrics, _report if verbose and not self.args.silent else _silent)
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
        data = cut_windows(scorer, train, settings)
        loss = resolve_loss(settings, self._decision, data.targets)
        compute = compute_settings(self.args, self.device)

        def more(targets: NDArray[np.generic], decisions: Decisions, scores: DocumentScores) -> dict[str, Any]:
            return self._own_metrics(metrics, targets, decisions, scores)

        def evaluation() -> Evaluation:
            assert valid is not None
            return measure(scorer, valid, loss, compute, more)

        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.model.float()
        loop = TrainLoop(
            self._window_model,
            data,
            settings,
            loss,
            watch=watch_of(settings, self._decision, tuple(metrics)),
            evaluate=None if valid is None else evaluation,
            on_best=lambda loop: self._save_best(loop, output),
            on_checkpoint=lambda loop: self._save_checkpoint(loop, output),
            report=report,
        )
        self._go_on(loop)
        state = loop.run()
        self.model.to(self._window_model.dtype)
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
        _check_metrics(metrics)
        data = read_rows(eval_df)
        labelled = self._labelled(data)
        scores = self._scorer().score_documents(labelled.documents)
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
        scores = self._scorer().score_documents(self._documents(*split_pairs(list(to_predict))))
        found = predicted(decide(scores.scores_DL, self._decision, scores.votes_DL))
        outputs = raw_outputs(scores, self._decision, by_window=self.args.sliding_window)
        names = list(self.args.labels_map)
        if names and not self._is_multilabel and self._decision.kind != "regression":
            return [names[label] for label in found], outputs
        return found, outputs

    def save_model(self, output_dir: str | None = None) -> None:
        """Write a finished model folder, which `pipelines score` and `pipelines serve` take, with model_args.json."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(self._folder.name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        self._window_model.save(folder)
        self.args.save(str(folder))
        windows = replace(window_settings(self.args), max_length=self._scorer().plan.max_length)
        seal(ModelFolder(folder, windows, self._decision))

    def _set_config_labels(self) -> None:
        names = list(self._decision.labels) or ["value"]
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: number for number, name in enumerate(names)}
        self.config.problem_type = PROBLEM_TYPES[self._decision.kind]

    def _load(self, model_name: str, kwargs: Mapping[str, Any]) -> WindowModel:
        torch.manual_seed(seed_of(self.args))
        with quiet_transformers():
            module = AutoModelForSequenceClassification.from_pretrained(
                model_name, config=self.config, use_safetensors=True, dtype=torch.float32, **kwargs
            )
            if self.args.special_tokens_list:
                module.resize_token_embeddings(max(vocabulary_size(Path(self._folder.name)), self.config.vocab_size))
        type_ids = uses_type_ids(Path(self._folder.name))
        compute = compute_settings(self.args, self.device)
        return WindowModel(module, self.tokenizer.template, compute, uses_type_ids=type_ids)

    def _scorer(self) -> Scorer:
        """The core's scorer under the arguments as they are now; they may be changed between calls."""
        self._decision = decision_settings(self.args, self.num_labels, is_multilabel=self._is_multilabel)
        model_type = str(self.args.model_type if self.args.model_type != "auto" else self.config.model_type)
        windows = window_settings(self.args)
        plan = plan_of(windows, self.tokenizer, model_type=model_type, model_limit=row_limit(self.model))
        self.tokenizer = self.tokenizer.with_lead_space(leads_with_space(windows, model_type))
        return Scorer(self._window_model, self.tokenizer, plan, self._decision)

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
        """fit_documents in Ray Train workers, each of which opens this model from a folder that all of them reach."""
        from pipelines.on_ray.train import run_workers  # a second of imports, and only here

        Path(output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".workers-") as shared:
            self.save_model(f"{shared}/start")
            if self._checkpoint is not None:
                for name in (STATE_FILE, TENSORS_FILE):
                    shutil.copy(self._checkpoint / name, f"{shared}/start")
            config = {
                "facade": type(self),
                "args": self.args.get_args_for_saving(),
                "weights": self._loss_weights(),
                "folder": os.path.abspath(shared),
                "output": os.path.abspath(output),
                "metrics": dict(metrics),
            }
            state: TrainState = run_workers(
                _fit_in_worker, config, [train, valid], num_workers=self.args.num_workers, report=report
            )
            with quiet_transformers():
                trained = AutoModelForSequenceClassification.from_pretrained(
                    f"{shared}/trained", use_safetensors=True, dtype=self._window_model.dtype
                )
            self.model.load_state_dict(trained.state_dict())
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
        if self.args.save_best_model and not self.args.no_save and rank() == 0:
            default = self.args.best_model_dir == BY_NAME["best_model_dir"].default
            folder = Path(output) / "best_model" if default else Path(self.args.best_model_dir)
            self.save_model(str(folder))
            write_results(folder, theirs(loop.state.best_metrics))

    def _save_checkpoint(self, loop: TrainLoop, output: str) -> None:
        """A model folder that train_model can go on from; written under another name first."""
        if self.args.no_save or rank() > 0:
            return
        epoch = f"-epoch-{loop.state.epoch}" if loop.is_epoch_end else ""
        folder = Path(output) / f"checkpoint-{loop.state.step}{epoch}"
        partial = Path(output) / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.save_model(str(partial))
        if self.args.save_optimizer_and_scheduler:
            loop.save(partial)
        if loop.state.evaluations:
            write_results(partial, theirs(loop.state.evaluations[-1]))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def _loss_weights(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def _documents(self, texts: list[str], pairs: list[str] | None) -> Documents:
        columns = {"text": pa.array(texts, pa.string())}
        if pairs is not None:
            columns["text_pair"] = pa.array(pairs, pa.string())
        documents = self.tokenizer.documents(pa.table(columns), *columns)
        bad = next(((row, error) for row, error in enumerate(documents.errors) if error), None)
        if bad is not None:
            raise DataError(f"text {bad[0]}: {bad[1]}")
        return documents

    def _labelled(self, data: LabelledTexts) -> LabelledDocuments:
        if data.labels is None:
            raise DataError("the data has no labels: it needs a column `labels`, or labels as its second column")
        if not data.texts:
            raise DataError("the data has no rows")
        targets = encode_labels(pa.chunked_array([label_array(data.labels, self._decision)]), self._decision)
        return LabelledDocuments(self._documents(data.texts, data.pairs), targets)

    def _own_metrics(
        self,
        metrics: Mapping[str, Metric],
        targets: NDArray[np.generic],
        decisions: Decisions,
        scores: DocumentScores,
    ) -> dict[str, Any]:
        found, outputs = predicted(decisions), raw_outputs(scores, self._decision, by_window=self.args.sliding_window)
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
        self.pos_weight = None if pos_weight is None else tuple(float(value) for value in pos_weight)
        super().__init__(
            model_type,
            model_name,
            num_labels=num_labels,
            args=args,
            use_cuda=use_cuda,
            cuda_device=cuda_device,
            **kwargs,
        )

    def _loss_weights(self) -> dict[str, Any]:
        return {"pos_weight": self.pos_weight}


def _warn_of_inert(args: ClassificationArgs) -> None:
    names = args.changed("inert")
    if names:
        message = f"without effect here: {', '.join(names)} (docs/simpletransformers.md says why)"
        warnings.warn(message, UserWarning, stacklevel=3)


def _device(use_cuda: bool | None, cuda_device: int) -> str:
    if use_cuda is None:
        return str(resolve_device("auto" if cuda_device < 0 else f"cuda:{cuda_device}"))
    if not use_cuda:
        return "cpu"
    return str(resolve_device("cuda" if cuda_device < 0 else f"cuda:{cuda_device}"))


def _config(model_type: str, model_name: str, num_labels: int | None, args: ClassificationArgs) -> Any:
    if Path(model_name).is_dir():
        check_weights(Path(model_name))
    values = {**({} if num_labels is None else {"num_labels": num_labels}), **args.config}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(model_name, **values)
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{model_name} is no folder and no hub name: {str(error).splitlines()[0]}") from error
    wanted = MODEL_TYPES.get(model_type, model_type)
    if wanted not in ("auto", config.model_type):
        raise ModelFolderError(
            f"model_type is {model_type!r} but {model_name} holds a {config.model_type!r}; use that, or 'auto'"
        )
    return config


def _check_output(output: str, args: ClassificationArgs) -> None:
    if args.no_save or args.overwrite_output_dir or not os.path.isdir(output) or not os.listdir(output):
        return
    raise OutputError(f"output_dir {output} is not empty; set overwrite_output_dir=True, or another output_dir")


def _fit_in_worker(config: Mapping[str, Any], train: LabelledDocuments, valid: LabelledDocuments | None) -> TrainState:
    """Runs in every Ray Train worker; rank 0 leaves the trained model beside the one that all opened."""
    args = config["facade"]._args_class(**{**config["args"], "overwrite_output_dir": True})
    cuda = torch.cuda.is_available()
    device = torch.cuda.current_device() if cuda else -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of inert arguments, which the driver has said
        model = config["facade"](
            "auto", f"{config['folder']}/start", args=args, use_cuda=cuda, cuda_device=device, **config["weights"]
        )
    state: TrainState = model.fit_documents(
        train, valid, config["output"], config["metrics"], lambda line: config["relay"].say.remote(line)
    )
    if rank() == 0:
        model.save_model(f"{config['folder']}/trained")
    return state


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    for name, metric in metrics.items():
        if not callable(metric):
            raise SettingsError(f"{name}={metric!r} is no metric: pass a function of (true labels, predictions)")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """Where nothing is to be said."""
