"""A drop-in for the classification models of Simple Transformers: change the import, keep the script.

The facades translate arguments to settings, data to documents, and answers to the shapes that scripts expect;
tokenizing, windows, training and scoring are the core's. What differs on purpose is in docs/simpletransformers.md.

Shapes: n texts, W windows of one text, L labels.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipelines.arguments import SCHEDULERS, ClassificationArgs, MultiLabelClassificationArgs
from pipelines.errors import DataError, ModelFolderError, OutputError, SettingsError
from pipelines.evaluation import evaluate
from pipelines.frames import LabelledTexts, label_array, read_rows, split_pairs
from pipelines.labels import activate, decide, encode_labels
from pipelines.losses import resolve_loss
from pipelines.model import (
    PROBLEM_TYPES,
    WindowModel,
    first_position,
    quiet_transformers,
    resolve_device,
    save_tokenizer,
    uses_type_ids,
)
from pipelines.model_folder import ModelFolder, check_weights, seal
from pipelines.scoring import DocumentScores, Scorer, plan_of
from pipelines.settings import ComputeSettings, DecisionSettings, Kind, TrainSettings, WindowSettings
from pipelines.tokenization import Documents, cut_documents
from pipelines.training import LabelledDocuments, run_epochs

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
RESULT_NAMES = {"lrap": "LRAP"}
Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class InputExample:
    """One text of an evaluation, as `wrong_predictions` lists them."""

    guid: int
    text_a: str
    text_b: str | None
    label: Any


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
        self.args = _resolve_args(self._args_class, model_name, args)
        self.args.model_name, self.args.model_type = model_name, model_type
        self.args.tokenizer_name, self.args.tokenizer_type = tokenizer_name or model_name, tokenizer_type or model_type
        _warn_of_inert(self.args)
        if self.args.thread_count:
            torch.set_num_threads(self.args.thread_count)
        self.weight = None if weight is None else tuple(float(value) for value in weight)
        self.device = _device(use_cuda, cuda_device)
        self.config = _config(model_type, model_name, self._count_labels(num_labels), self.args)
        self.num_labels: int = self.config.num_labels
        self.results: dict[str, Any] = {}
        self._decision = self._resolve_decision()
        self._set_config_labels()
        self._folder = tempfile.TemporaryDirectory(prefix="pipelines-model-")
        self.tokenizer = save_tokenizer(tokenizer_name or model_name, Path(self._folder.name))
        self._window_model = self._load(model_name, kwargs)
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
        """Fine-tune, keep the best epoch where evaluate_during_training, save to output_dir.

        Returns (optimizer steps, mean loss), or (steps, progress lists by name) under evaluate_during_training.
        """
        self.args.update_from_dict(args or {})
        output = output_dir or self.args.output_dir
        _check_output(output, self.args)
        eval_data = eval_data if eval_data is not None else eval_df
        if self.args.evaluate_during_training and eval_data is None:
            raise DataError("evaluate_during_training needs eval_df (or eval_data) in train_model")
        scorer = self._scorer()
        train = self._labelled(read_rows(train_df))
        evaluated = self.args.evaluate_during_training
        valid = self._labelled(read_rows(eval_data)) if evaluated else None
        settings = self._train_settings()
        plan = scorer.plan.with_max_windows(self.args.train_max_windows)
        template = scorer.tokenizer.template
        cut = cut_documents(train.documents.tokens, plan, template, train.documents.pair_tokens)
        for name in self.model.parameters():
            name.requires_grad_(True)
        report = _report if verbose and not self.args.silent else lambda line: None
        history = run_epochs(scorer, cut, train.targets, valid, settings, self._compute(), report)
        if not self.args.no_save:
            self.save_model(output)
        losses = history["losses"]
        if valid is None:
            return len(losses), float(np.mean(losses))
        return len(losses), _progress_lists(history, settings.epochs)

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

        Further keywords are metrics of one's own, called with (true labels, predictions); their results win.
        """
        data = read_rows(eval_df)
        labelled = self._labelled(data)
        scorer = self._scorer()
        scores = scorer.score_documents(labelled.documents)
        decided = decide(scores.scores_DL, self._decision, scores.votes_DL)
        found = evaluate(labelled.targets, scores.scores_DL, decided, self._decision)
        result = {RESULT_NAMES.get(name, name): value for name, value in found.items()}
        result["eval_loss"] = self._eval_loss(scores, labelled.targets)
        predicted = self._predicted_ids(scores)
        for name, metric in metrics.items():
            if not callable(metric):
                raise SettingsError(f"{name}={metric!r} is no metric: pass a function of (true labels, predictions)")
            result[name] = metric(labelled.targets, predicted)
        self.results.update(result)
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            lines = [f"{name} = {result[name]}" for name in sorted(result)]
            (Path(output_dir) / "eval_results.txt").write_text("\n".join(lines) + "\n")
        return result, self._raw_outputs(scores), _wrong(data, labelled.targets, predicted)

    def predict(self, to_predict: Sequence[Any], multi_label: bool = False) -> tuple[Any, Any]:
        """Predictions and raw outputs of texts, or of pairs given as [text_a, text_b].

        Predictions: label ids (n,), label names where labels_list gives them, 0/1 lists for several labels, values
        (n,) for regression. Raw outputs: logits (n, L) (several labels: probabilities; regression: values (n,)),
        or with sliding_window a list of n arrays (W, L).
        """
        if isinstance(to_predict, str):
            raise DataError("predict takes a list of texts; put the text into a list")
        scores = self._scorer().score_documents(self._documents(*split_pairs(list(to_predict))))
        predicted = self._predicted_ids(scores)
        names = list(self.args.labels_map)
        if names and not self._is_multilabel and self._decision.kind != "regression":
            return [names[label] for label in predicted], self._raw_outputs(scores)
        return predicted, self._raw_outputs(scores)

    def save_model(self, output_dir: str | None = None) -> None:
        """Write a finished model folder, which `pipelines score` and `pipelines serve` take, with model_args.json."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(self._folder.name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        self._window_model.save(folder)
        self.args.save(str(folder))
        windows = replace(self._windows(), max_length=self._scorer().plan.max_length)
        seal(ModelFolder(folder, windows, self._decision))

    def _count_labels(self, num_labels: int | None) -> int | None:
        """Settle labels_list and labels_map; the number of labels, None where the weights are to say."""
        args = self.args
        if args.regression:
            if num_labels not in (None, 1):
                raise SettingsError(f"regression=True needs num_labels=1, not {num_labels}")
            return 1
        if args.labels_map:
            args.labels_list = sorted(args.labels_map, key=lambda name: int(args.labels_map[name]))
        names = list(args.labels_list)
        if names and num_labels not in (None, len(names)):
            raise SettingsError(f"num_labels={num_labels} but labels_list names {len(names)}: {names}")
        if names and not self._is_multilabel and names != list(range(len(names))):
            args.labels_map = {name: number for number, name in enumerate(names)}
        return len(names) or num_labels

    def _resolve_decision(self) -> DecisionSettings:
        args, single = self.args, not self._is_multilabel and not self.args.regression
        kind: Kind = "regression" if args.regression else "multilabel"
        if single:
            kind = "binary" if self.num_labels == 2 else "multiclass"
        names = tuple(map(str, args.labels_list)) or tuple(map(str, range(self.num_labels)))
        return DecisionSettings(
            kind=kind,
            labels=() if args.regression else names,
            merge=args.merge or ("vote" if single else "mean"),
            tie_value=args.tie_value,
            thresholds=_threshold(args.threshold) if self._is_multilabel else None,
        )

    def _set_config_labels(self) -> None:
        names = list(self._decision.labels) or ["value"]
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: number for number, name in enumerate(names)}
        self.config.problem_type = PROBLEM_TYPES[self._decision.kind]

    def _load(self, model_name: str, kwargs: Mapping[str, Any]) -> WindowModel:
        torch.manual_seed(_seed(self.args))
        with quiet_transformers():
            module = AutoModelForSequenceClassification.from_pretrained(
                model_name, config=self.config, use_safetensors=True, dtype=torch.float32, **kwargs
            )
        type_ids = uses_type_ids(Path(self._folder.name))
        return WindowModel(module, self.tokenizer.template, self._compute(), uses_type_ids=type_ids)

    def _scorer(self) -> Scorer:
        """The core's scorer under the arguments as they are now; they may be changed between calls."""
        self._decision = self._resolve_decision()
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and limit > 0:
            limit -= first_position(self.model)
        model_type = str(self.args.model_type if self.args.model_type != "auto" else self.config.model_type)
        plan = plan_of(self._windows(), self.tokenizer, model_type=model_type, model_limit=limit)
        return Scorer(self._window_model, self.tokenizer, plan, self._decision)

    def _windows(self) -> WindowSettings:
        args = self.args
        return WindowSettings(
            max_length=args.max_seq_length,
            sliding_window=args.sliding_window,
            stride=args.stride,
            window_plan=args.window_plan,
            dense_windows=args.dense_windows,
            max_windows=args.max_windows,
        )

    def _compute(self) -> ComputeSettings:
        return ComputeSettings(dtype=self.args.dtype, device=self.device, batch_tokens=self.args.batch_tokens)

    def _train_settings(self) -> TrainSettings:
        args = self.args
        if args.optimizer not in ("AdamW", "Adafactor"):
            raise SettingsError(f"optimizer={args.optimizer!r} is neither 'AdamW' nor 'Adafactor'")
        if args.scheduler not in SCHEDULERS:
            raise SettingsError(f"scheduler={args.scheduler!r} is none of: {', '.join(SCHEDULERS)}")
        scheduler = SCHEDULERS[args.scheduler]
        half_on_gpu = args.fp16 and self.device.startswith("cuda")
        return TrainSettings(
            epochs=args.num_train_epochs,
            batch_size=args.train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            optimizer=args.optimizer.lower(),
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            adam_betas=tuple(args.adam_betas),
            adam_epsilon=args.adam_epsilon,
            scheduler=scheduler,  # type: ignore[arg-type]
            scheduler_args=_scheduler_args(scheduler, args),
            warmup_ratio=args.warmup_ratio,
            warmup_steps=args.warmup_steps or None,
            max_grad_norm=args.max_grad_norm,
            loss_type=args.loss_type,
            loss_args=args.loss_args or None,
            window_weight=args.window_weight,
            train_dtype="auto" if half_on_gpu else "float32",
            seed=_seed(args),
            **self._loss_weights(),
        )

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

    def _predicted_ids(self, scores: DocumentScores) -> Any:
        decided = decide(scores.scores_DL, self._decision, scores.votes_DL)
        if decided.positive_DL is not None:
            return decided.positive_DL.astype(int).tolist()
        return decided.label_D if decided.value_D is None else decided.value_D.astype(np.float64)

    def _raw_outputs(self, scores: DocumentScores) -> Any:
        raw_WL = scores.window_logits_WL
        if self._is_multilabel:
            raw_WL = activate(raw_WL, "multilabel")
        raw_WL = raw_WL.astype(np.float64)
        if self.args.sliding_window:
            return np.split(raw_WL, scores.windows.offsets[1:-1])
        return raw_WL[:, 0] if self._decision.kind == "regression" else raw_WL

    def _eval_loss(self, scores: DocumentScores, targets: NDArray[np.generic]) -> float:
        """Mean loss over windows, weighted as in training."""
        loss = resolve_loss(self._train_settings(), self._decision, targets)
        targets_W = targets[scores.windows.document_W]
        losses_W = loss(torch.from_numpy(scores.window_logits_WL), torch.from_numpy(targets_W))
        return float(losses_W.sum() / loss.normalizers(targets_W).sum())


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


