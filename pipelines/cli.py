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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.api import run_scoring, run_training
from pipelines.arguments import EVALUATE_GROUPS, commented_settings, parse_arguments, settings_of
from pipelines.config_file import parse_yaml
from pipelines.errors import PipelinesError, SettingsError
from pipelines.fields import parse
from pipelines.progress import show_logs
from pipelines.settings import ScoreSettings

if TYPE_CHECKING:
    from pipelines.bulk.job import ScoreJob

DONE, FAILED, WRONG_USAGE, ROWS_IN_ERROR = 0, 1, 2, 3
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    options = parse_arguments(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    show_logs(-1 if options.quiet else 1 if options.verbose else 0)
    try:
        with _results_alone() as options.out:
            return RUN[options.command](options)
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

    summary = run_training(TrainJob.parse(settings_of(options)), address=options.address)
    names = ("model", "documents", "rows_in_error", "windows", "steps", "seconds", "thresholds")
    shown = {name: getattr(summary, name) for name in names}
    _print(options, summary.to_json(), {**shown, **{f"valid {name}": value for name, value in summary.valid.items()}})
    return ROWS_IN_ERROR if summary.rows_in_error else DONE


def _score(options: argparse.Namespace) -> int:
    from pipelines.bulk.job import ScoreJob

    job = ScoreJob.parse(settings_of(options))
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

    job = ServeJob.parse(settings_of(options))
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

    data, compute = parse(settings_of(options), *EVALUATE_GROUPS)
    result = evaluate_folder(
        options.model, options.data, data, compute, report=options.report, report_texts=options.report_texts
    )
    _print(options, result.to_json(), result.to_json())
    return ROWS_IN_ERROR if result.rows_in_error else DONE


def _tune(options: argparse.Namespace) -> int:
    from pipelines.evaluation.tuning import TuneOptions, tune_folder

    data, compute = parse(settings_of(options), *EVALUATE_GROUPS)
    wanted = TuneOptions(options.objective, options.confidence, options.joint, options.calibrate, options.early_exit)
    result = tune_folder(options.model, options.data, data, compute, wanted)
    content = result.to_json()
    shown = {name: value for name, value in content.items() if name != "guarantees"}
    _print(options, content, {**shown, **result.promises})
    return ROWS_IN_ERROR if result.rows_in_error else DONE


def _quantize(options: argparse.Namespace) -> int:
    from pipelines.evaluation.quantizing import QuantizeOptions, quantize_folder

    data, compute = parse(settings_of(options), *EVALUATE_GROUPS)
    wanted = QuantizeOptions(options.max_label_changes, options.max_drop, options.metric)
    result = quantize_folder(options.model, options.new, options.data, data, compute=compute, options=wanted)
    _print(options, result.to_json(), result.in_words())
    return DONE


def _init(options: argparse.Namespace) -> int:
    print("\n".join(commented_settings(options.kind)), file=options.out)
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
    flat.update(
        {
            name: content[name]
            for name in (*CALIBRATION, "guarantees", "early_exit", "quantization")
            if content.get(name)
        }
    )
    _print(options, content, {**flat, **{f"valid {name}": value for name, value in content["metrics"].items()}})
    return DONE


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


RUN = {
    "train": _train,
    "score": _score,
    "serve": _serve,
    "evaluate": _evaluate,
    "tune": _tune,
    "quantize": _quantize,
    "init": _init,
    "inspect": _inspect,
    "relabel": _relabel,
    "drift": _drift,
    "convert": _convert,
}
"""What runs each command, and returns its exit code."""
