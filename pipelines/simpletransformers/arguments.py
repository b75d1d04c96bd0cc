"""The arguments of Simple Transformers 0.70.8, and what this package does with each of them.

An argument is honoured (same effect as in Simple Transformers), inert (accepted without effect), refused (an error
unless it has its default value) or ours (an addition of this package). `ARGUMENTS` is the only list. The two Args
classes, the facades and the table in the docs are made from it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import ModelFolderError, SettingsError, UnknownArgumentError
from pipelines.fields import plain

MODEL_ARGS = "model_args.json"


@dataclass(frozen=True)
class Argument:
    """One argument: its default in Simple Transformers, its use in this package, and a note on how or why."""

    name: str
    default: Any
    use: Literal["honoured", "inert", "refused", "ours"]
    note: str


def _many(use: Literal["honoured", "inert", "refused", "ours"], note: str, **defaults: Any) -> list[Argument]:
    return [Argument(name, default, use, note) for name, default in defaults.items()]


SCHEDULERS = {
    "constant_schedule": "constant",
    "constant_schedule_with_warmup": "constant_with_warmup",
    "linear_schedule_with_warmup": "linear",
    "cosine_schedule_with_warmup": "cosine",
    "cosine_with_hard_restarts_schedule_with_warmup": "cosine_with_restarts",
    "polynomial_decay_schedule_with_warmup": "polynomial",
}
"""Names of the schedules in Simple Transformers, and in transformers."""

ARGUMENTS: tuple[Argument, ...] = (
    *_many("honoured", "window length", max_seq_length=128),
    *_many("honoured", "cuts long texts into windows, also pairs and texts with several labels", sliding_window=False),
    *_many("honoured", "a float is a fraction of max_seq_length, an int a number of tokens", stride=0.8),
    *_many("honoured", "label id that wins if the vote of the windows is tied", tie_value=1),
    *_many("honoured", "one number, or one per label; 0 means a threshold of 0", threshold=0.5),
    *_many("honoured", "needs num_labels=1", regression=False),
    *_many("honoured", "label names; their number is num_labels", labels_list=[]),
    *_many("honoured", "label names to ids; sets the order of labels_list", labels_map={}),
    *_many("honoured", "epochs", num_train_epochs=1),
    *_many("honoured", "windows per forward and backward pass", train_batch_size=8),
    *_many("honoured", "an optimizer step uses this many batches of train_batch_size", gradient_accumulation_steps=1),
    *_many("honoured", "peak learning rate", learning_rate=4e-5),
    *_many("honoured", "not applied to biases and normalisation weights", weight_decay=0.0),
    *_many("honoured", "argument of AdamW", adam_epsilon=1e-8, adam_betas=(0.9, 0.999)),
    *_many("honoured", "maximum gradient norm, also for Adafactor", max_grad_norm=1.0),
    *_many("honoured", "AdamW, or Adafactor at learning_rate without relative steps", optimizer="AdamW"),
    *_many("honoured", "all six schedules of Simple Transformers", scheduler="linear_schedule_with_warmup"),
    *_many("honoured", "argument of the cosine schedules", cosine_schedule_num_cycles=0.5),
    *_many(
        "honoured",
        "argument of the polynomial schedule",
        polynomial_decay_schedule_power=1.0,
        polynomial_decay_schedule_lr_end=1e-7,
    ),
    *_many("honoured", "share of the optimizer steps", warmup_ratio=0.06),
    *_many("honoured", "0 uses warmup_ratio; training does not change this argument", warmup_steps=0),
    *_many("honoured", "loss_type is focal, dice or tversky", loss_type=None, loss_args={}),
    *_many("honoured", "0 is a seed, too; None means 42", manual_seed=None),
    *_many("honoured", "16-bit arithmetic, only on CUDA (as in Simple Transformers)", fp16=True),
    *_many("honoured", "saves the best weights of all evaluations, not the last ones", evaluate_during_training=False),
    *_many("honoured", "0 and -1 mean never", evaluate_during_training_steps=2000, save_steps=2000),
    *_many("honoured", "evaluates at the end of each epoch", evaluate_each_epoch=True),
    *_many(
        "honoured",
        "chooses the best weights, and with use_early_stopping also stops training",
        early_stopping_metric="eval_loss",
        early_stopping_metric_minimize=True,
        early_stopping_delta=0,
    ),
    *_many(
        "honoured",
        "the first evaluation does not use up patience; the best weights are saved",
        use_early_stopping=False,
        early_stopping_consider_epochs=False,
        early_stopping_patience=3,
    ),
    *_many("honoured", "writes folders checkpoint-STEP-epoch-N", save_model_every_epoch=True),
    *_many("honoured", "writes a checkpoint at each evaluation between the ends of epochs", save_eval_checkpoints=True),
    *_many("honoured", "if false, training cannot resume from a checkpoint", save_optimizer_and_scheduler=True),
    *_many("honoured", "by default the folder best_model in output_dir", best_model_dir="outputs/best_model"),
    *_many("honoured", "Simple Transformers ignores it and always saves", save_best_model=True),
    *_many("honoured", "names of arguments that model_args.json omits", not_saved_args=[]),
    *_many(
        "honoured",
        "a group without weight_decay uses the argument weight_decay",
        custom_layer_parameters=[],
        custom_parameter_groups=[],
        train_custom_parameters_only=False,
    ),
    *_many(
        "honoured",
        "argument of Adafactor",
        adafactor_beta1=None,
        adafactor_clip_threshold=1.0,
        adafactor_decay_rate=-0.8,
        adafactor_eps=(1e-30, 1e-3),
        adafactor_scale_parameter=True,
    ),
    *_many("honoured", "added to the tokenizer and never split", special_tokens_list=[]),
    *_many("honoured", "if it is not set, the tokenizer's own setting is used", do_lower_case=False),
    *_many("honoured", "None writes nothing", tensorboard_dir=None),
    *_many("honoured", "tracks the run if wandb is installed; else warns", wandb_project=None, wandb_kwargs={}),
    *_many("honoured", "folder where train_model saves", output_dir="outputs/"),
    *_many("honoured", "if false, an output_dir that is not empty is an error", overwrite_output_dir=False),
    *_many("honoured", "if true, train_model writes nothing", no_save=False),
    *_many("honoured", "extra settings of the Hugging Face config", config={}),
    *_many("honoured", "number of torch threads", thread_count=None),
    *_many("honoured", "prints no progress lines", silent=False),
    *_many("honoured", "set by the model", model_name=None, model_type=None, tokenizer_name=None, tokenizer_type=None),
    *_many("honoured", "only saved in model_args.json", model_class=""),
    *_many("inert", "batch_tokens sets the size of a forward pass", eval_batch_size=100),
    *_many(
        "inert",
        "the Rust tokenizer uses several threads itself",
        use_multiprocessing=True,
        use_multiprocessing_for_evaluation=True,
        process_count=1,
        multiprocessing_chunksize=-1,
        dataloader_num_workers=0,
    ),
    *_many(
        "inert",
        "there is no cache, so no outdated data is read",
        cache_dir="cache_dir/",
        no_cache=False,
        reprocess_input_data=True,
        use_cached_eval_features=False,
        dataset_cache_dir=None,
    ),
    *_many(
        "inert",
        "Simple Transformers does not read it either",
        encoding=None,
        local_rank=-1,
        skip_special_tokens=True,
    ),
    *_many("honoured", "steps between two entries of loss and learning rate in TensorBoard", logging_steps=50),
    *_many(
        "inert",
        "each evaluation prints one line",
        evaluate_during_training_silent=True,
        evaluate_during_training_verbose=False,
    ),
    *_many(
        "inert",
        "Adafactor uses learning_rate, and transformers does not allow these two with it",
        adafactor_relative_step=True,
        adafactor_warmup_init=True,
    ),
    *_many("inert", "columns are read by name or position", use_hf_datasets=False),
    *_many("inert", "only for ranking, which this package does not have", pairwise_reranking_format="repeat_query"),
    *_many("refused", "use num_workers for several GPUs", n_gpu=1),
    *_many("refused", "weights are read from safetensors as they are", dynamic_quantize=False, quantized_model=False),
    *_many("refused", "remote code never runs", trust_remote_code=False),
    *_many("refused", "this package has no ranking", as_reranker=False, tourney_mode=False),
    *_many("refused", "windows are sampled one by one", batch_chunk_size=None),
    *_many("refused", "this package has no ONNX support", onnx=False),
    *_many(
        "refused",
        "all data is read into memory; for larger data, use `pipelines train`",
        lazy_loading=False,
        lazy_delimiter="\t",
        lazy_labels_column=1,
        lazy_loading_start_line=1,
        lazy_text_a_column=None,
        lazy_text_b_column=None,
        lazy_text_column=0,
    ),
    *_many("ours", "Ray Train workers, each with one GPU if there are GPUs; 0 trains in this process", num_workers=0),
    *_many("ours", "auto, float32, bfloat16 or float16", dtype="float32"),
    *_many("ours", "columns with 0 or 1 for each label; they also name the labels", label_columns=[]),
    *_many("ours", "vote, mean or max of the windows of a text; None: vote for one label, else mean", merge=None),
    *_many(
        "ours", "exact, or simpletransformers with its tails; None: the folder's plan, else exact", window_plan=None
    ),
    *_many("ours", "window: each window counts 1; document: each counts 1 / number of windows", window_weight="window"),
    *_many("ours", "maximum number of tokens in one forward pass", batch_tokens=16384),
    *_many("ours", "maximum number of windows of a text when scoring", max_windows=None),
    *_many("ours", "maximum number of windows of a text when training", train_max_windows=None),
    *_many("ours", "allow a step below 1/16 of a window", dense_windows=False),
)
BY_NAME = {argument.name: argument for argument in ARGUMENTS}
CLASS_PARAMETERS = ("weight", "pos_weight", "num_labels", "use_cuda", "cuda_device")
"""Parameters of the model classes, which are easily mistaken for arguments."""


class ClassificationArgs:
    """Arguments as attributes. An unknown name raises an error that suggests the nearest one."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["is_case_set"] = False
        for argument in ARGUMENTS:
            default = argument.default
            self.__dict__[argument.name] = default.copy() if isinstance(default, (list, dict)) else default
        self.update_from_dict(values)

    def __setattr__(self, name: str, value: Any) -> None:
        value = plain(value)
        check_argument(name, value)
        self.__dict__[name] = value
        if name == "do_lower_case":  # its default cannot be told from a caller who sets the same value
            self.__dict__["is_case_set"] = True

    def __getattr__(self, name: str) -> Any:
        check_argument(name, None)
        raise AttributeError(name)

    def update_from_dict(self, new_values: Mapping[str, Any]) -> None:
        """Set several arguments.

        Raises:
            SettingsError: new_values is not a mapping, or an argument is unknown or refused.
        """
        if not isinstance(new_values, Mapping):
            raise SettingsError(f"args must be a dict or an Args object, not {type(new_values).__name__}")
        for name, value in new_values.items():
            setattr(self, name, value)

    def get_args_for_saving(self) -> dict[str, Any]:
        """Return the arguments by name, without those in not_saved_args."""
        names = [argument.name for argument in ARGUMENTS if argument.name not in self.not_saved_args]
        return {name: getattr(self, name) for name in names}

    def save(self, output_dir: str) -> None:
        """Write model_args.json into output_dir."""
        path = Path(output_dir)
        path.mkdir(parents=True, exist_ok=True)
        partial = path / f".{MODEL_ARGS}.partial"
        partial.write_text(json.dumps(self.get_args_for_saving(), default=str))
        partial.replace(path / MODEL_ARGS)

    def load(self, input_dir: str | None) -> None:
        """Read model_args.json from input_dir, if there is one.

        Inert and refused arguments are skipped, because Simple Transformers writes all arguments, also those that have
        their default value.

        Raises:
            ModelFolderError: The file is not valid JSON.
        """
        for name, value in (read_model_args(Path(input_dir)) if input_dir else {}).items():
            if name in BY_NAME and BY_NAME[name].use in ("honoured", "ours"):
                self.__dict__[name] = value

    def changed(self, use: str) -> list[str]:
        """Return the names of the arguments of a use (such as "inert") that do not have their default value."""
        return [a.name for a in ARGUMENTS if a.use == use and not _is_default(a, getattr(self, a.name))]

    def everything(self) -> dict[str, Any]:
        """Return every argument by name."""
        return {argument.name: getattr(self, argument.name) for argument in ARGUMENTS}


