"""The rendered manifests: their schemas, a planted typo in each kind, and their documented properties."""

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipelines.bulk.job import ScoreJob
from pipelines.errors import SettingsError
from pipelines.fields import parse
from pipelines.on_ray.serve.app import build
from pipelines.on_ray.serve.autoscaling import autoscaling_of
from pipelines.on_ray.serve.proxy import DEFAULTS, HAPROXY
from pipelines.serving.job import ServeJob
from pipelines.settings import DataSettings, ScoreSettings
from pipelines.training.job import TrainJob
from tests.infra.paths import KUBERAY, OVERLAYS, ROOT

SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "crds"))
KUBERNETES = "1.33"
DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"no KubeRay schemas at {SCHEMAS} (KUBERAY_SCHEMAS)")
TYPOS = {
    "RayCluster": ("spec.workerGroupSpecs.0", "maxReplica"),
    "RayJob": ("spec", "shutdownAfterJobFinish"),
    "RayService": ("spec.upgradeStrategy", "kind"),
    "CronJob": ("spec.jobTemplate.spec", "backofLimit"),
    "NetworkPolicy": ("spec", "ingres"),
    "PodDisruptionBudget": ("spec", "maxUnavailible"),
    "StatefulSet": ("spec.template.spec.containers.0", "imagee"),
    "Service": ("spec", "port"),
    "ServiceAccount": ("metadata", "lables"),
    "Namespace": ("metadata", "lables"),
    "ConfigMap": ("metadata", "lables"),
}


def problem(manifest):
    """The first schema error of a manifest, or None."""
    if manifest["apiVersion"] == "ray.io/v1":
        schema = json.loads((SCHEMAS / f"{manifest['kind'].lower()}.schema.json").read_text())
        errors = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]
        return errors[0] if errors else None
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return error.message
    return None


def inside(node, path):
    for name in path.split("."):
        node = node[int(name)] if name.isdigit() else node[name]
    return node


def of_kind(manifests, kind):
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


def walk(node):
    """Every mapping inside a node."""
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(value)


def pods(manifests):
    """The spec of every pod."""
    return [spec for manifest in manifests for spec in walk(manifest) if "containers" in spec]


@needs_schemas
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_fit_schemas(rendered, overlay):
    for manifest in rendered[overlay]:
        assert problem(manifest) is None, manifest["kind"]


@needs_schemas
def test_typo_is_caught_in_each_manifest_kind(rendered):
    kinds = {manifest["kind"]: manifest for manifests in rendered.values() for manifest in manifests}
    assert set(kinds) == set(TYPOS)
    for kind, (where, name) in TYPOS.items():
        typo = copy.deepcopy(kinds[kind])
        inside(typo, where)[name] = 3
        assert problem(typo), f"{kind} {where}.{name}"


