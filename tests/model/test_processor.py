"""Number formats for which the processor has no instructions are named: they are slow, and nothing else says so."""

import pytest

from pipelines.model import loading, processor
from pipelines.model.processor import processor_flags, slow_format
from pipelines.model.scorer import Scorer
from pipelines.settings import ComputeSettings

OLD = "model name\t: a processor\nflags\t\t: fpu sse avx avx2 fma\n"
NEW = "flags\t\t: fpu avx512f avx512_vnni avx512_bf16\n"
ARM = "Features\t: fp asimd asimddp i8mm bf16\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    def write(content):
        (tmp_path / "cpuinfo").write_text(content)
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
        processor_flags.cache_clear()

    yield write
    processor_flags.cache_clear()


@pytest.mark.parametrize(("content", "is_slow"), [(OLD, True), (NEW, False), (ARM, False), ("nothing of it", False)])
def test_slow_formats(cpuinfo, content, is_slow):
    cpuinfo(content)
    assert bool(slow_format(is_int8=True, is_bf16=False)) == is_slow
    assert bool(slow_format(is_int8=False, is_bf16=True)) == is_slow
    assert slow_format(is_int8=False, is_bf16=False) == ""


def test_slow_format_is_told_once(cpuinfo, spam_folder, log_lines, monkeypatch):
    cpuinfo(OLD)
    monkeypatch.setattr(loading, "_TOLD", set())
    for dtype in ("bfloat16", "bfloat16", "auto", "float32"):
        Scorer.load(spam_folder, compute=ComputeSettings(dtype=dtype, device="cpu"))
    (line,) = [line for line in log_lines if "this processor has no" in line]
    assert "dtype=bfloat16 is not faster than float32, which auto takes" in line