class MultiLabelClassificationArgs(ClassificationArgs):
    """The same arguments, for texts with several labels."""


def read_model_args(folder: Path) -> dict[str, Any]:
    """Return the arguments saved in a folder. Empty if it has none. Raises ModelFolderError if they are not JSON."""
    file = folder / MODEL_ARGS
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ModelFolderError(f"{file} is not valid JSON: {error}; it may be truncated") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{file} is not a mapping of arguments to values; save the arguments again")
    return content


def check_argument(name: str, value: Any) -> None:
    """Check the name and the value of an argument.

    Raises:
        UnknownArgumentError: The argument does not exist.
        SettingsError: The argument is refused, and the value is neither None nor its default; or its type is wrong.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    if name in CLASS_PARAMETERS:
        raise UnknownArgumentError(f"{name} is a parameter of the model class, not one of args: pass {name}=... to it")
    if name not in BY_NAME:
        nearest = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "docs/reference/simpletransformers.md lists them all"
        raise UnknownArgumentError(f"unknown argument {name!r}; {hint}")
    argument = BY_NAME[name]
    if argument.use == "refused" and value is not None and not _is_default(argument, value):
        raise SettingsError(f"argument {name}={value!r} is refused: {argument.note}")
    kind = _kind_of(argument.default)
    if argument.use in ("honoured", "ours") and value is not None and kind and not _is_kind(value, kind):
        raise SettingsError(f"argument {name}={value!r} must be {kind}")


def _kind_of(default: Any) -> str:
    """Say of which type an argument is, by its default. Empty if any type may be right."""
    kinds = {bool: "True or False", list: "a list", dict: "a mapping"}
    return kinds.get(type(default), "")


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "True or False":  # a text, such as "False", would count as true
        return value in (0, 1) and not isinstance(value, str)
    return isinstance(value, (list, tuple) if kind == "a list" else Mapping)


def markdown_table() -> str:
    """Return the table of arguments in docs/reference/simpletransformers.md."""
    lines = ["| argument | default | here | how or why |", "|---|---|---|---|"]
    for argument in sorted(ARGUMENTS, key=lambda item: (item.use == "ours", item.name)):
        default = json.dumps(argument.default).replace("|", "\\|")
        lines.append(f"| `{argument.name}` | `{default}` | {argument.use} | {argument.note} |")
    return "\n".join(lines)


def _is_default(argument: Argument, value: Any) -> bool:
    default = argument.default
    if isinstance(default, tuple):
        return list(default) == list(value) if isinstance(value, (list, tuple)) else False
    return bool(value == default)
