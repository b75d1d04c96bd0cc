"""The arguments of the `pipelines` command: which flags a command has, their help, and the settings they give.

Every setting can be given with `--set name=value` and in a YAML file. Those that people change first have a flag. Their
help is the string below the setting's field. `--help` shows the flags in groups, and `--help-all` all settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_args

from pipelines.config_file import parse_yaml, read_config
from pipelines.errors import SettingsError
from pipelines.fields import field_help
from pipelines.serving.settings import ServePaths, ServeSettings
from pipelines.settings import (
    CalibrationMethod,
    ComputeSettings,
    DataSettings,
    DecisionSettings,
    Kind,
    ScorePaths,
    ScoreSettings,
    WindowSettings,
)
from pipelines.training_settings import TrainPaths, TrainSettings
from pipelines.version import VERSION

TRAIN_GROUPS = (TrainPaths, DecisionSettings, DataSettings, WindowSettings, TrainSettings, ComputeSettings)
SCORE_GROUPS = (ScorePaths, DataSettings, ScoreSettings, ComputeSettings)
SERVE_GROUPS = (ServePaths, ServeSettings, ComputeSettings)
EVALUATE_GROUPS = (DataSettings, ComputeSettings)
LISTS = {"keep", "labels", "label_columns"}
"""Flags whose value is a list, separated by commas."""
COLUMNS = ("text_column", "text_pair_column", "label_column", "label_columns", "limit")
COMPUTE = ("engine", "dtype", "device", "batch_tokens", "num_threads")
USUAL_TRAINING = ("epochs", "batch_size", "learning_rate", "train_max_windows", "weight", "pos_weight", "metric",
                  "objective", "calibrate", "early_stopping_patience", "lora_rank", "seed")  # fmt: skip
USUAL_WINDOWS = ("max_length", "stride", "max_windows")
USUAL_DECISION = ("merge",)


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest command, flag or setting for one that it does not know."""

    settings: Sequence[type[Any]] = ()
    """Settings that `--set` takes."""

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with the arguments that are not known, and what is nearest to the first flag among them."""
        flag = next((argument for argument in unknown if argument.startswith("-")), "")
        hint = self._nearest(flag.partition("=")[0]) if flag else ""
        self.error(f"{' '.join(unknown)} is not known here{hint}")

    def error(self, message: str) -> NoReturn:
        """Exit with a message."""
        wrong = re.search(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            names = re.findall(r"[\w-]+", wrong[2])
            nearest = difflib.get_close_matches(wrong[1], names, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else "."
            message = f"there is no command {wrong[1]!r}{hint} The commands are: {', '.join(names)}"
        sys.stderr.write(f"{self.prog}: {message}\n  {self.prog} --help lists what there is\n")
        raise SystemExit(2)

    def _nearest(self, flag: str) -> str:
        name = flag.lstrip("-").replace("-", "_")
        owned = {field.name for group in self.settings for field in dataclasses.fields(group)}
        if name in owned:
            return f"; it is a setting without a flag: --set {name}=VALUE"
        flags = {option.lstrip("-").replace("-", "_"): option for option in self._option_string_actions}
        nearest = difflib.get_close_matches(name, [*flags, *owned], n=1, cutoff=0.5)
        if not nearest:
            return ""
        return f"; did you mean {flags.get(nearest[0], f'--set {nearest[0]}=VALUE')}?"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. Exits with code 2 if it is wrong."""
    parser, commands = parsers()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[options.command].refuse(unknown)
    return options


def settings_of(options: argparse.Namespace) -> dict[str, object]:
    """Return the settings from --config, --set and flags. A later source replaces an earlier one."""
    values: dict[str, object] = {}
    if options.config:
        values.update(read_config(options.config))
    for assignment in options.set or []:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment!r} has no '='; write --set name=value")
        values[name.strip()] = parse_yaml(text, f"--set {name}")
    for name in options.flags:
        value = getattr(options, name, None)
        if value is not None:
            values[name] = value.split(",") if name in LISTS else value
    return values


def commented_settings(kind: str) -> Iterator[str]:
    """Yield the lines of a YAML file for `pipelines train`: required settings, and all others as comments."""
    yield f"# Settings of `pipelines train --config THIS_FILE`, for kind {kind}. Lines without # are set."
    required = {
        "train": "train/",
        "valid": "valid/",
        "model": "bert-base-uncased",
        "output": "runs/model",
        "kind": kind,
    }
    for group in TRAIN_GROUPS:
        yield f"\n# {(group.__doc__ or '').strip().splitlines()[0]}"
        for field in dataclasses.fields(group):
            yield f"# {field_help(group)[field.name]}"
            if field.name in required:
                yield f"{field.name}: {required[field.name]}"
            else:
                yield f"#{field.name}: {_shown_default(field.default)}"


