"""The image passes its linter, its install steps work in a clean environment, and it has no unneeded files."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.infra.paths import ROOT

DOCKERFILE = ROOT / "infra" / "Dockerfile"
TEXT = DOCKERFILE.read_text()
STAGES = {
    name: body for name, body in re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}


def lint(path):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "hadolint is in the dev extra"
    return subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)


def test_dockerfile_lint(tmp_path):
    assert lint(DOCKERFILE).returncode == 0, lint(DOCKERFILE).stdout
    (tmp_path / "Dockerfile").write_text(TEXT.replace("COPY --from=build-cpu", "COPPY --from=build-cpu"))
    assert lint(tmp_path / "Dockerfile").returncode != 0


def test_final_stages_are_minimal_and_pinned():
    assert set(STAGES) == {"source", "build-cpu", "build-cuda", "runtime", "cuda", "cpu"}
    final = STAGES["runtime"] + STAGES["cuda"] + STAGES["cpu"]
    assert "USER 1000" in STAGES["runtime"]
    assert "USER" not in STAGES["cuda"] + STAGES["cpu"]
    assert not re.search(r"gcc|build-essential|apt-get install.*dev|pip install", final)
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-\w+$", TEXT, re.MULTILINE)
    cpu, cuda = (
        re.sub(r"TORCH_INDEX=\S*\n", "", STAGES[name]).split("\n\n")[0].strip() for name in ("build-cpu", "build-cuda")
    )
    assert cpu == cuda, "only the index of torch differs"
    assert TEXT.count("--require-hashes --requirement infra/requirements.txt") == 2


def pinned(file):
    """Versions by name of package."""
    lines = (ROOT / file).read_text().splitlines()
    pairs = (line.rstrip(" \\").split("==") for line in lines if re.match(r"[A-Za-z0-9]", line))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_requirements_have_hashes_and_the_tested_versions():
    versions, tested = pinned("infra/requirements.txt"), pinned("constraints.txt")
    differ = {name for name, version in versions.items() if tested.get(name, version) != version}
    assert not differ
    text = (ROOT / "infra" / "requirements.txt").read_text()
    entries = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]
    assert len(entries) == len(versions)
    assert all("--hash=sha256:" in entry for entry in entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("s3", "gcs", "azure", "openvino")]
    needed = {re.match(r"[\w-]+", item)[0] for item in sum(extras, project["dependencies"])}
    assert needed - set(versions) == {"torch"}


def test_dockerignore_matches_copied_files():
    """The build context contains exactly the copied files: no data, no keys, no Git history."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE) for name in line.split()[:-1]}
    assert copied == allowed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_install_steps_give_working_package(tmp_path):
    """Runs the Dockerfile's RUN lines with another path for /opt/venv and torch from pip's default index."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    (run,) = re.findall(r"^RUN (.*?[^\\])$", STAGES["build-cpu"], re.MULTILINE | re.DOTALL)
    run = run.replace("/opt/venv", str(venv)).replace("python -m venv", f"{sys.executable} -m venv")
    environment = {**os.environ, "TORCH_INDEX": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        ["bash", "-ec", run], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for command in (["pipelines", "score", "--help"], ["python", "-m", "ray_jobs.score"], ["ray", "--version"]):
        command[0] = str(venv / "bin" / command[0])
        there = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "usage" in there.stdout + there.stderr or "version 2.60.0" in there.stdout, there.stderr[-2000:]
    imports = "import gcsfs, adlfs, s3fs, torch, pipelines.on_ray.serve.app, pipelines.on_ray.train"
    subprocess.run([str(venv / "bin" / "python"), "-c", imports], check=True, cwd=tmp_path, timeout=300)
