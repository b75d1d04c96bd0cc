"""Code rules that the linter does not check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "pipelines").rglob("*.py"))
NAMED_BY_OTHERS = {"ClassificationModel", "MultiLabelClassificationModel"}
"""Classes whose methods have the positional parameters of Simple Transformers."""


def functions():
    """Every function with its class, or None."""
    for file in FILES:
        for parent in ast.walk(ast.parse(file.read_text())):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield file, node, parent.name if isinstance(parent, ast.ClassDef) else None


def test_at_most_five_positional_parameters():
    too_many = []
    for file, node, owner in functions():
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > 5 and owner not in NAMED_BY_OTHERS:
            too_many.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name} has {count}")
    assert not too_many, "make the others keyword-only, or a dataclass: " + "; ".join(too_many)


def test_file_length():
    too_long = [f"{file.relative_to(ROOT)}" for file in FILES if len(file.read_text().splitlines()) > 500]
    assert not too_long, f"split them by concept: {too_long}"


def test_function_length():
    too_long = [f"{file.name}:{node.name}" for file, node, _ in functions() if node.end_lineno - node.lineno >= 60]
    assert not too_long, f"split them by concept: {too_long}"


def test_init_files_hold_only_a_docstring():
    for file in FILES:
        if file.name == "__init__.py" and file.parent.name != "pipelines":
            body = ast.parse(file.read_text()).body
            assert len(body) == 1, file
            assert ast.get_docstring(ast.parse(file.read_text())), file


def test_loggers_are_named_after_their_modules():
    for file in FILES:
        for found in re.findall(r"logging\.getLogger\(([^)]*)\)", file.read_text()):
            allowed = file.name in ("progress.py", "cluster.py", "telemetry.py")
            assert found == "__name__" or allowed, f"{file}: {found}"


@pytest.mark.parametrize("word", ["goes on", "gone on", "going on", "the house", "knows no", "who waits"])
def test_plain_words(word):
    found = [str(file.relative_to(ROOT)) for file in FILES if word in file.read_text().lower()]
    assert not found, f"{word!r} in {found}"
