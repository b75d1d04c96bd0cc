import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError, JobError, ModelFolderError, OutputError, SettingsError
from pipelines.model_folder import read_model_folder
from pipelines.offline import score_labelled
from pipelines.on_ray.score import ScoreJob, score
from pipelines.on_ray.train import TrainRequest, _part_bytes, train
from pipelines.settings import ComputeSettings, DataSettings
from pipelines.shards import InputFile
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory, emails):
    """Pretrained weights without dropout, and a training folder of two shards."""
    folder = tmp_path_factory.mktemp("train")
    tiny.classifier(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                    initializer_range=0.1).save_pretrained(folder / "base")  # fmt: skip
    tiny.save_tokenizer(folder / "base", emails["text"].to_pylist()[:40])
    (folder / "data").mkdir()
    texts = [text[:300] for text in emails["text"].to_pylist()[:60]]
    texts[5] = None
    for shard in range(2):
        rows = slice(shard * 30, shard * 30 + 30)
        table = pa.table({"text": texts[rows], "label": emails["label"].to_pylist()[rows]})
        pq.write_table(table, folder / "data" / f"{shard}.parquet", row_group_size=8)
    return folder


def request(base, output, **settings):
    values = {
        "train": str(base / "data"),
        "valid": str(base / "data" / "1.parquet"),
        "model": str(base / "base"),
        "output": str(output),
        "kind": "binary",
        "epochs": 1,
        "batch_size": 5,
        "max_length": 32,
        "learning_rate": 1e-3,
        "train_dtype": "float32",
        "dtype": "float32",
        "device": "cpu",
        "weight": [1, 4],
    }
    return TrainRequest.parse({**values, **settings})


@pytest.mark.usefixtures("local_ray")
def test_workers_take_the_same_steps_as_none(base, tmp_path):
    lines, summaries = [], []
    for num_workers in (0, 2, 4):
        logs = {"tensorboard_dir": str(tmp_path / f"logs-{num_workers}"), "logging_steps": 3}
        settings = request(base, tmp_path / str(num_workers), num_workers=num_workers, shuffle_buffer=30, **logs)
        summaries.append(train(settings, report=lines.append))
    assert [summary["workers"] for summary in summaries] == [1, 2, 4]
    assert [summary["rows_in_error"] for summary in summaries] == [1, 1, 1]
    for summary in summaries[1:]:
        np.testing.assert_allclose(summary["losses"][:15], summaries[0]["losses"][:15], rtol=2e-4)
        assert len(summary["losses"]) == len(summaries[0]["losses"])
    assert any("2 workers on CPUs" in line for line in lines)
    assert sum("valid mcc" in line for line in lines) == 3, "one line a run, relayed from the workers"
    assert read_model_folder(tmp_path / "2").metrics == summaries[1]["valid"]
    assert summaries[2]["valid"] == pytest.approx(summaries[1]["valid"], rel=1e-4)
    page = (tmp_path / "2" / "report.html").read_text()
    assert "valid mcc" in page
    assert "training fingerprint" in page
    assert "1.parquet row" in page, "documents are named by file and row"


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("fault", [None, "unit", "loss"])
def test_training_begins_before_all_is_tokenized(base, tmp_path, monkeypatch, fault):
    import pipelines.on_ray.train as module

    output, begun = tmp_path / "out", tmp_path / "begun"
    begun.mkdir()

    class Late(module.TokenizeStage):
        """Has the second half of the units wait for a checkpoint, which only training writes."""

        def __call__(self, units):
            for unit, table in zip(units, super().__call__(units), strict=True):
                yield table
                (begun / f"{len(self.text_columns)}-{unit.number}").touch()
                if len(list(begun.iterdir())) > 8:
                    deadline = time.monotonic() + 100
                    while not list(output.glob("checkpoints/*/training_state.json")):
                        assert time.monotonic() < deadline, "nobody trains"
                        time.sleep(0.1)
                    if fault == "unit":
                        raise ValueError("this unit is bad")

    settings = {"shuffle_buffer": 30, "save_steps": 1}
    expected = train(request(base, tmp_path / "alone", num_workers=0, **settings))
    monkeypatch.setattr(module, "TokenizeStage", Late)
    if fault is None:
        found = train(request(base, output, num_workers=1, **settings))
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-4)
        assert found["windows"] == expected["windows"]
        return
    if fault == "loss":
        settings |= {"learning_rate": 1e30, "warmup_ratio": 0.9}
    said = {
        "unit": "^tokenizing failed: .*this unit is bad$",
        "loss": "^the loss or its gradient is not finite at step",
    }[fault]
    with pytest.raises(JobError, match=said):
        train(request(base, output, num_workers=1, **settings))
    assert list(output.glob("checkpoints/*")), "what was trained is kept"


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_without_any_text_is_refused(base, tmp_path, num_workers):
    empty = pa.table({"text": pa.nulls(9, pa.string()), "label": ["ham", "spam", "ham"] * 3})
    pq.write_table(empty, tmp_path / "empty.parquet", write_statistics=False)
    with pytest.raises(DataError, match=r"empty\.parquet, column 'text': no row has a text"):
        train(request(base, tmp_path / "out", num_workers=num_workers, train=str(tmp_path / "empty.parquet")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_texts_that_are_all_null_are_refused_by_the_footers_alone(base, tmp_path, split):
    empty = pa.table({"text": pa.nulls(9, pa.string()), "label": ["ham", "spam", "ham"] * 3})
    pq.write_table(empty, tmp_path / "empty.parquet", row_group_size=4)
    asked = request(base, tmp_path / "out", num_workers=2, **{split: str(tmp_path / "empty.parquet")})
    with pytest.raises(DataError, match=r"empty\.parquet, column 'text': no row has a text"):
        train(asked, report=pytest.fail)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_pairs_are_trained_on_and_scored_as_pairs_alone(base, tmp_path, emails):
    texts = [text[:200] for text in emails["text"].to_pylist()[:24]]
    table = pa.table({"text": ["is it spam?"] * 24, "mail": texts, "label": emails["label"].slice(0, 24)})
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=8)
    pairs = {"train": str(tmp_path / "pairs.parquet"), "valid": None, "text_pair_column": "mail"}
    alone = train(request(base, tmp_path / "0", num_workers=0, **pairs))
    shared = train(request(base, tmp_path / "2", num_workers=2, **pairs))
    np.testing.assert_allclose(alone["losses"], shared["losses"], rtol=1e-4)
    assert alone["windows"] > 24, "the second text is cut into windows"
    folder = str(tmp_path / "2")
    scoring = {"model": folder, "input": pairs["train"], "output": str(tmp_path / "scored"), "replicas": 0}
    with pytest.raises(DataError, match="trained on pairs of texts: give the second too"):
        score(ScoreJob.parse(scoring))
    assert score(ScoreJob.parse({**scoring, "text_pair_column": "mail"}))["rows_in_error"] == 0
    data = DataSettings(text_pair_column="mail")
    _, found = score_labelled(folder, pairs["train"], data, ComputeSettings(device="cpu"), report=print)
    assert len(found.targets) == 24
    with pytest.raises(DataError, match="trained on pairs of texts"):
        score_labelled(folder, pairs["train"], DataSettings(), ComputeSettings(device="cpu"), report=print)


def test_settings_that_would_fail_or_be_passed_over_at_the_end_are_refused_at_once(base, tmp_path):
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, 2.0]}), numbers)
    for kind, settings, message in (
        ("regression", {"calibrate": True, "train": str(numbers), "valid": str(numbers)}, "needs probabilities"),
        ("multiclass", {"objective": "precision=0.9"}, "kind multiclass has not"),
        ("binary", {"objective": "precision"}, "is none of: f1, fbeta=B"),
    ):
        with pytest.raises(SettingsError, match=message):
            train(request(base, tmp_path / "out", kind=kind, weight=None, **settings))
    with pytest.raises(SettingsError, match="calibrate=True needs validation data"):
        train(request(base, tmp_path / "out", valid=None, calibrate=True))
    assert not (tmp_path / "out").exists()


