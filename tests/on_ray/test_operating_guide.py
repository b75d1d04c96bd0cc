"""Runs the commands of docs/operating.md in order in one shell."""

import os
import re
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests.jobs import clean_environment

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs" / "operating.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
NOT_RUN = re.findall(r"^```sh not-run\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
PORTS = (6379, 8265)


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_not_run_blocks_need_a_cloud():
    assert len(BLOCKS) >= 6
    for block in NOT_RUN:
        assert re.search(r"docker|kubectl|ray stop", block)
    assert not re.search(r"^```(?!sh\n|sh not-run\n|$)", GUIDE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not all(map(is_free, PORTS)), reason="another Ray has the guide's ports, 6379 and 8265")
def test_guide_commands_run(spam_folder, tmp_path):
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(spam_folder.path, checkout / "runs" / "demo" / "model")
    mark = f"PIPELINES_TEST_{uuid.uuid4().hex}"
    environment = clean_environment()
    environment.update(
        {mark: "1", "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    )
    tune = ["pipelines", "tune", "runs/demo/model", "--data", "docs/demo/emails/valid", "--limit", "40"]
    subprocess.run(tune, cwd=checkout, env=environment, check=True, capture_output=True)  # like `make demo`
    script = "\n".join(["set -eux", *BLOCKS])
    try:
        done = subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True,
                              timeout=800, check=False)  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-6000:]
        assert said.count("succeeded") >= 4, "the trial job, three scoring jobs, and the stopped one if it was faster"
        assert '"rows_out": 325' in said, "the final output has the rows of all four files"
        assert "resuming: " in said
        assert "replica_hours" in said
    finally:
        for process in psutil.process_iter():
            if process.pid != os.getpid() and is_marked(process, mark):
                process.kill()


def is_marked(process, mark):
    try:
        return mark in process.environ()
    except psutil.Error:
        return False