def test_kustomize_refuses_typo(kubectl, tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / "score" / "kustomization.yaml"
    file.write_text(file.read_text().replace("resources:", "resorces:"))
    done = subprocess.run([kubectl, "kustomize", str(file.parent)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "resorces" in done.stderr


def test_jobs_use_existing_modules_and_settings(rendered):
    for overlay, request in (("score", ScoreJob), ("train", TrainJob), ("cluster", ScoreJob)):
        content = yaml.safe_load(
            of_kind(rendered[overlay], "ConfigMap")["data"][f"{overlay}.yaml".replace("cluster", "score")]
        )
        request.parse(content)
        with pytest.raises(Exception, match="unknown setting 'inptu'"):
            request.parse({**content, "inptu": "x"})
        command = json.dumps(rendered[overlay])
        python, module, path = re.search(r"(python) -m (\S+) (/settings/\S+\.yaml)", command).groups()
        assert python
        assert importlib.util.find_spec(module)
        assert Path(path).name in of_kind(rendered[overlay], "ConfigMap")["data"]
        mounts = [
            mount["mountPath"] for spec in pods(rendered[overlay]) for mount in spec["containers"][0]["volumeMounts"]
        ]
        assert "/settings" in mounts


def test_rows_in_error_do_not_fail_a_scoring_job(rendered):
    for overlay in ("score", "cluster"):
        assert "ray_jobs.score /settings/score.yaml || test $? -eq 3" in json.dumps(rendered[overlay])
    for code, expected in ((0, 0), (3, 0), (1, 1), (2, 1)):
        done = subprocess.run(
            f"{sys.executable} -c 'raise SystemExit({code})' || test $? -eq 3", shell=True, check=False
        )
        assert done.returncode == expected


def serve_config(rendered):
    return yaml.safe_load(of_kind(rendered["serve"], "RayService")["spec"]["serveConfigV2"])


def strict(schema):
    """The same JSON schema with unknown keys refused. Serve itself ignores unknown keys."""
    for node in walk(schema):
        if "properties" in node:
            node.setdefault("additionalProperties", False)
    return schema


def test_serve_config_fits_schema(rendered):
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(rendered)
    schema = strict(ServeDeploySchema.model_json_schema())
    ServeDeploySchema.model_validate(config)
    jsonschema.validate(config, schema)
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    job = ServeJob.parse(application["args"])
    assert job.serve.proxy == "haproxy"
    with pytest.raises(SettingsError, match="set api_keys"):  # the repository's config has no keys
        build(application["args"])
    for spec in pods(rendered["serve"]):
        for container in spec["containers"]:
            if container["name"] in ("ray-head", "ray-worker"):
                given = {variable["name"]: variable["value"] for variable in container["env"]}
                assert (HAPROXY | DEFAULTS).items() <= given.items()
    assert autoscaling_of(job.serve).max_replicas == 8
    assert application["deployments"][0]["name"] == "predictor"
    for place in ("", "http_options", "applications.0", "applications.0.deployments.0"):
        typo = copy.deepcopy(config)
        (inside(typo, place) if place else typo)["num_replica"] = 3
        with pytest.raises(jsonschema.ValidationError, match="num_replica"):
            jsonschema.validate(typo, schema)
    with pytest.raises(Exception, match="unknown setting 'modle'"):
        ServeJob.parse({"modle": "x"})


def test_shutdown_timeouts_are_ordered(rendered):
    """Order of the timeouts: request, replica, pod, old cluster of an upgrade."""
    config, service = serve_config(rendered), of_kind(rendered["serve"], "RayService")["spec"]
    drain = config["applications"][0]["deployments"][0]["graceful_shutdown_timeout_s"]
    workers = service["rayClusterConfig"]["workerGroupSpecs"]
    pod = min(group["template"]["spec"]["terminationGracePeriodSeconds"] for group in workers)
    assert config["http_options"]["request_timeout_s"] < drain < pod < service["rayClusterDeletionDelaySeconds"]


def test_clusters_use_tokens_and_scale_from_zero(rendered):
    keys = {
        "cluster": "spec",
        "train": "spec.rayClusterSpec",
        "score": "spec.rayClusterSpec",
        "serve": "spec.rayClusterConfig",
    }
    specs = []
    for overlay, path in keys.items():
        (manifest,) = [found for found in rendered[overlay] if found["apiVersion"] == "ray.io/v1"]
        specs.append(copy.deepcopy(inside(manifest, path)))
    redis = specs[-1].pop("gcsFaultToleranceOptions")
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert all(spec == specs[0] for spec in specs), "all overlays have the same cluster spec"
    (spec, *_) = specs
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 0, 0]
    spot, demand = spec["workerGroupSpecs"][1:]
    assert spot["priority"] > demand["priority"]
    assert spot["template"]["spec"]["containers"] == demand["template"]["spec"]["containers"]


def test_image_versions_match_project(rendered):
    from pipelines import __version__

    for overlay, manifests in rendered.items():
        text = json.dumps(manifests)
        for tag in re.findall(r"/ray-text-classification:(\d[\d.]*)-(cpu|cuda)", text):
            assert tag[0] == __version__, overlay
            assert f"AS {tag[1]}" in DOCKERFILE
        assert '"image": "ray-text-classification"' not in text, "every image has a registry and a tag"
        assert re.search(r'"rayVersion": "([\d.]+)"', text).group(1) in (ROOT / "constraints.txt").read_text()


def test_pods_are_locked_down(rendered):
    for overlay, manifests in rendered.items():
        for spec in pods(manifests):
            user = spec["securityContext"]
            assert user["runAsNonRoot"], overlay
            assert user["runAsUser"] > 0
            assert user["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in spec["containers"]:
                lock = container["securityContext"]
                assert lock["readOnlyRootFilesystem"]
                assert not lock["allowPrivilegeEscalation"]
                assert lock["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"]["memory"]
                assert "/" not in {mount["mountPath"] for mount in container["volumeMounts"]}
        namespace = of_kind(manifests, "Namespace")["metadata"]["labels"]
        assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
        clusters = [
            node["autoscalerOptions"]
            for manifest in manifests
            for node in walk(manifest)
            if "autoscalerOptions" in node
        ]
        assert all(options["securityContext"]["readOnlyRootFilesystem"] for options in clusters)


def test_network_policies(rendered):
    """Allowed ingress: own pods, the operator to the dashboard, Prometheus, and in serve/ clients to Serve's port."""
    for overlay, manifests in rendered.items():
        policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
        ours = {"app.kubernetes.io/part-of": "text-classification"}
        assert policies["ray"]["podSelector"] == {"matchLabels": ours}
        assert policies["ray"]["policyTypes"] == ["Ingress", "Egress"]
        own, operator, prometheus = policies["ray"]["ingress"]
        assert own == {"from": [{"podSelector": {"matchLabels": ours}}]}
        assert [port["port"] for port in operator["ports"]] == [8265]
        assert [port["port"] for port in prometheus["ports"]] == [8080]
        opened = [
            port["port"]
            for name, spec in policies.items()
            if name == "serve"
            for rule in spec["ingress"]
            for port in rule["ports"]
        ]
        assert opened == ([8000] if overlay == "serve" else [])
        labels = [
            m["metadata"]["labels"]
            for manifest in manifests
            for m in walk(manifest)
            if "spec" in m and "containers" in m["spec"]
        ]
        assert all(ours.items() <= found.items() or found == {"app": "redis"} for found in labels)


def test_paths_variables_and_flags_exist(rendered):
    """Mounted paths exist in the image, variables are read, and start parameters are options of `ray start`."""
    folders = set(re.findall(r"(?:HOME|XDG_CACHE_HOME)=(\S+)", DOCKERFILE)) | {"/dev/shm", "/settings", "/data"}
    options = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for manifests in rendered.values():
        for spec in pods(manifests):
            for container in spec["containers"]:
                assert {mount["mountPath"] for mount in container["volumeMounts"]} <= folders
                for variable in container.get("env", []):
                    assert is_read(variable["name"], container), variable["name"]
        for node in walk(manifests):
            for name in node.get("rayStartParams", {}):
                assert f"--{name} " in options or f"--{name}\n" in options, name


def is_read(variable, container):
    """Whether the container's command or Ray reads a variable."""
    if f"${variable}" in json.dumps(container.get("command", [])):
        return True
    import ray

    root = Path(ray.__file__).parent
    sources = [file for room in ("_private", "dashboard", "serve/_private") for file in (root / room).glob("**/*.py")]
    return any(variable in file.read_text() for file in sources)


def test_nightly_job_appends_scores(rendered):
    content = yaml.safe_load(of_kind(rendered["cluster"], "ConfigMap")["data"]["score.yaml"])
    settings, _ = parse(
        {k: v for k, v in content.items() if k not in ("model", "input", "output")}, ScoreSettings, DataSettings
    )
    assert settings.append