def _resolve_args(
    kind: type[ClassificationArgs], model_name: str, args: Mapping[str, Any] | ClassificationArgs | None
) -> ClassificationArgs:
    """Arguments saved beside the weights, then the caller's; an Args object replaces all, as there."""
    if isinstance(args, ClassificationArgs):
        return args
    resolved = kind()
    resolved.load(model_name)
    saved_elsewhere = (Path(model_name) / "model_args.json").is_file() and not (
        Path(model_name) / "pipeline.json"
    ).is_file()
    if saved_elsewhere:
        resolved.window_plan = "simpletransformers"
    resolved.update_from_dict(args or {})
    return resolved


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


def _seed(args: ClassificationArgs) -> int:
    return 42 if args.manual_seed is None else int(args.manual_seed)


def _threshold(value: Any) -> float | tuple[float, ...]:
    return tuple(float(number) for number in value) if isinstance(value, (list, tuple)) else float(value)


def _scheduler_args(scheduler: str, args: ClassificationArgs) -> dict[str, Any] | None:
    if scheduler == "cosine":
        return {"num_cycles": args.cosine_schedule_num_cycles}
    if scheduler == "cosine_with_restarts":  # transformers counts whole cycles
        return {"num_cycles": max(1, round(args.cosine_schedule_num_cycles))}
    if scheduler == "polynomial":
        return {"power": args.polynomial_decay_schedule_power, "lr_end": args.polynomial_decay_schedule_lr_end}
    return None


def _wrong(data: LabelledTexts, targets: NDArray[np.generic], predicted: Any) -> list[InputExample]:
    labels = data.labels or []
    wrong = np.asarray(targets) != np.asarray(predicted)
    rows = np.flatnonzero(wrong if wrong.ndim == 1 else wrong.any(axis=1))
    return [
        InputExample(int(row), data.texts[row], None if data.pairs is None else data.pairs[row], labels[row])
        for row in rows
    ]


def _progress_lists(history: dict[str, Any], epochs: int) -> dict[str, list[Any]]:
    """global_step, train_loss and every metric, one entry per evaluation."""
    per_epoch = len(history["losses"]) // epochs
    lists: dict[str, list[Any]] = {
        "global_step": [per_epoch * (epoch + 1) for epoch in range(epochs)],
        "train_loss": [history["losses"][per_epoch * (epoch + 1) - 1] for epoch in range(epochs)],
    }
    for metrics in history["epochs"]:
        for name, value in metrics.items():
            lists.setdefault(RESULT_NAMES.get(name, name), []).append(value)
    return lists


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
