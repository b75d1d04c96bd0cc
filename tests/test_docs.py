"""The documentation: its site builds without a warning, and its commands run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.model_folder import read_model_folder, seal
from tests import tiny
from tests.jobs import clean_environment

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "demo" not in path.parts)
BLOCK = re.compile(
    r"(<!-- not-run: (?P<reason>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
FOLDERS = ("tests", "benchmarks", "pipelines", "infra", "docs", "ray_jobs")
LANGUAGES = {"sh", "python", "text", "yaml", "json"}
OPERATING = ("how-to/cluster.md", "how-to/nightly.md", "how-to/resume.md", "how-to/size.md", "how-to/upgrade.md")
"""Pages of which tests/on_ray/test_guides.py runs the commands, in this order."""
TASKS = ("data.md", "how-to/imbalanced.md", "how-to/multilabel.md", "how-to/lora.md", "how-to/thresholds.md",
         "how-to/early-exit.md", "how-to/drift.md", "reference/python.md",
         "tutorials/simpletransformers.md")  # fmt: skip
JOURNEY = ("tutorials/emails.md", "tutorials/delta.md")


def blocks(page):
    """The blocks of a page: language, text, and the reason why it is not run."""
    return [(found["kind"], found["text"], found["reason"]) for found in BLOCK.finditer((DOCS / page).read_text())]


def script(pages):
    """One shell script with the commands and the Python code of some pages."""
    lines = ["set -eux"]
    for page in pages:
        for kind, text, reason in blocks(page):
            if reason is None and kind == "sh":
                lines.append(text)
            elif reason is None and kind == "python":
                lines.append(f"python - <<'PYTHON'\n{text}PYTHON")
    return "\n".join(lines)


def run(pages, folder, *, timeout):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**clean_environment(), "HOME": str(folder), "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", script(pages)], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=timeout, check=False)  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 35
    settings = (tmp_path / "site" / "reference" / "settings" / "index.html").read_text()
    assert "train_max_windows" in settings
    assert "Fine-tune a classifier" in (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    for page in pages:
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://", page.read_text()), page


def test_every_command_is_run_or_says_why_not():
    assert PAGES
    for page in PAGES:
        name = str(page.relative_to(DOCS))
        for kind, text, reason in blocks(name):
            assert kind in LANGUAGES, (name, text)
            if kind in ("sh", "python") and reason is None:
                assert name in (*TASKS, *JOURNEY, *OPERATING), f"no test runs {name}: {text}"


def test_pages_name_only_files_that_exist():
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(
            r"`((?:tests|benchmarks|pipelines|infra|docs|ray_jobs)/[\w./-]+)(?:::\w+)?`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)} names {name}"


@pytest.fixture
def workplace(tmp_path, emails, spam_folder):
    """A folder with the data and models that the guides name. The model is a tiny one."""
    texts = [text[:300] for text in emails["text"].to_pylist()]
    labels = emails["label"].to_pylist()
    (tmp_path / "runs").mkdir()
    shutil.copytree(spam_folder.path, tmp_path / "runs" / "spam")
    folder = read_model_folder(tmp_path / "runs" / "spam")
    seal(folder)
    tiny.classifier(num_labels=2).save_pretrained(tmp_path / "bert-base-uncased")
    tiny.save_tokenizer(tmp_path / "bert-base-uncased", texts[:40])
    for name in ("train", "valid", "test", "mail"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / name / "0.parquet")
    (tmp_path / "tags").mkdir()
    tags = [["urgent", "billing"][: row % 3] for row in range(60)]
    pq.write_table(pa.table({"text": texts[:60], "label": tags}), tmp_path / "tags" / "0.parquet")
    write_csv(tmp_path)
    return tmp_path


def write_csv(folder):
    rows = range(20)
    tables = {
        "reviews": ("text,label", ["ham" if row % 2 else "spam" for row in rows]),
        "wide": ("text,urgent,billing", [f"{row % 2},{row % 3 // 2}" for row in rows]),
        "tags": ("text,label", [["", "urgent", "urgent;billing"][row % 3] for row in rows]),
        "codes": ("text,label", [[3, 7, 12][row % 3] for row in rows]),
        "stars": ("text,label", [row / 4 for row in rows]),
    }
    for name, (head, values) in tables.items():
        lines = [head, *(f"some words {row},{value}" for row, value in zip(rows, values, strict=True))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_of_the_guides(workplace):
    run(TASKS, workplace, timeout=580)
    assert (workplace / "drift.png").exists()
    assert (workplace / "runs" / "lora" / "adapter").is_dir()
    assert (workplace / "tags.parquet").exists()
