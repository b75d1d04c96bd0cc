"""Pages of the documentation that are written from the code when the site is built: settings, errors, HTTP and more."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import pipelines
from pipelines import arguments, errors
from pipelines.fields import field_help
from pipelines.serving.api import build_api
from pipelines.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS
from pipelines.serving.settings import ServePaths, ServeSettings
from pipelines.serving.timings import NoMetrics
from pipelines.settings import (
    ComputeSettings,
    DataSettings,
    DecisionSettings,
    ScorePaths,
    ScoreSettings,
    WindowSettings,
)
from pipelines.training_settings import TrainPaths, TrainSettings

GROUPS = (
    TrainPaths,
    ScorePaths,
    ServePaths,
    DecisionSettings,
    DataSettings,
    WindowSettings,
    TrainSettings,
    ScoreSettings,
    ServeSettings,
    ComputeSettings,
)

ERRORS = (
    errors.SettingsError,
    errors.DataError,
    errors.ModelFolderError,
    errors.OutputError,
    errors.UsageError,
    errors.JobError,
)
"""Classes of errors, in the order of their page."""
STAND_INS = (
    "*In the commands, `runs/spam` stands for your model folder ([the first tutorial](../tutorials/emails.md) makes "
    "`runs/emails`), `train/` and `valid/` for [labelled files](../data.md), and `mail/` for files to score.*"
)
JOB_METRICS = {
    "score_rows": "Rows that are done.",
    "score_rows_total": "Rows of the job.",
    "score_rows_in_error": "Rows without scores.",
    "score_tokens": "Tokens that were scored.",
    "score_units": "Finished units.",
    "score_seconds_left": "Estimated seconds to the end.",
    "train_step": "Optimizer steps that are done.",
    "train_loss": "Loss of a step.",
    "train_learning_rate": "Learning rate.",
    "train_tokens_per_second": "Tokens per second, of all workers.",
    "train_seconds_left": "Estimated seconds to the end.",
    "train_valid_...": "Each metric of the newest evaluation.",
}
"""Metrics of jobs on Ray, without their common beginning. tests/infra/test_monitoring.py compares them."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    pages = {
        "reference/settings.md": "\n".join(settings_page()),
        "reference/command-line.md": "\n".join(command_page()),
        "reference/metric-names.md": "\n".join(metrics_page()),
        "reference/openapi.md": "\n".join(schema_page()),
        "reference/messages.md": "\n".join(messages_page()),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Say on every how-to page what the names in its commands stand for."""
    if not page.file.src_path.startswith("how-to/"):
        return markdown
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n{STAND_INS}\n{rest}"


def settings_page() -> Iterator[str]:
    """Yield the lines of the page of all settings."""
    yield "# Settings\n"
    yield (
        "The same names work as keyword arguments in Python, as `--set name=value`, as flags where a command has "
        "one, and in the YAML file of `--config`. A flag wins over `--set`, and `--set` over the file.\n"
    )
    for group in GROUPS:
        users = ", ".join(f"`{command}`" for command, groups in commands_of().items() if group in groups)
        yield f"## {group.__name__}\n"
        yield f"{(group.__doc__ or '').strip().splitlines()[0]} Used by {users}.\n"
        yield "| setting | type | default | meaning |"
        yield "|---|---|---|---|"
        for field in dataclasses.fields(group):
            kind = str(field.type).replace(" | ", " or ")
            default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            yield f"| `{field.name}` | `{kind}` | {default} | {cell(field_help(group)[field.name])} |"
        yield ""


def commands_of() -> dict[str, Sequence[type[Any]]]:
    """Return the settings groups of each command that has settings."""
    labelled = arguments.EVALUATE_GROUPS
    return {
        "train": arguments.TRAIN_GROUPS,
        "score": arguments.SCORE_GROUPS,
        "serve": arguments.SERVE_GROUPS,
        "evaluate": labelled,
        "tune": labelled,
        "quantize": labelled,
    }


def command_page() -> Iterator[str]:
    """Yield the lines of the page of all commands, from their help."""
    yield "# Command line\n"
    yield "`pipelines COMMAND --help` prints what stands here; `--help-all` adds the settings that have no flag.\n"
    parser, commands = arguments.parsers()
    yield f"```text\n{parser.format_help().strip()}\n```\n"
    for name, command in commands.choices.items():
        assert isinstance(command, argparse.ArgumentParser)
        yield f"## {name}\n\n```text\n{command.format_help().strip()}\n```\n"


def schema_page() -> Iterator[str]:
    """Yield the lines of the page of routes and bodies, from the server's OpenAPI document."""
    predictor: Any = SimpleNamespace(settings=ServeSettings(), metrics=NoMetrics())
    document = build_api(predictor).openapi()
    yield "# HTTP schema\n"
    yield "Generated from the server's OpenAPI document. [HTTP](http.md) explains routes, headers and status codes.\n"
    yield "## Routes\n"
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield f"- `{method.upper()} {path}`: {route.get('description') or route.get('summary', '')}".split("\n")[0]
    yield "\n## Bodies\n"
    for name, schema in document["components"]["schemas"].items():
        yield f"### {name}\n\n```json\n{json.dumps(schema, indent=2)}\n```\n"