def parsers() -> tuple[Parser, Any]:
    """Return the parser of the command, and its commands by name (`choices`)."""
    parser = Parser(
        prog="pipelines",
        description="Train, score and serve text classifiers for long texts and large data, on Ray.",
        epilog="pipelines COMMAND --help lists what a command takes.",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_train(commands)
    _add_score(commands)
    _add_serve(commands)
    _add_evaluate(commands)
    _add_tune(commands)
    _add_quantize(commands)
    _add_folders(commands)
    return parser, commands


def _add_train(commands: Any) -> None:
    example = "pipelines train --train train/ --valid valid/ --model bert-base-uncased --kind binary --output runs/spam"
    about = "fine-tune a classifier on labelled Parquet, JSON Lines or CSV"
    command = _command(commands, "train", about=about, groups=TRAIN_GROUPS, example=example)
    required = command.add_argument_group("required, here or in --config")
    _flags(command, TrainPaths, ("train", "model", "output"), required)
    usual = command.add_argument_group("often given")
    _flags(command, TrainPaths, ("valid",), usual)
    _flags(command, DecisionSettings, ("kind", "labels", *USUAL_DECISION), usual)
    _flags(command, DataSettings, COLUMNS, command.add_argument_group("columns and rows"))
    _flags(command, TrainSettings, USUAL_TRAINING, command.add_argument_group("training"))
    _flags(command, WindowSettings, USUAL_WINDOWS, command.add_argument_group("windows"))
    _flags(command, TrainPaths, ("overwrite",), usual)
    where = command.add_argument_group("where it runs")
    _flags(command, TrainPaths, ("num_workers",), where)
    where.add_argument("--local", dest="num_workers", action="store_const", const=0, help="as --num-workers 0")
    _flags(command, ComputeSettings, ("dtype", "device", "num_threads"), where)


def _add_score(commands: Any) -> None:
    example = "pipelines score runs/spam --input s3://mail/2026/ --output s3://mail/scored/"
    command = _command(commands, "score", about="score files into Parquet files", groups=SCORE_GROUPS, example=example)
    required = command.add_argument_group("required, here or in --config")
    required.add_argument("model", metavar="DIR", nargs="?", help=field_help(ScorePaths)["model"])
    _flags(command, ScorePaths, ("input", "output"), required)
    _flags(
        command,
        DataSettings,
        ("text_column", "text_pair_column", "limit"),
        command.add_argument_group("columns and rows"),
    )
    names = [field.name for field in dataclasses.fields(ScoreSettings)]
    first = ("keep", "prefix", "filter", "max_errors", "table", "early_exit")
    _flags(command, ScoreSettings, first, command.add_argument_group("what is written"))
    rerun = ("overwrite", "append", "replace_changed", "retry_errors")
    _flags(command, ScoreSettings, rerun, command.add_argument_group("an output folder that has a run already"))
    where = command.add_argument_group("where it runs")
    rest = [name for name in names if name not in (*first, *rerun, "thresholds", "unit_bytes")]
    _flags(command, ScoreSettings, rest, where)
    where.add_argument("--local", dest="replicas", action="store_const", const=0, help="as --replicas 0")
    _flags(command, ComputeSettings, COMPUTE, where)
    plan = command.add_argument_group("before a large job")
    plan.add_argument("--dry-run", action="store_true", help="estimate the job's size and time, and write nothing")
    plan.add_argument("--rate", type=float, metavar="X", help="with --dry-run: tokens per second of one replica")
    command.set_defaults(flags=[*command.get_default("flags"), "model"])


def _add_serve(commands: Any) -> None:
    example = "pipelines serve runs/spam --local"
    command = _command(commands, "serve", about="answer HTTP requests", groups=SERVE_GROUPS, example=example)
    required = command.add_argument_group("required, here or in --config")
    required.add_argument("model", metavar="DIR", nargs="?", help=field_help(ServePaths)["model"])
    usual = command.add_argument_group("often given")
    _flags(command, ServeSettings, ("name", "host", "port", "local", "num_replicas", "proxy", "early_exit"), usual)
    _flags(command, ComputeSettings, COMPUTE, command.add_argument_group("where it runs"))
    command.set_defaults(flags=[*command.get_default("flags"), "model"])


def _labelled(
    commands: Any, name: str, *, about: str, folders: str = "runs/spam", needs: str = "required"
) -> tuple[Parser, Any]:
    """Add a command that reads labelled data. Returns it with its first group of arguments, which `needs` names."""
    example = f"pipelines {name} {folders} --data valid/"
    command = _command(commands, name, about=about, groups=EVALUATE_GROUPS, example=example)
    required = command.add_argument_group(needs)
    is_required = needs == "required"
    required.add_argument("model", metavar="DIR", nargs=None if is_required else "?", help="model folder")
    required.add_argument("--data", required=is_required, metavar="FILES", help="file, folder or glob with labels")
    _flags(command, DataSettings, COLUMNS, command.add_argument_group("columns and rows"))
    _flags(command, ComputeSettings, COMPUTE, command.add_argument_group("where it runs"))
    return command, required


def _add_evaluate(commands: Any) -> None:
    about = "metrics of a model folder on labelled data, or of a scored folder with a label column"
    command, what = _labelled(commands, "evaluate", about=about, needs="required: DIR and --data, or --scored")
    about = "instead of DIR and --data: output folder of `pipelines score`. No model is needed"
    what.add_argument("--scored", metavar="FOLDER", help=about)
    command.add_argument("--report", metavar="OUT.html", help="write a page with curves and threshold tables")
    about = "show the first words of documents on the page"
    command.add_argument("--report-texts", action="store_true", help=about)


def _add_tune(commands: Any) -> None:
    about = "tune thresholds on labelled Parquet and write them into the model folder"
    command, _ = _labelled(commands, "tune", about=about)
    command.add_argument("--objective", default="f1", help="f1 (default), fbeta=B, precision=P or recall=R")
    command.add_argument(
        "--confidence",
        type=float,
        metavar="C",
        help="promise the precision or recall on new documents, with this confidence (0.95). A label for which "
        "the data shows no such threshold is never assigned (precision) or always (recall), and is named",
    )
    command.add_argument("--joint", action="store_true", help="the confidence is that of all labels together")
    command.add_argument(
        "--calibrate",
        choices=get_args(CalibrationMethod),
        help="calibrate the scores before: by a temperature, also by a scale and a bias per label, or not at "
        "all (default: as the folder does)",
    )
    command.add_argument(
        "--early-exit",
        type=float,
        metavar="SHARE",
        help="instead of thresholds, fit when to stop reading a text, such that this share of documents (0.99) "
        "gets the label of a full read, with --confidence (0.95); score --early-exit certified uses it",
    )


def _add_quantize(commands: Any) -> None:
    about = "write an int8 model folder for CPUs, if few labels change on labelled Parquet"
    command, required = _labelled(commands, "quantize", about=about, folders="runs/spam runs/spam-int8")
    required.add_argument("new", metavar="NEW", help="new folder")
    about = (
        "largest share of documents whose labels may change (default 0.002); layers that change too much stay in float"
    )
    command.add_argument("--max-label-changes", type=float, default=0.002, metavar="SHARE", help=about)
    about = "largest drop of the metric (default 0.002; mae and rmse: growth, as a share of the targets' deviation)"
    command.add_argument("--max-drop", type=float, default=0.002, metavar="X", help=about)
    command.add_argument("--metric", help="default: auprc (binary), mcc (multiclass), auprc_macro (multilabel), rmse")


def _add_folders(commands: Any) -> None:
    """Add the commands that read finished folders, and those that write a new one: init and convert."""
    example = "pipelines init multilabel > train.yaml && pipelines train --config train.yaml"
    command = _command(
        commands, "init", about="print a YAML file with all settings of train", groups=(), example=example
    )
    command.add_argument("kind", metavar="KIND", choices=get_args(Kind), help=", ".join(get_args(Kind)))
    example = "pipelines inspect runs/spam"
    command = _command(commands, "inspect", about="show the settings of a model folder", groups=(), example=example)
    command.add_argument("model", metavar="DIR", help="model folder")
    example = "pipelines relabel scored/ --thresholds '{spam: 0.9}' --output relabelled/"
    about = "decide new labels from the scores of scored Parquet"
    command = _command(commands, "relabel", about=about, groups=(), example=example)
    command.add_argument("scored", metavar="SCORED", help="output folder of `pipelines score`")
    which = command.add_mutually_exclusive_group(required=True)
    about = "0.4, [0.3, 0.5] or '{label: 0.9}'; labels that are not named keep their thresholds"
    which.add_argument("--thresholds", metavar="YAML", help=about)
    about = (
        "the model folder that scored the rows: its thresholds of now, with what `tune --confidence` promises of them"
    )
    which.add_argument("--model", metavar="DIR", help=about)
    command.add_argument("--output", required=True, help="new folder")
    example = "pipelines drift runs/spam scored/2026-11/ --plot drift.png"
    about = "compare the score distributions of each label"
    command = _command(commands, "drift", about=about, groups=(), example=example)
    command.add_argument("before", metavar="A", help="scored folder, or a model folder for its validation data")
    command.add_argument("after", metavar="B", help="scored folder")
    command.add_argument("--plot", metavar="FILE.png", help="draw both histograms of each label")
    about = "convert a Simple Transformers or Hugging Face model, pickled or not, or a LoRA adapter"
    command = _command(commands, "convert", about=about, groups=(), example="pipelines convert outputs/ runs/spam")
    command.add_argument("old", metavar="OLD", help="folder with config.json and weights")
    command.add_argument("new", metavar="NEW", help="new folder")
    about = "binary, multiclass, multilabel or regression, if config.json does not define it"
    command.add_argument("--kind", help=about)
    command.add_argument("--labels", metavar="A,B,C", help="names of the labels, in the order of the logits")


class _HelpAll(argparse.Action):
    """Print the help, and then all settings."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        assert isinstance(parser, Parser)
        sys.stdout.write(f"{parser.format_help()}{_settings_help(parser.settings)}\n")
        parser.exit()


def _command(commands: Any, name: str, *, about: str, groups: Sequence[type[Any]], example: str) -> Parser:
    command: Parser = commands.add_parser(
        name,
        help=about,
        usage=f"pipelines {name} [arguments]",
        description=f"{about[0].upper()}{about[1:]}.\n\nexample:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.settings = groups
    command.add_argument("--json", action="store_true", help="print the whole result as JSON on stdout")
    command.add_argument("-v", "--verbose", action="store_true", help="also show debug messages, with time and module")
    command.add_argument("-q", "--quiet", action="store_true", help="show only warnings and errors, no progress")
    command.set_defaults(flags=[], config=None, set=None, address=None)
    if groups:
        command.add_argument("--help-all", nargs=0, action=_HelpAll, help="also show the settings without a flag")
        command.add_argument("--config", metavar="FILE.yaml", help="settings by name; --set and flags win over it")
        command.add_argument(
            "--set", action="append", metavar="NAME=VALUE", help="any setting, as YAML: see --help-all"
        )
    if any(group.__name__.endswith("Paths") for group in groups):
        command.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a local Ray)")
    return command


def _flags(command: Parser, group: type[Any], names: Sequence[str], shown_in: Any) -> None:
    """Add a flag for each of these settings to a group of the help, in this order."""
    types: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("int", "int | None"), int),
        **dict.fromkeys(("float", "float | None"), float),
        **dict.fromkeys(("dict[str, float] | None", "dict[str, str] | None"), _yaml),
        "float | int": _number,
        "float | int | None": _number,
        "tuple[float, ...] | dict[str, float] | Literal['balanced'] | None": _yaml,
    }
    by_name = {field.name: field for field in dataclasses.fields(group)}
    for name in names:
        field, about = by_name[name], field_help(group)[name]
        flag = f"--{name.replace('_', '-')}"
        if field.type == "bool":
            shown_in.add_argument(flag, action="store_true", default=None, help=about)
            continue
        kind = types.get(str(field.type).replace('"', "'"), str)
        metavar = "A,B,C" if name in LISTS else {int: "N", float: "X", _number: "X", _yaml: "YAML"}.get(kind, "VALUE")
        default = (
            "" if field.default in (dataclasses.MISSING, None, ()) else f" (default {_shown_default(field.default)})"
        )
        shown_in.add_argument(flag, type=kind, metavar=metavar, help=f"{about}{default}".replace("%", "%%"))
    command.set_defaults(flags=[*command.get_default("flags"), *names])


def _number(text: str) -> int | float:
    """Return an int if the text is one, else a float."""
    return int(text) if text.isdigit() else float(text)


def _yaml(text: str) -> Any:
    """Parse a value in YAML, such as {name: value}."""
    return parse_yaml(text, "a flag's value")


def _settings_help(groups: Sequence[type[Any]]) -> str:
    lines = []
    for group in groups:
        if not group.__name__.endswith("Paths"):
            lines += ["", f"settings ({(group.__doc__ or '').strip().splitlines()[0].rstrip('.')}):"]
            for field in dataclasses.fields(group):
                lines.append(f"  {field.name}={_shown_default(field.default)}  {field_help(group)[field.name]}")
    return "\n".join(lines)


def _shown_default(value: object) -> str:
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