def test_parts_are_small_enough_to_be_mixed():
    def of(rows, size):
        return [InputFile("a", "a", 1, "v", None, (rows,), (size,))]

    assert _part_bytes(of(1000, 10**12), 16_384, 512) == 16_384 * 512 * 4
    assert _part_bytes(of(600_000_000, 60 * 10**9), 16_384, 512) == 16_384 * 100
    assert _part_bytes(of(0, 0), 16_384, 512) == 1


@pytest.mark.usefixtures("local_ray")
def test_more_workers_than_a_local_ray_can_hold_are_refused(base, tmp_path):
    with pytest.raises(SettingsError, match="needs 500 CPU at once, and the local Ray has"):
        train(request(base, tmp_path / "out", num_workers=500, limit=10))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_relative_paths_mean_the_same_to_workers(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base)
    settings = {"train": "data", "valid": "data/1.parquet", "model": "base", "num_workers": 1, "limit": 20}
    summary = train(request(base, f"../{base.name}-relative", **settings))
    assert read_model_folder(base.parent / f"{base.name}-relative").metrics == summary["valid"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train": "{base}/none"}, DataError, "does not exist"),
        ({"text_column": "body"}, DataError, "has no column 'body'; it has: text, label"),
        ({"label_column": "class"}, DataError, "has no column 'class'; name the label column"),
        ({"labels": ["ham", "eggs"]}, DataError, "labels outside the label set: 'spam'"),
        ({"kind": "regression"}, DataError, "kind regression takes numbers"),
        ({"weight": [1, 2, 3]}, SettingsError, "weight has 3 values; there are 2 labels"),
        ({"pos_weight": [1, 2]}, SettingsError, "pos_weight is not for kind binary"),
        ({"thresholds": [0.1, 0.2]}, SettingsError, "thresholds has 2 values"),
        ({"stride": 0.99}, SettingsError, "steps 31 tokens .* would skip tokens"),
        ({"max_length": 4096}, SettingsError, "above the model's 130 positions"),
        ({"model": "{base}/data"}, ModelFolderError, r"has no config\.json"),
        ({"model": "no/such-model"}, ModelFolderError, "no/such-model"),
        ({"output": "{base}/data"}, OutputError, "is not empty; give a new folder"),
        ({"num_workers": "0:2"}, SettingsError, "minimum of 0"),
        ({"num_workers": "two"}, SettingsError, "neither a number nor MIN:MAX"),
    ],
)
def test_bad_requests_are_refused_before_any_work(base, tmp_path, settings, error, message):
    filled = {k: v.format(base=base) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(error, match=message):
        train(request(base, filled.pop("output", tmp_path / "out"), **filled))
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_a_filesystem_that_fails_ends_a_run_in_a_sentence(base, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"^training stopped: .*file.*; when that is mended, the same command goes on$"):
        train(request(base, tmp_path / "out", tensorboard_dir=str(tmp_path / "file" / "logs")))


def test_labels_that_training_never_saw_are_named_with_their_file(base, tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["ham", "eggs"]}), tmp_path / "valid.parquet")
    with pytest.raises(DataError, match=r"valid\.parquet: labels outside the label set: 'eggs'; the set is: ham, spam"):
        train(request(base, tmp_path / "out", valid=str(tmp_path / "valid.parquet")))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(200)