def metrics_page() -> Iterator[str]:
    """Yield the lines of the page of all metrics, from the code that exports them."""
    yield "# Metric names\n"
    yield "Prometheus adds tags of its own. On Ray, each series also names the replica. [More](metrics.md).\n"
    yield "| metric | type | tags | meaning |"
    yield "|---|---|---|---|"
    kinds = (("counter", COUNTERS, "_total"), ("gauge", GAUGES, ""), ("histogram", HISTOGRAMS, "_bucket, _sum, _count"))
    for kind, metrics, ending in kinds:
        for name, metric in metrics.items():
            full = f"ray_{name}{ending}" if kind != "histogram" else f"ray_{name} ({ending})"
            yield f"| `{full}` | {kind} | {', '.join(metric.tags) or '-'} | {cell(metric.about)} |"
    for name, about in JOB_METRICS.items():
        yield f"| `ray_pipelines_{name}` | gauge | {'output' if name.startswith('score') else 'model'} | {about} |"


def messages_page() -> Iterator[str]:
    """Yield the lines of the page of all error messages, from the statements that raise them."""
    yield "# Error messages\n"
    yield (
        "The messages of the commands and of the Python functions as they stand in the code. Parts that vary are in "
        "capitals. A few messages that the code puts together elsewhere, and those of the server, are not here. "
        "[Exit codes and errors](errors.md) explains the classes.\n"
    )
    found = messages_by_error()
    for error in ERRORS:
        yield f"## {error.__name__}\n"
        yield f"{(error.__doc__ or '').strip()} Exit code {error.exit_code}.\n"
        for folder, messages in sorted(found[error.__name__].items()):
            yield f"**{folder}**\n"
            yield from (f"- {message}" for message in sorted(messages, key=str.casefold))
            yield ""


def messages_by_error() -> dict[str, dict[str, set[str]]]:
    """Return the messages of each class of errors by the folder of the package that raises them, as Markdown."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    package = Path(pipelines.__file__).parent
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package)
        folder = "pipelines" if len(module.parts) == 1 else f"pipelines.{module.parts[0]}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                message = message_of(node.args[0])
                if message:
                    found[node.func.id][folder].add(markdown(message))
    return found


def message_of(node: ast.expr) -> str:
    """Return the text of a message, with names in capitals where values will stand, or nothing where it is a value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else placeholder(part.value)  # type: ignore[misc, attr-defined]
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message_of(node.left) + message_of(node.right)
    return ""


def placeholder(value: ast.expr) -> str:
    """Return the name that stands for a value in a message: of `f"{job.output}"` OUTPUT."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    names = [node.id for node in ast.walk(value) if isinstance(node, ast.Name)]
    names += [node.attr for node in ast.walk(value) if isinstance(node, ast.Attribute)]
    words = [name for name in names if name not in ("self", "len", "sorted", "list", "str", "join", "type", "__name__")]
    return f"{(words or ['value'])[-1].strip('_').upper()}"


def markdown(message: str) -> str:
    """Return a message as Markdown that shows every character of it."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(message.split()))


def cell(text: str) -> str:
    """Return a text as the cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
