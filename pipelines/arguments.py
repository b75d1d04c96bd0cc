"""The arguments of Simple Transformers 0.70.8: which are honoured, which do nothing here and why, which are refused.

`ARGUMENTS` is the one list; the two Args classes, the facades and the table in the docs are made from it. An argument
that is refused may keep its default. Knows no torch, no ray.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import SettingsError, UnknownArgumentError


@dataclass(frozen=True)
class Argument:
    """One argument: its default there, what becomes of it here, and in a note how or why."""

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
"""Their names for schedules, and transformers'."""

ARGUMENTS: tuple[Argument, ...] = (
    *_many("honoured", "window length", max_seq_length=128),
    *_many("honoured", "windows, also for pairs and several labels", sliding_window=False),
    *_many("honoured", "a float is a fraction of max_seq_length, an int a number of tokens", stride=0.8),
    *_many("honoured", "wins a tied vote of windows; must be a label id", tie_value=1),
    *_many("honoured", "one number or one per label; 0 means 0 everywhere", threshold=0.5),
    *_many("honoured", "with num_labels=1", regression=False),
    *_many("honoured", "label names; num_labels follows from it", labels_list=[]),
    *_many("honoured", "names to ids; sets the order of labels_list", labels_map={}),
    *_many("honoured", "epochs", num_train_epochs=1),
    *_many("honoured", "windows per forward and backward pass", train_batch_size=8),
    *_many("honoured", "steps see this many times train_batch_size", gradient_accumulation_steps=1),
    *_many("honoured", "peak learning rate", learning_rate=4e-5),
    *_many("honoured", "biases and normalisation weights are spared", weight_decay=0.0),
    *_many("honoured", "of AdamW", adam_epsilon=1e-8, adam_betas=(0.9, 0.999)),
    *_many("honoured", "gradient clipping, also with Adafactor", max_grad_norm=1.0),
    *_many("honoured", "AdamW or Adafactor (at learning_rate, without relative steps)", optimizer="AdamW"),
    *_many("honoured", "all six schedules", scheduler="linear_schedule_with_warmup"),
    *_many("honoured", "of the cosine schedules", cosine_schedule_num_cycles=0.5),
    *_many(
        "honoured",
        "of the polynomial schedule",
        polynomial_decay_schedule_power=1.0,
        polynomial_decay_schedule_lr_end=1e-7,
    ),
    *_many("honoured", "share of the steps", warmup_ratio=0.06),
    *_many("honoured", "0 takes warmup_ratio; never written back", warmup_steps=0),
    *_many("honoured", "focal, dice, tversky", loss_type=None, loss_args={}),
    *_many("honoured", "0 counts too; None takes 42", manual_seed=None),
    *_many("honoured", "16-bit arithmetic, on CUDA only as there", fp16=True),
    *_many("honoured", "the best weights of all evaluations are kept and saved", evaluate_during_training=False),
    *_many("honoured", "0 and -1 say never", evaluate_during_training_steps=2000, save_steps=2000),
    *_many("honoured", "an evaluation at the end of each epoch", evaluate_each_epoch=True),
    *_many(
        "honoured",
        "chooses the best weights, and ends the run where use_early_stopping",
        early_stopping_metric="eval_loss",
        early_stopping_metric_minimize=True,
        early_stopping_delta=0,
    ),
    *_many(
        "honoured",
        "the first evaluation does not use up patience, and the best weights are what is left",
        use_early_stopping=False,
        early_stopping_consider_epochs=False,
        early_stopping_patience=3,
    ),
    *_many("honoured", "checkpoint-STEP-epoch-N folders", save_model_every_epoch=True),
    *_many("honoured", "a checkpoint at each evaluation every so many steps", save_eval_checkpoints=True),
    *_many("honoured", "without it no run goes on from a checkpoint", save_optimizer_and_scheduler=True),
    *_many("honoured", "by default best_model in the output_dir", best_model_dir="outputs/best_model"),
    *_many("honoured", "there it is always saved", save_best_model=True),
    *_many("honoured", "left out of model_args.json", not_saved_args=[]),
    *_many(
        "honoured",
        "a group without weight_decay takes the argument's",
        custom_layer_parameters=[],
        custom_parameter_groups=[],
        train_custom_parameters_only=False,
    ),
    *_many(
        "honoured",
        "of Adafactor",
        adafactor_beta1=None,
        adafactor_clip_threshold=1.0,
        adafactor_decay_rate=-0.8,
        adafactor_eps=(1e-30, 1e-3),
        adafactor_scale_parameter=True,
    ),
    *_many("honoured", "added to the tokenizer, and never split", special_tokens_list=[]),
    *_many("honoured", "nothing is written where it is None", tensorboard_dir=None),
    *_many("honoured", "where train_model saves", output_dir="outputs/"),
    *_many("honoured", "without it a used output_dir is refused", overwrite_output_dir=False),
    *_many("honoured", "train_model writes nothing", no_save=False),
    *_many("honoured", "extra settings of the Hugging Face config", config={}),
    *_many("honoured", "torch threads", thread_count=None),
    *_many("honoured", "no progress lines", silent=False),
    *_many("honoured", "set by the model", model_name=None, model_type=None, tokenizer_name=None, tokenizer_type=None),
    *_many("honoured", "only saved", model_class=""),
    *_many("inert", "passes are sized by batch_tokens", eval_batch_size=100),
    *_many(
        "inert",
        "the Rust tokenizer is parallel by itself",
        use_multiprocessing=True,
        use_multiprocessing_for_evaluation=True,
        process_count=1,
        multiprocessing_chunksize=-1,
        dataloader_num_workers=0,
    ),
    *_many(
        "inert",
        "nothing is cached, so nothing stale is read",
        cache_dir="cache_dir/",
        no_cache=False,
        reprocess_input_data=True,
        use_cached_eval_features=False,
        dataset_cache_dir=None,
    ),
    *_many(
        "inert",
        "the tokenizer's own setting holds",
        do_lower_case=False,
    ),
    *_many(
        "inert",
        "nothing there reads it",
        encoding=None,
        local_rank=-1,
        skip_special_tokens=True,
    ),
    *_many("honoured", "TensorBoard gets loss and learning rate every so many steps", logging_steps=50),
    *_many(
        "inert",
        "evaluations report one line each",
        evaluate_during_training_silent=True,
        evaluate_during_training_verbose=False,
    ),
    *_many(
        "inert",
        "Adafactor runs at learning_rate, beside which transformers refuses both",
        adafactor_relative_step=True,
        adafactor_warmup_init=True,
    ),
    *_many("inert", "columns are read by name and position as they are", use_hf_datasets=False),
    *_many("inert", "of ranking, which is not here", pairwise_reranking_format="repeat_query"),
    *_many("refused", "use num_workers for several GPUs", n_gpu=1),
    *_many("refused", "weights are read from safetensors as they are", dynamic_quantize=False, quantized_model=False),
    *_many("refused", "remote code never runs", trust_remote_code=False),
    *_many("refused", "log the returned numbers instead", wandb_kwargs={}, wandb_project=None),
    *_many("refused", "ranking is not here", as_reranker=False, tourney_mode=False),
    *_many("refused", "windows are drawn one by one", batch_chunk_size=None),
    *_many("refused", "there is no ONNX here", onnx=False),
    *_many(
        "refused",
        "data is read whole; for data that does not fit, use `pipelines train`",
        lazy_loading=False,
        lazy_delimiter="\t",
        lazy_labels_column=1,
        lazy_loading_start_line=1,
        lazy_text_a_column=None,
        lazy_text_b_column=None,
        lazy_text_column=0,
    ),
    *_many("ours", "Ray Train workers, each with a GPU where there are any; 0 trains in this process", num_workers=0),
    *_many("ours", "auto, float32, bfloat16 or float16", dtype="float32"),
    *_many("ours", "vote, mean or max of a text's windows", merge=None),
    *_many(
        "ours", "exact, or simpletransformers with its tails; None takes the folder's, else exact", window_plan=None
    ),
    *_many("ours", "window, or document: 1 / number of windows", window_weight="window"),
    *_many("ours", "tokens in one forward pass", batch_tokens=16384),
    *_many("ours", "cap on a text's windows when scoring", max_windows=None),
    *_many("ours", "cap on a text's windows when training", train_max_windows=None),
    *_many("ours", "allow a step below 1/16 of a window", dense_windows=False),
)
BY_NAME = {argument.name: argument for argument in ARGUMENTS}