def test_workers_regress_stop_early_and_do_with_less_data_than_there_are_of_them(base, tmp_path):
    texts = pq.read_table(base / "data")["text"].to_pylist()
    years = [1900.0 + len(text or "") / 10 for text in texts]
    for name, rows in {"train": slice(6, 46), "valid": slice(50, 52), "few": slice(50, 52)}.items():
        pq.write_table(pa.table({"text": texts[rows], "label": years[rows]}), tmp_path / f"{name}.parquet")
    settings = {"kind": "regression", "weight": None, "epochs": 9, "window_weight": "document", "evaluate_steps": 3,
                "gradient_accumulation_steps": 2, "early_stopping_patience": 1, "learning_rate": 5e-3,
                "valid": str(tmp_path / "valid.parquet"), "train": str(tmp_path / "train.parquet")}  # fmt: skip
    alone = train(request(base, tmp_path / "alone", num_workers=0, **settings))
    shared = train(request(base, tmp_path / "shared", num_workers=3, **settings))
    assert alone["stopped_early"]
    assert shared["stopped_early"]
    np.testing.assert_allclose(shared["losses"], alone["losses"], rtol=1e-3, atol=1e-5)
    for one, other in zip(shared["evaluations"], alone["evaluations"], strict=True):
        defined = {name: value for name, value in other.items() if value is not None}
        assert {name: one[name] for name in defined} == pytest.approx(defined, rel=1e-3)
    few = {**settings, "train": str(tmp_path / "few.parquet"), "max_length": 128, "epochs": 1, "evaluate_steps": None}
    assert train(request(base, tmp_path / "few", num_workers=3, **few))["documents"] == 2


def test_one_class_only_and_pickles_are_refused(base, tmp_path):
    table = pq.read_table(base / "data")
    pq.write_table(table.filter(pa.compute.equal(table["label"], "ham")), tmp_path / "ham.parquet")
    with pytest.raises(DataError, match="the labels are all 'ham'"):
        train(request(base, tmp_path / "out", train=str(tmp_path / "ham.parquet"), weight=None))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelFolderError, match=r"as a pickle \(pytorch_model\.bin\)"):
        train(request(base, tmp_path / "out", model=str(pickled)))


@pytest.mark.timeout(200)
def test_a_run_that_waits_for_a_busy_cluster_says_so(local_ray, base, tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr("pipelines.on_ray.telemetry.WAIT_SECONDS", 0.5)
    monkeypatch.setattr("pipelines.on_ray.corpora.WAIT_SECONDS", 0.5)
    all_of_them = local_ray.cluster_resources()["CPU"]

    @local_ray.remote(num_cpus=0)
    class Others:
        def come(self):
            return True

    def hold():
        others = Others.options(num_cpus=all_of_them).remote()
        local_ray.get(others.come.remote())
        return others

    others, lines, parts = hold(), [], []
    asked = request(base, tmp_path / "out", num_workers=2)
    run = threading.Thread(target=lambda: parts.append(train(asked, report=lines.append)), daemon=True)
    run.start()

    def wait_for(text):
        deadline = time.monotonic() + 60
        while not any(text in line for line in lines):
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)

    wait_for(f"no unit is tokenized yet; the cluster has {all_of_them:g} CPU, of which 0 are free")
    wait_for(f"still waiting for 2 CPU, of which the cluster has {all_of_them:g} and 0 free")
    local_ray.kill(others)
    run.join(timeout=120)
    assert parts[0]["steps"] > 0
