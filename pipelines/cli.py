"""The `pipelines` command: it turns flags and YAML into settings, runs a job, and prints the result on stdout.

The log and the progress go to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 done with rows
in error. Each command imports what it needs itself, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, get_args

from pipelines.api import run_scoring, run_training
from pipelines.config_file import parse_yaml, read_config
from pipelines.errors import PipelinesError, SettingsError
from pipelines.fields import field_help, parse
from pipelines.progress import show_logs
from pipelines.serving.settings import ServePaths, ServeSettings
from pipelines.settings import (
    CalibrationMethod,
    ComputeSettings,
    DataSettings,
    DecisionSettings,
    ScorePaths,
    ScoreSettings,
    TrainPaths,
    TrainSettings,
    WindowSettings,
)
from pipelines.version import VERSION

if TYPE_CHECKING:
    from pipelines.bulk.job import ScoreJob

DONE, FAILED, WRONG_USAGE, ROWS_IN_ERROR = 0, 1, 2, 3
INTERRUPTED = 130
TRAIN_GROUPS = (TrainPaths, DecisionSettings, DataSettings, WindowSettings, TrainSettings, ComputeSettings)
SCORE_GROUPS = (ScorePaths, DataSettings, ScoreSettings, ComputeSettings)
SERVE_GROUPS = (ServePaths, ServeSettings, ComputeSettings)
EVALUATE_GROUPS = (DataSettings, ComputeSettings)
LISTS = {"keep", "labels", "label_columns"}
"""Flags whose value is a list, separated by commas."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    show_logs(-1 if options.quiet else 1 if options.verbose else 0)
    try:
        with _results_alone() as options.out:
            code: int = options.run(options)
            return code
    except PipelinesError as error:
        print(f"pipelines {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"pipelines {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _results_alone() -> Iterator[TextIO]:
    """Yield a stream to the real stdout. Other output to stdout, such as that of Ray's processes, goes to stderr."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # stdout is not a file, for example when a test captures it
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(number), "w") as real:
        os.dup2(sys.stderr.fileno(), number)
        try:
            yield real
        finally:
            sys.stdout.flush()
            real.flush()
            os.dup2(real.fileno(), number)


def _train(options: argparse.Namespace) -> int:
    from pipelines.training.job import TrainJob

    summary = run_training(TrainJob.parse(_values(options)), address=options.address)
    names = ("model", "documents", "rows_in_error", "windows", "steps", "seconds", "thresholds")
    shown = {name: getattr(summary, name) for name in names}
    _print(options, summary.to_json(), {**shown, **{f"valid {name}": value for name, value in summary.valid.items()}})
    return ROWS_IN_ERROR if summary.rows_in_error else DONE


def _score(options: argparse.Namespace) -> int:
    from pipelines.bulk.job import ScoreJob

    job = ScoreJob.parse(_values(options))
    if options.dry_run:
        return _estimate(options, job)
    if options.rate is not None:
        raise SettingsError("--rate is for --dry-run, which estimates the job")
    summary = run_scoring(job, address=options.address)
    result = summary.to_json()
    _print(options, result, {name: value for name, value in result.items() if name != "histograms"})
    return ROWS_IN_ERROR if summary.rows_in_error or summary.files_in_error or summary.values_lost else DONE


def _estimate(options: argparse.Namespace, job: ScoreJob) -> int:
    from pipelines.bulk.estimate import estimate
    from pipelines.bulk.job import check_job

    if options.rate is not None and not options.rate > 0:
        raise SettingsError(f"--rate {options.rate} must be above 0: tokens per second of one replica")
    found = estimate(check_job(job), rate=options.rate).to_json()
    _print(options, found, found)
    return DONE


def _serve(options: argparse.Namespace) -> int:
    from pipelines.on_ray.serve.proxy import prepare_proxy
    from pipelines.serving.job import ServeJob

    job = ServeJob.parse(_values(options))
    if job.serve.local:
        from pipelines.serving.local import run_local

        run_local(job)
        return DONE
    prepare_proxy(job.serve.proxy)
    from pipelines.on_ray.serve.run import run_server

    run_server(job, address=options.address)
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    from pipelines.evaluation.labelled import evaluate_folder

    data, compute = parse(_values(options), *EVALUATE_GROUPS)
    result = evaluate_folder(
        options.model, options.data, data, compute, report=options.report, report_texts=options.report_texts
    )
    _print(options, result.to_json(), result.to_json())
    return ROWS_IN_ERROR if result.rows_in_error else DONE


def _tune(options: argparse.Namespace) -> int:
    from pipelines.evaluation.tuning import TuneOptions, tune_folder

    data, compute = parse(_values(options), *EVALUATE_GROUPS)
    wanted = TuneOptions(options.objective, options.confidence, options.joint, options.calibrate, options.early_exit)
    result = tune_folder(options.model, options.data, data, compute, wanted)
    content = result.to_json()
    shown = {name: value for name, value in content.items() if name != "guarantees"}
    _print(options, content, {**shown, **result.promises})
    return ROWS_IN_ERROR if result.rows_in_error else DONE


def _quantize(options: argparse.Namespace) -> int:
    from pipelines.evaluation.quantizing import QuantizeOptions, quantize_folder

    data, compute = parse(_values(options), *EVALUATE_GROUPS)
    wanted = QuantizeOptions(options.max_label_changes, options.max_drop, options.metric)
    result = quantize_folder(options.model, options.new, options.data, data, compute=compute, options=wanted)
    _print(options, result.to_json(), result.in_words())
    return DONE


def _relabel(options: argparse.Namespace) -> int:
    from pipelines.bulk.relabel import relabel
    from pipelines.storage.locations import absolute

    thresholds = parse_yaml(options.thresholds, "--thresholds")
    (settings,) = parse({"thresholds": thresholds}, ScoreSettings)
    if settings.thresholds is None:
        raise SettingsError("--thresholds is empty; write 0.4, [0.3, 0.5] or '{spam: 0.9}'")
    summary = relabel(absolute(options.scored), absolute(options.output), settings.thresholds)
    result = summary.to_json()
    _print(options, result, {name: value for name, value in result.items() if name != "histograms"})
    return ROWS_IN_ERROR if summary.rows_in_error else DONE


def _drift(options: argparse.Namespace) -> int:
    from pipelines.bulk.drift import drift, plot
    from pipelines.storage.locations import absolute

    before, after = absolute(options.before), absolute(options.after)
    found = {label: dataclasses.asdict(moved) for label, moved in drift(before, after).items()}
    if options.plot:
        plot(before, after, options.plot)
    _print(options, found, found)
    return DONE


def _convert(options: argparse.Namespace) -> int:
    from pipelines.simpletransformers.convert import convert

    folder = convert(options.old, options.new, options.kind, options.labels.split(",") if options.labels else None)
    if folder is None:
        _print(options, {"model": options.new}, {"model": f"{options.new} (to be fine-tuned: pipelines train --model)"})
        return DONE
    content = folder.to_json()
    _print(options, content, {"model": options.new, **content["decision"], **content["windows"]})
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    from pipelines.model_folder import CALIBRATION, read_model_folder

    content = read_model_folder(options.model).to_json()
    flat = {**content["decision"], **content["windows"], **{k: v for k, v in content.items() if k.endswith("_hash")}}
    flat.update({name: content[name] for name in (*CALIBRATION, "guarantees", "early_exit") if content.get(name)})
    _print(options, content, {**flat, **{f"valid {name}": value for name, value in content["metrics"].items()}})
    return DONE


def _values(options: argparse.Namespace) -> dict[str, object]:
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


def _print(options: argparse.Namespace, result: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Print the result on stdout: all of it as JSON, or the most important values as text."""
    if options.json:
        print(json.dumps(result), file=options.out)
        return
    for name, value in shown.items():
        print(f"{name}: {_shown(value)}", file=options.out)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value in ({}, [], ()):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pipelines",
        description="Train, score and serve text classifiers for long texts and large data, on Ray.",
        epilog="pipelines COMMAND --help lists what a command takes.",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_score(commands)
    _add_serve(commands)
    _add_labelled(commands)
    _add_folders(commands)
    return parser


def _add_labelled(commands: Any) -> None:
    """Add the commands that read labelled data: evaluate and tune."""
    for name, run, about in (
        ("evaluate", _evaluate, "metrics of a model folder on labelled Parquet"),
        ("tune", _tune, "tune thresholds on labelled Parquet and write them into the model folder"),
        ("quantize", _quantize, "write an int8 model folder for CPUs, if few labels change on labelled Parquet"),
    ):
        folders = "runs/spam runs/spam-int8" if name == "quantize" else "runs/spam"
        example = f"pipelines {name} {folders} --data valid/"
        command = _command(commands, name, run, about=about, groups=EVALUATE_GROUPS, example=example)
        command.add_argument("model", metavar="DIR", help="model folder")
        if name == "quantize":
            _add_contract(command)
        command.add_argument("--data", required=True, metavar="PARQUET", help="file, folder or glob with labels")
        if name == "evaluate":
            command.add_argument("--report", metavar="OUT.html", help="write a page with curves and threshold tables")
            command.add_argument(
                "--report-texts", action="store_true", help="show the first words of documents on the page"
            )
        if name == "tune":
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
        _flags(command, DataSettings, ("text_column", "text_pair_column", "label_column", "label_columns", "limit"))


def _add_contract(command: argparse.ArgumentParser) -> None:
    """Add what `pipelines quantize` takes besides."""
    command.add_argument("new", metavar="NEW", help="new folder")
    about = (
        "largest share of documents whose labels may change (default 0.002); layers that change too much stay in float"
    )
    command.add_argument("--max-label-changes", type=float, default=0.002, metavar="SHARE", help=about)
    about = "largest drop of the metric (default 0.002; mae and rmse: growth, as a share of the targets' deviation)"
    command.add_argument("--max-drop", type=float, default=0.002, metavar="X", help=about)
    command.add_argument("--metric", help="default: auprc (binary), mcc (multiclass), auprc_macro (multilabel), rmse")


def _add_folders(commands: Any) -> None:
    """Add the commands that read finished folders: inspect, relabel, drift and convert."""
    command = _command(
        commands,
        "inspect",
        _inspect,
        about="show the settings of a model folder",
        groups=(),
        example="pipelines inspect runs/spam",
    )
    command.add_argument("model", metavar="DIR", help="model folder")
    example = "pipelines relabel scored/ --thresholds '{spam: 0.9}' --output relabelled/"
    command = _command(
        commands,
        "relabel",
        _relabel,
        about="decide new labels from the scores of scored Parquet",
        groups=(),
        example=example,
    )
    command.add_argument("scored", metavar="SCORED", help="output folder of `pipelines score`")
    command.add_argument("--thresholds", required=True, metavar="YAML", help="0.4, [0.3, 0.5] or '{label: 0.9}'")
    command.add_argument("--output", required=True, help="new folder")
    example = "pipelines drift runs/spam scored/2026-11/ --plot drift.png"
    command = _command(
        commands, "drift", _drift, about="compare the score distributions of each label", groups=(), example=example
    )
    command.add_argument("before", metavar="A", help="scored folder, or a model folder for its validation data")
    command.add_argument("after", metavar="B", help="scored folder")
    command.add_argument("--plot", metavar="FILE.png", help="draw both histograms of each label")
    about = "convert a Simple Transformers or Hugging Face model, pickled or not, or a LoRA adapter"
    command = _command(
        commands, "convert", _convert, about=about, groups=(), example="pipelines convert outputs/ runs/spam"
    )
    command.add_argument("old", metavar="OLD", help="folder with config.json and weights")
    command.add_argument("new", metavar="NEW", help="new folder")
    command.add_argument(
        "--kind", help="binary, multiclass, multilabel or regression, if config.json does not define it"
    )
    command.add_argument("--labels", metavar="A,B,C", help="names of the labels, in the order of the logits")


def _add_train(commands: Any) -> None:
    example = "pipelines train --train train/ --valid valid/ --model bert-base-uncased --kind binary --output runs/spam"
    command = _command(
        commands,
        "train",
        _train,
        about="fine-tune a classifier on labelled Parquet",
        groups=TRAIN_GROUPS,
        example=example,
    )
    _flags(command, TrainPaths, ("train", "valid", "model", "output", "num_workers"))
    command.add_argument("--local", dest="num_workers", action="store_const", const=0, help="as --num-workers 0")
    _flags(command, DecisionSettings, ("kind", "labels"))
    _flags(command, DataSettings, ("text_column", "text_pair_column", "label_column", "label_columns", "limit"))


def _add_score(commands: Any) -> None:
    example = "pipelines score runs/spam --input s3://mail/2026/ --output s3://mail/scored/"
    command = _command(
        commands,
        "score",
        _score,
        about="score files into Parquet files",
        groups=SCORE_GROUPS,
        example=example,
    )
    command.add_argument("model", metavar="DIR", nargs="?", help="model folder")
    _flags(command, ScorePaths, ("input", "output"))
    names = [
        field.name for field in dataclasses.fields(ScoreSettings) if field.name not in ("thresholds", "unit_bytes")
    ]
    _flags(command, ScoreSettings, names)
    command.add_argument("--local", dest="replicas", action="store_const", const=0, help="as --replicas 0")
    command.add_argument("--dry-run", action="store_true", help="estimate the job's size and time, and write nothing")
    command.add_argument("--rate", type=float, metavar="X", help="with --dry-run: tokens per second of one replica")
    _flags(command, DataSettings, ("text_column", "text_pair_column", "limit"))
    command.set_defaults(flags=[*command.get_default("flags"), "model"])


def _add_serve(commands: Any) -> None:
    command = _command(
        commands,
        "serve",
        _serve,
        about="answer HTTP requests",
        groups=SERVE_GROUPS,
        example="pipelines serve runs/spam",
    )
    command.add_argument("model", metavar="DIR", nargs="?", help="model folder")
    _flags(command, ServeSettings, ("name", "host", "port", "local"))
    command.set_defaults(flags=[*command.get_default("flags"), "model"])


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    about: str,
    groups: Sequence[type[Any]],
    example: str,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example:\n  {example}\n{_settings_help(groups)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print the whole result as JSON on stdout")
    command.add_argument("-v", "--verbose", action="store_true", help="also show debug messages, with time and module")
    command.add_argument("-q", "--quiet", action="store_true", help="show only warnings and errors, no progress")
    command.set_defaults(run=run, flags=[], config=None, set=None, address=None)
    if groups:
        command.add_argument("--config", metavar="FILE.yaml", help="settings by name; --set and flags win over it")
        command.add_argument("--set", action="append", metavar="NAME=VALUE", help="any setting below, as YAML")
    if any(group.__name__.endswith("Paths") for group in groups):
        command.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a local Ray)")
    return command


def _flags(command: argparse.ArgumentParser, group: type[Any], names: Sequence[str]) -> None:
    """Add a flag for each of these settings."""
    types: dict[str, Any] = {
        **dict.fromkeys(("int", "int | None"), int),
        **dict.fromkeys(("float", "float | None"), float),
        **dict.fromkeys(("dict[str, float] | None", "dict[str, str] | None"), _mapping),
        "float | int | None": _number,
    }
    for field in dataclasses.fields(group):
        if field.name in names and field.type == "bool":
            command.add_argument(
                f"--{field.name.replace('_', '-')}",
                action="store_true",
                default=None,
                help=field_help(group)[field.name],
            )
        elif field.name in names:
            kind = types.get(str(field.type), str)
            metavar = "A,B,C" if field.name in LISTS else {int: "N", float: "X", _mapping: "YAML"}.get(kind)
            command.add_argument(
                f"--{field.name.replace('_', '-')}", type=kind, metavar=metavar, help=field_help(group)[field.name]
            )
    command.set_defaults(flags=[*command.get_default("flags"), *names])


def _number(text: str) -> int | float:
    """Return an int if the text is one, else a float."""
    return int(text) if text.isdigit() else float(text)


def _mapping(text: str) -> Any:
    """Parse a mapping in YAML: {name: value}."""
    return parse_yaml(text, "a flag's value")


def _settings_help(groups: Sequence[type[Any]]) -> str:
    lines = []
    for group in groups:
        if not group.__name__.endswith("Paths"):
            lines += ["", f"settings ({(group.__doc__ or '').rstrip('.')}):"]
            for field in dataclasses.fields(group):
                lines.append(f"  {field.name}={_shown_default(field.default)}  {field_help(group)[field.name]}")
    return "\n".join(lines)


def _shown_default(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
