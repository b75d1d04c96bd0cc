"""Dashboards and alert rules name only metrics that are exported, and Prometheus can read them."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from pipelines.bulk.job import check_job
from pipelines.bulk.score import run_job, score_units_here
from pipelines.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS
from pipelines.training.corpus import Corpus
from pipelines.training.fit import fit
from tests.infra.paths import KUBERAY, ROOT
from tests.jobs import score_job
from tests.training.runs import make_job

DASHBOARDS = sorted((ROOT / "infra" / "grafana").glob("*.json"))
ALERTS = ROOT / "infra" / "prometheus" / "alerts.yaml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool on PATH (package prometheus)")


def rules():
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def expressions():
    """Every query of the dashboards and of the alerts."""
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [rule["expr"] for rule in rules()]


@pytest.fixture(scope="module")
def exported(spam_folder, input_folder, emails, tmp_path_factory):
    """The names of all metrics, from the code that exports them."""
    folder = tmp_path_factory.mktemp("exported")
    numbers = {}
    run_job(
        check_job(score_job(spam_folder, input_folder, folder / "out")), score_units_here, on_numbers=numbers.update
    )
    names = {f"ray_pipelines_score_{name}" for name in numbers}
    job, train, valid = make_job(folder, emails)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.progress.PROGRESS_SECONDS", 0)
        found = {}
        fit(job, Corpus.of(train), Corpus.of(valid), on_metrics=found.update)
    names |= {f"ray_pipelines_train_{name}" for name in found}
    names |= {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    return names | {f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}


def test_every_metric_is_exported(exported):
    text = "\n".join(expressions())
    named = set(re.findall(r"ray_pipelines_\w+", re.sub(r"~\"[^\"]*\"", "", text)))
    assert len(named) > 15
    assert named <= exported
    (pattern,) = re.findall(r"__name__=~\"([^\"]+)\"", text)
    assert any(re.fullmatch(pattern, name) for name in exported)


def test_documented_names_are_exported(exported):
    text = (ROOT / "docs" / "hooks.py").read_text()
    names = re.findall(r'^    "((?:score|train)_[a-z_]+)": "', text, re.MULTILINE)
    found = {name.removeprefix("ray_pipelines_") for name in exported if "_valid_" not in name}
    of_jobs = {name for name in found if re.fullmatch(r"(score|train)_\w+", name)} - {
        f"score_{part}" for part in ("bucket", "sum", "count")
    }
    assert set(names) == of_jobs


def test_alerts_say_what_to_do():
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 8
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert len(rule["annotations"]["runbook"]) > 40
        assert rule["annotations"]["summary"]


def test_dashboards_have_a_data_source_to_choose_and_no_overlap():
    assert [path.stem for path in DASHBOARDS] == ["score", "serve", "train"]
    for path in DASHBOARDS:
        content = json.loads(path.read_text())
        assert content["templating"]["list"][0]["type"] == "datasource"
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in content["panels"]]
        assert len(set(places)) == len(places)
        assert len({panel["id"] for panel in content["panels"]}) == len(places)


def test_rules_on_kubernetes_are_the_same(render):
    objects = {one["kind"]: one for one in render(KUBERAY / "monitoring")}
    assert objects["PrometheusRule"]["spec"] == yaml.safe_load(ALERTS.read_text())
    monitor = objects["PodMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"] == {"app.kubernetes.io/part-of": "text-classification"}
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]


@pytest.mark.parametrize("overlay", ["cluster", "score", "train", "serve"])
def test_metrics_ports_have_a_name_and_only_prometheus_reaches_them(rendered, overlay):
    manifests = rendered[overlay]
    ray = [one for one in manifests if one["kind"] in ("RayCluster", "RayJob", "RayService")]
    text = json.dumps(ray)
    assert text.count('"metrics-export-port": "8080"') == text.count('"name": "metrics"') >= 4
    policy = next(one for one in manifests if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "ray")
    opened = [rule for rule in policy["spec"]["ingress"] if {"port": 8080, "protocol": "TCP"} in rule.get("ports", [])]
    assert [list(source) for rule in opened for source in rule["from"]] == [["namespaceSelector"]]


@needs_promtool
def test_prometheus_reads_rules_and_queries(tmp_path):
    subprocess.run([PROMTOOL, "check", "rules", str(ALERTS)], check=True, capture_output=True)
    recorded = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(expressions())]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    done = subprocess.run([PROMTOOL, "check", "rules", str(tmp_path / "queries.yaml")], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
