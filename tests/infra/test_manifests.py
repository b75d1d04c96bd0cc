"""Every manifest against the schema of the thing that will read it, and with a typo planted in each."""

import copy
import importlib
import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipelines.fields import parse
from pipelines.settings import (
    ComputeSettings,
    DataSettings,
    ScorePaths,
    ScoreSettings,
    ServePaths,
    ServeSettings,
)

ROOT = Path(__file__).parent.parent.parent
SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "crds"))
MANIFESTS = sorted((ROOT / "infra" / "kuberay").glob("*.yaml"))
needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"no KubeRay schemas at {SCHEMAS} (KUBERAY_SCHEMAS)")


def ray_objects():
    for path in MANIFESTS:
        for manifest in yaml.safe_load_all(path.read_text()):
            if manifest["apiVersion"] == "ray.io/v1":
                yield pytest.param(manifest, id=f"{path.name}-{manifest['kind']}")


def problems(manifest):
    schema = json.loads((SCHEMAS / f"{manifest['kind'].lower()}.schema.json").read_text())
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]


@needs_schemas
@pytest.mark.parametrize("manifest", list(ray_objects()))
def test_manifests_fit_kuberays_schemas(manifest):
    assert problems(manifest) == []
    typo = copy.deepcopy(manifest)
    cluster = typo["spec"].get("rayClusterSpec") or typo["spec"]["rayClusterConfig"]
    cluster["workerGroupSpecs"][0]["maxReplica"] = 3
    assert problems(typo), "a planted typo is caught"


def test_the_score_job_runs_what_exists_with_settings_that_exist():
    settings, job = yaml.safe_load_all((ROOT / "infra/kuberay/rayjob-score.yaml").read_text())
    python, flag, module, path = job["spec"]["entrypoint"].split()
    assert (python, flag) == ("python", "-m")
    assert importlib.util.find_spec(module)
    values = yaml.safe_load(settings["data"][Path(path).name])
    parse(values, ScorePaths, DataSettings, ScoreSettings, ComputeSettings)
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["containers"][0]["volumeMounts"][0]["mountPath"] == str(Path(path).parent)


def test_the_serve_config_fits_serves_schema_and_names_what_exists():
    from ray.serve.schema import ServeDeploySchema

    (service,) = yaml.safe_load_all((ROOT / "infra/kuberay/rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config) if hasattr(ServeDeploySchema, "model_validate") else ServeDeploySchema(
        **config
    )
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    parse(application["args"], ServePaths, ServeSettings, ComputeSettings)


def test_every_container_demands_a_token():
    for path in MANIFESTS:
        for manifest in yaml.safe_load_all(path.read_text()):
            for container in containers(manifest):
                assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"], path.name


def containers(node):
    if isinstance(node, dict):
        yield from node.get("containers", [])
        for value in node.values():
            yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def test_cluster_yaml_passes_rays_own_validation():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**config, "max_worker": 3}))