class ClassificationArgs:
    """Arguments by name, as attributes; a name that does not exist is an error that names the nearest."""

    def __init__(self, **values: Any) -> None:
        for argument in ARGUMENTS:
            default = argument.default
            self.__dict__[argument.name] = default.copy() if isinstance(default, (list, dict)) else default
        self.update_from_dict(values)

    def __setattr__(self, name: str, value: Any) -> None:
        check_argument(name, value)
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        check_argument(name, None)
        raise AttributeError(name)

    def update_from_dict(self, new_values: Mapping[str, Any]) -> None:
        """Set several. Raises SettingsError for one that is unknown or refused."""
        if not isinstance(new_values, Mapping):
            raise SettingsError(f"args must be a dict or an Args object, not {type(new_values).__name__}")
        for name, value in new_values.items():
            setattr(self, name, value)

    def get_args_for_saving(self) -> dict[str, Any]:
        """Arguments by name, as JSON keeps them, without those that not_saved_args names."""
        names = [argument.name for argument in ARGUMENTS if argument.name not in self.not_saved_args]
        return {name: getattr(self, name) for name in names}

    def save(self, output_dir: str) -> None:
        """Write model_args.json."""
        path = Path(output_dir)
        path.mkdir(parents=True, exist_ok=True)
        partial = path / ".model_args.json.partial"
        partial.write_text(json.dumps(self.get_args_for_saving(), default=str))
        partial.replace(path / "model_args.json")

    def load(self, input_dir: str | None) -> None:
        """Take what model_args.json says, where there is one.

        What Simple Transformers itself wrote there and cannot be had here is passed over, since it was its default.
        """
        path = Path(input_dir or "") / "model_args.json"
        if input_dir and path.is_file():
            for name, value in json.loads(path.read_text()).items():
                if name in BY_NAME and BY_NAME[name].use in ("honoured", "ours"):
                    self.__dict__[name] = value

    def changed(self, use: str) -> list[str]:
        """Names of arguments of a use whose value is not their default."""
        return [a.name for a in ARGUMENTS if a.use == use and not _is_default(a, getattr(self, a.name))]

    def everything(self) -> dict[str, Any]:
        """Every argument by name."""
        return {argument.name: getattr(self, argument.name) for argument in ARGUMENTS}


class MultiLabelClassificationArgs(ClassificationArgs):
    """The same arguments, for several labels a text."""


def check_argument(name: str, value: Any) -> None:
    """Raise SettingsError for an argument that does not exist, or is refused and not at its default."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in BY_NAME:
        nearest = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "docs/simpletransformers.md lists them all"
        raise UnknownArgumentError(f"unknown argument {name!r}; {hint}")
    argument = BY_NAME[name]
    if argument.use == "refused" and value is not None and not _is_default(argument, value):
        raise SettingsError(f"argument {name}={value!r} is refused: {argument.note}")


def markdown_table() -> str:
    """The table of docs/simpletransformers.md."""
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
