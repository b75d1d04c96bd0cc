"""The `pipelines` command: it turns flags and YAML into settings, runs a job, and prints the result on stdout.

The log and the progress go to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 done with rows
in error. Each command imports what it needs itself, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.api import run_scoring, run_training
from pipelines.arguments import EVALUATE_GROUPS, commented_settings, parse_arguments, settings_of
from pipelines.config_file import parse_yaml
from pipelines.errors import PipelinesError, SettingsError
from pipelines.fields import parse
from pipelines.printing import renamed, table_lines, value_lines
from pipelines.progress import show_logs
from pipelines.settings import NEVER, ComputeSettings, DataSettings, ScoreSettings

if TYPE_CHECKING:
    from pipelines.bulk.job import ScoreJob
    from pipelines.bulk.summary import ScoreSummary
    from pipelines.evaluation.labelled import EvaluationResult

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
    model = shlex.quote(summary.model)
    names = ("model", "documents", "rows_in_error", "windows", "steps", "seconds")
    values = {name: getattr(summary, name) for name in names}
    values.update({f"valid {name}": value for name, value in summary.valid.items() if not isinstance(value, dict)})
    if summary.documents_truncated:
        values["documents_truncated"] = f"{summary.documents_truncated} (by max_windows or train_max_windows)"
    if summary.report is not None:
        values["report"] = summary.report
    following = (
        f"evaluate {model} --data TEST_FILES",
        f"score {model} --input FILES --output NEW_FOLDER",
        f"serve {model} --local",
    )
    _print(options, summary.to_json(), values, summary.labels, following)
    return ROWS_IN_ERROR if summary.rows_in_error else DONE


def _score(options: argparse.Namespace) -> int:
    from pipelines.bulk.job import ScoreJob

    job = ScoreJob.parse(settings_of(options))
    if options.dry_run:
        return _estimate(options, job)
    if options.rate is not None:
        raise SettingsError("--rate is for --dry-run, which estimates the job")
    summary = run_scoring(job, address=options.address)
    _print_scored(options, summary)
    return ROWS_IN_ERROR if summary.rows_in_error or summary.files_in_error or summary.values_lost else DONE


def _labelled_settings(options: argparse.Namespace) -> tuple[DataSettings, ComputeSettings]:
    """Return the settings of a command that reads labelled data. Columns not named are those of the training."""
    from pipelines.model_folder import with_columns_of_training

    data, compute = parse(with_columns_of_training(options.model, settings_of(options)), *EVALUATE_GROUPS)
    return data, compute


def _print_scored(options: argparse.Namespace, summary: ScoreSummary) -> None:
    """Print the summary of a scored folder."""
    result = summary.to_json()
    hidden = {"histograms", "positive_rates", "labels", "units", "units_before"}
    values = {name: value for name, value in result.items() if name not in hidden and value not in ({}, [])}
    rows = [
        {"label": label, "rows": round(rate * (summary.rows_out - summary.rows_in_error)), "share": rate}
        for label, rate in summary.positive_rates.items()
    ]
    output = shlex.quote(summary.output)
    following = [f"evaluate --scored {output}"]
    is_complete = settings_of(options).get("early_exit", "off") == "off"  # otherwise labels hold for these thresholds
    if summary.kind in ("binary", "multilabel") and is_complete:  # the other kinds have no thresholds
        following.append(f"relabel {output} --thresholds 0.9 --output NEW_FOLDER")
    _print(options, result, {"output": summary.output, **values}, rows, following)


def _estimate(options: argparse.Namespace, job: ScoreJob) -> int:
    from pipelines.bulk.estimate import estimate
    from pipelines.bulk.job import check_job

    if options.rate is not None and not options.rate > 0:
        raise SettingsError(f"--rate {options.rate} must be above 0: tokens per second of one replica")
    found = estimate(check_job(job), rate=options.rate)
    _print(options, found.to_json(), {"takes": found.in_words, **found.to_json()})
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
    result = _evaluate_scored(options) if options.scored else _evaluate_model(options)
    values = {name: value for name, value in result.to_json().items() if name != "per_label"}
    if result.report is not None:
        values["report"] = result.report
    _print(options, result.to_json(), {"summary": result.in_words, **values}, result.labels)
    return ROWS_IN_ERROR if result.rows_in_error else DONE


def _evaluate_model(options: argparse.Namespace) -> EvaluationResult:
    from pipelines.evaluation.labelled import evaluate_folder

    missing = [name for name, value in (("DIR", options.model), ("--data", options.data)) if value is None]
    if missing:
        raise SettingsError(
            f"{' and '.join(missing)} missing: give a model folder and --data FILES, or --scored FOLDER for files that "
            f"`pipelines score` wrote"
        )
    data, compute = _labelled_settings(options)
    return evaluate_folder(
        options.model, options.data, data, compute, report=options.report, report_texts=options.report_texts
    )


def _evaluate_scored(options: argparse.Namespace) -> EvaluationResult:
    from pipelines.bulk.evaluate import evaluate_scored, with_columns_of_scored
    from pipelines.storage.locations import absolute

    for name, value in (("DIR", options.model), ("--data", options.data), ("--report-texts", options.report_texts)):
        if value:
            raise SettingsError(f"--scored reads labels and scores of scored files; leave out {name}")
    scored = absolute(options.scored)
    data, _ = parse(with_columns_of_scored(scored, settings_of(options)), *EVALUATE_GROUPS)
    return evaluate_scored(scored, data, report=options.report)


def _tune(options: argparse.Namespace) -> int:
    from pipelines.evaluation.tuning import TuneOptions, tune_folder

    data, compute = _labelled_settings(options)
    wanted = TuneOptions(options.objective, options.confidence, options.joint, options.calibrate, options.early_exit)
    result = tune_folder(options.model, options.data, data, compute, wanted)
    content = result.to_json()
    hidden = {"guarantees", "per_label", "thresholds", "thresholds_before"}
    values = {name: value for name, value in content.items() if name not in hidden and value != []}
    values.update({name: text for name, text in result.promises.items() if name not in result.labels})
    model = shlex.quote(result.model)
    following = [f"score {model} --input FILES --output NEW_FOLDER"]
    if result.thresholds and set(result.thresholds) == {NEVER}:  # as it is, the model assigns no label
        following = [f"tune {model} --data {shlex.quote(options.data)}   (thresholds without a promise)"]
    _print(options, content, values, result.rows, following)
    return ROWS_IN_ERROR if result.rows_in_error else DONE


def _quantize(options: argparse.Namespace) -> int:
    from pipelines.evaluation.quantizing import QuantizeOptions, quantize_folder

    data, compute = _labelled_settings(options)
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

    scored, output, thresholds = absolute(options.scored), absolute(options.output), None
    if options.thresholds is not None:
        (settings,) = parse({"thresholds": parse_yaml(options.thresholds, "--thresholds")}, ScoreSettings)
        thresholds = settings.thresholds
        if thresholds is None:
            raise SettingsError("--thresholds is empty; write 0.4, [0.3, 0.5] or '{spam: 0.9}'")
    summary = relabel(scored, output, thresholds, model=options.model)
    values = {name: getattr(summary, name) for name in ("output", "files", "rows", "rows_in_error", "seconds")}
    _print(options, summary.to_json(), values, summary.labels)
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
    from pipelines.decisions.labels import thresholds_by_label
    from pipelines.model_folder import CALIBRATION, read_model_folder

    folder = read_model_folder(options.model)
    content = folder.to_json()
    values = {**content["decision"], **content["windows"], **{k: v for k, v in content.items() if k.endswith("_hash")}}
    for name in (*CALIBRATION, "guarantees", "early_exit", "quantization"):
        if content.get(name):
            values[name] = content[name]
    training = dict(content["training"])
    for name in ("columns", "settings"):
        values.update({f"trained with {key}": value for key, value in training.pop(name, {}).items()})
    values.update({f"trained with {name}": value for name, value in training.items()})
    metrics = content["metrics"]
    values.update({f"valid {name}": value for name, value in metrics.items() if name != "per_label"})
    thresholds = thresholds_by_label(folder.decision)
    per_label = metrics.get("per_label", {})
    rows = [
        {"label": label, "threshold": "never" if threshold == NEVER else threshold, **renamed(per_label.get(label, {}))}
        for label, threshold in thresholds.items()
    ]
    del values["thresholds"]
    _print(options, content, values, rows)
    return DONE


def _print(
    options: argparse.Namespace,
    result: Mapping[str, Any],
    values: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
    following: Sequence[str] = (),
) -> None:
    """Print the result on stdout: all of it as JSON, or the most important values as text.

    Args:
        options: Whether JSON is wanted, and where to print.
        result: The whole result, as JSON content.
        values: The values that people want to see.
        rows: A table that follows them.
        following: Commands that usually come next.
    """
    if options.json:
        print(json.dumps(result), file=options.out)
        return
    for line in value_lines(values):
        print(line, file=options.out)
    if rows:
        print(*["", *table_lines(rows)], sep="\n", file=options.out)
    if following:
        print(*["", "next:", *(f"  pipelines {command}" for command in following)], sep="\n", file=options.out)


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
