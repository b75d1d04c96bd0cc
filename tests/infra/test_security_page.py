"""The security page names tests that exist, and what it says of the code's own text is so."""

import re

import pytest

from tests.infra.paths import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", PAGE))))
def test_a_line_of_the_page_is_held_by_a_test_that_exists(name):
    path, _, function = name.partition("::")
    assert (ROOT / path).is_file()
    assert not function or re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_remote_code_and_eval_are_nowhere_in_the_package():
    for file in (ROOT / "pipelines").rglob("*.py"):
        text = file.read_text()
        assert set(re.findall(r"from_pretrained\([^)]*trust_remote_code=(\w+)", text)) <= {"False"}, file
        assert not re.search(r"(?<![\w.])(eval|exec)\(|pickle\.load|shell=True", text), file
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, file
