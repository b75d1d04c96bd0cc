"""cluster.yaml and infra/onprem.yaml: Ray's validation, documented properties, scaling from zero and back."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests import tiny
from tests.infra.paths import ROOT
from tests.jobs import clean_environment

LAUNCHED = {"cluster.yaml": ROOT / "cluster.yaml", "onprem.yaml": ROOT / "infra" / "onprem.yaml"}


@pytest.fixture(params=LAUNCHED)
def config(request):
    return yaml.safe_load(LAUNCHED[request.param].read_text())


def validate(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    return validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_launcher_validates_config(config):
    validate(config)
    with pytest.raises(Exception, match="max_worker"):
        validate({**config, "max_worker": 3})
    with pytest.raises(Exception, match=r"image_"):
        validate({**config, "docker": {**config["docker"], "image_": "x"}})


def test_token_auth_and_local_dashboard(config):
    starts = [
        command
        for commands in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[commands]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any("auth_token" in source for source in config["file_mounts"].values())


def test_image_versions_match_project(config):
    image = config["docker"]["image"]
    from pipelines import __version__

    assert (
        f":{__version__}-" in image
        or "ray==" + image.split(":")[1].split("-")[0] in (ROOT / "constraints.txt").read_text()
    )


def test_aws_scaling_and_spot_priority():
    types = yaml.safe_load(LAUNCHED["cluster.yaml"].read_text())["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    workers = {name: shape for name, shape in types.items() if name != "head"}
    assert all(shape["min_workers"] == 0 for shape in workers.values())
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["gpu"]["node_config"]
    assert types["gpu-spot"]["resources"] == types["gpu"]["resources"]
    assert types["gpu-spot"]["priority"] > types["gpu"]["priority"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_gpu_node_scales_up_and_down(tmp_path, emails, capsys):
    from pipelines.settings import DecisionSettings

    model = tmp_path / "spam"
    model.mkdir()
    tiny.model_folder(model, emails["text"].to_pylist()[:40], DecisionSettings(labels=("ham", "spam")))
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 20), tmp_path / "in" / "a.parquet")
    environment = clean_environment()
    environment["RAY_AUTH_MODE"] = "disabled"  # for the head and the driver
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.infra.autoscaling", str(model), str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=380, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    log = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    with capsys.disabled():
        print("", *(json.dumps(line) for line in log), sep="\n")
    seen = [line["nodes"] for line in log if line["what"] == "nodes"]
    assert seen[0] == ["head"]
    assert any("gpu" in nodes for nodes in seen)
    assert next(line for line in log if line["what"] == "done")["rows"] == 20
    assert log[-1]["nodes"] == ["head"]
    assert "the cluster has 0 GPU" in done.stderr
