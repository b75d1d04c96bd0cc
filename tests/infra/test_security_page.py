"""The tests named in docs/explanation/security.md exist. Its claims about the source code are true."""

import re

import pytest

from tests.infra.paths import ROOT

PAGE = (ROOT / "docs" / "explanation" / "security.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", PAGE))))
def test_named_tests_exist(name):
    path, _, function = name.partition("::")
    assert (ROOT / path).is_file()
    assert not function or re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_no_remote_code_or_eval():
    for file in (ROOT / "pipelines").rglob("*.py"):
        text = file.read_text()
        assert set(re.findall(r"from_pretrained\([^)]*trust_remote_code=(\w+)", text)) <= {"False"}, file
        assert not re.search(r"(?<![\w.])(eval|exec)\(|pickle\.load|shell=True", text), file
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, file
