"""A server under load: thresholds and models change, replicas start, stop and die, and requests are answered."""

import contextlib
import threading

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from pipelines.errors import SettingsError
from pipelines.on_ray.serve.app import application
from pipelines.on_ray.serve.autoscaling import autoscaling_of, replicas_needed
from pipelines.on_ray.serve.proxy import check_proxy
from pipelines.on_ray.serve.run import start_proxies
from pipelines.serving.job import ServeJob
from pipelines.serving.settings import ServeSettings
from pipelines.settings import DecisionSettings
from tests import tiny
from tests.jobs import free_port, wait_until

APP = "operations"


class Load:
    """Sends requests from several threads and collects the answers and failures."""

    def __init__(self, url, *, threads=3, text="hello there"):
        self.answers, self.failures = [], []
        self._url, self._text, self._is_over = url, text, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self):
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._is_over.is_set():
                try:
                    answer = client.post("/v1/predict", json={"inputs": [self._text]})
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code == 200:
                    self.answers.append(answer.json())
                else:
                    self.failures.append(answer.text)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def url(local_ray):
    """The URL of this module's applications."""
    serve.shutdown()
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, emails):
    """A newer version of the model with other weights."""
    path = tmp_path_factory.mktemp("other") / "spam"
    path.mkdir()
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.4,))
    return tiny.model_folder(path, emails["text"].to_pylist()[40:80], decision)


def run(folder, **values):
    values = {"model": str(folder.path), "dtype": "float32", "device": "cpu", "num_threads": 1, **values}
    serve.run(application(ServeJob.parse(values)), name=APP, route_prefix="/")


def deploy(folder, **user_config):
    """Deploy from a configuration, like `serve deploy` and KubeRay."""
    args = {"model": str(folder.path), "dtype": "float32", "device": "cpu", "num_threads": 1}
    predictor = {"name": "predictor", "user_config": user_config}
    app = {"name": APP, "route_prefix": "/", "import_path": "pipelines.on_ray.serve.app:build", "args": args,
           "deployments": [predictor]}  # fmt: skip
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [app]}))
    wait_until(lambda: serve.status().applications[APP].status == "RUNNING")


def replicas():
    """The number of running replicas of the deployment."""
    (deployment,) = serve.status().applications[APP].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def test_thresholds_change_without_restart(url, spam_folder):
    deploy(spam_folder)
    before = httpx.get(f"{url}/info").json()
    with Load(url) as load:
        wait_until(lambda: len(load.answers) > 20)
        deploy(spam_folder, thresholds={"spam": 0.9})
        wait_until(lambda: load.answers[-1]["predictions"][0]["thresholds"] == {"spam": pytest.approx(0.9)})
    assert load.failures == []
    assert load.answers[0]["predictions"][0]["thresholds"] == {"spam": pytest.approx(0.4)}
    after = httpx.get(f"{url}/info").json()
    assert after["replica"] == before["replica"], "the same replica process still runs"
    assert after["decision"]["thresholds"] == [pytest.approx(0.9)]
    with pytest.raises(SettingsError, match="allowed labels: spam"):
        run(spam_folder, thresholds={"eggs": 0.9})


def test_model_update_loses_no_request(url, spam_folder, other_folder):
    run(spam_folder)
    with Load(url) as load:
        wait_until(lambda: len(load.answers) > 20)
        run(other_folder)
        wait_until(lambda: load.answers[-1]["model_hash"] == other_folder.weights_hash)
        count = len(load.answers)
        wait_until(lambda: len(load.answers) > count + 20)
    assert load.failures == []
    assert {answer["model_hash"] for answer in load.answers} == {spam_folder.weights_hash, other_folder.weights_hash}
    assert {answer["model_hash"] for answer in load.answers[count:]} == {other_folder.weights_hash}


def test_killed_replica_loses_only_its_requests(url, spam_folder):
    run(spam_folder, num_replicas=2)
    with Load(url, threads=4) as load:
        wait_until(lambda: len(load.answers) > 40)
        victim = httpx.get(f"{url}/info").json()["replica"]
        with contextlib.suppress(Exception):
            ray.kill(ray.get_actor(f"SERVE_REPLICA::{APP}#predictor#{victim}", namespace="serve"))
        count = len(load.answers)
        wait_until(lambda: replicas() == 2 and len(load.answers) > count + 100)
    assert len(load.failures) <= 4, "at most one failure per thread"
    scores = [answer["predictions"][0]["score"] for answer in load.answers]
    assert max(scores) - min(scores) < 1e-5, "all answers have the same score"


@pytest.mark.slow
def test_autoscaling_follows_load(url, spam_folder):
    run(spam_folder, num_replicas="1:2", target_queued_tokens=500, upscale_delay_s=1, downscale_delay_s=3)
    assert replicas() == 1
    with Load(url, threads=6, text="word " * 3000) as load:
        wait_until(lambda: replicas() == 2)
    assert load.failures == []
    wait_until(lambda: replicas() == 1)
    assert httpx.post(f"{url}/v1/predict", json={"inputs": ["still there"]}).status_code == 200


@pytest.mark.slow
def test_scale_to_zero_and_back(url, spam_folder):
    run(spam_folder, num_replicas="0:1", upscale_delay_s=0, downscale_delay_s=1)
    wait_until(lambda: replicas() == 0)
    answer = httpx.post(f"{url}/v1/predict", json={"inputs": ["who is there"]}, timeout=60)
    assert answer.status_code == 200


def test_second_server_reports_first_address(url):
    assert start_proxies(ServeSettings(port=1)).endswith("that already runs on this cluster, not on 127.0.0.1:1")
    assert httpx.get(f"{url}/-/healthz").status_code == 200


def test_replicas_needed():
    assert replicas_needed(0, 0.0, 1000) == 0
    assert replicas_needed(0, 0.1, 1000) == 1
    assert replicas_needed(0, 1.7, 1000) == 3, "a replica is busy at most 80 % of the time"
    assert replicas_needed(4001, 1.7, 1000) == 5
    assert autoscaling_of(ServeSettings(num_replicas=3)) is None
    found = autoscaling_of(ServeSettings(num_replicas="0:4"))
    assert (found.min_replicas, found.initial_replicas, found.max_replicas) == (0, 1, 4)
    for bad in (0, "0:0", "2:1", "few"):
        with pytest.raises(SettingsError, match="num_replicas="):
            ServeSettings(num_replicas=bad)


def test_haproxy_needs_environment_variables(monkeypatch):
    check_proxy("python")
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    with pytest.raises(SettingsError, match="needs RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1"):
        check_proxy("haproxy")
