"""`pipelines quantize`: an int8 folder keeps its contract, or is not written."""

import ctypes
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

import pipelines
from pipelines.bulk.estimate import estimate
from pipelines.bulk.job import ScoreJob, check_job
from pipelines.classification import ClassificationModel
from pipelines.cli import main
from pipelines.errors import JobError, ModelFolderError, OutputError, SettingsError
from pipelines.evaluation import quantizing
from pipelines.evaluation.labelled import labelled_input
from pipelines.evaluation.quantizing import QuantizeOptions, _Reference
from pipelines.model.openvino_model import OpenVinoModel
from pipelines.model_folder import read_model_folder, seal
from pipelines.settings import ComputeSettings, DataSettings
from tests import tiny

pytest.importorskip("nncf", reason="in the quantize extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of NNCF's own code


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = signal_stack()
    yield
    assert signal_stack() == before
    logging.getLogger("nncf").handlers.clear()


class Stack(ctypes.Structure):
    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack():
    """Return where this thread handles signals. OpenVINO moves that, and may leave it at a place that is gone."""
    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.place, stack.size


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, folders):
    """For each kind: a folder, and a file of emails with labels, if possible those that the model gives."""
    from tests.conftest import EMAILS

    emails = pq.read_table(EMAILS / "test").slice(0, 120)
    found = {}
    for kind, folder in folders.items():
        place = tmp_path_factory.mktemp(kind)
        column = {"multilabel": "predicted_labels", "regression": "predicted_value"}.get(folder.decision.kind)
        scored = pipelines.score(folder.path, emails.select(["text"]), dtype="float32")
        labels = emails["label"] if kind in ("binary", "vote") else scored[column or "predicted_label"]
        table = pa.table({"text": emails["text"], "label": labels})
        pq.write_table(table, place / "labelled.parquet")
        found[kind] = (folder.path, str(place / "labelled.parquet"))
    return found


def quantized(folder, new, data, **options):
    return pipelines.quantize(folder, new, data, **options)


def test_every_kind_becomes_an_int8_folder_that_is_scored_and_evaluated(labelled, tmp_path, emails):
    for kind, (folder, data) in labelled.items():
        if kind == "vote":  # as binary
            continue
        new = tmp_path / kind
        result = quantized(folder, new, data, max_label_changes=0.2, max_drop=0.9)
        assert result.documents == 120
        assert result.layers_int8 > 5
        assert 0 < result.largest_shift < 0.5
        opened = read_model_folder(new)
        assert opened.quantization["label_changes"] == result.label_changes
        assert opened.decision == read_model_folder(folder).decision
        assert opened.measured == {
            "documents": 120,
            "fingerprint": labelled_input(data, DataSettings(), opened.decision).fingerprint,
        }
        assert not list(new.glob("*.safetensors"))
        scorer = pipelines.Scorer.load(new)
        assert scorer.model.dtype_name == "int8"
        before = pipelines.score(folder, emails.slice(0, 120).select(["text"]), dtype="float32")
        after = pipelines.score(new, emails.slice(0, 120).select(["text"]))
        name = "predicted_labels" if kind == "multilabel" else "predicted_label"
        if name in before.column_names:
            pairs = zip(before[name].to_pylist(), after[name].to_pylist(), strict=True)
            changes = sum(one != other for one, other in pairs)
            assert changes == result.label_changes
        metrics = pipelines.evaluate(new, data).metrics
        assert metrics[result.metric] == pytest.approx(result.metric_after, abs=1e-6)


def test_broken_contract_is_refused_with_the_numbers_and_nothing_is_written(labelled, tmp_path):
    folder, data = labelled["regression"]
    with pytest.raises(JobError, match=r"rmse goes from 0 to ") as caught:
        quantized(folder, tmp_path / "new", data, max_drop=1e-6, limit=30)
    assert "Nothing was written" in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".new-*"))


def test_layer_with_outliers_is_left_alone_or_the_model_is_refused(labelled, tmp_path, emails):
    folder, _ = labelled["multiclass"]
    path = tmp_path / "sabotaged"
    path.mkdir()
    texts = emails["text"].to_pylist()
    tiny.model_folder(path, texts[:40], read_model_folder(folder).decision)
    weights = load_file(path / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    weights[name][::7] *= 100
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    sealed = seal(read_model_folder(path))
    table = pa.table({"text": texts[:120]})
    scored = pipelines.score(path, table, dtype="float32")
    rows = pa.table({"text": table["text"], "label": scored["predicted_label"]})
    try:
        result = quantized(path, tmp_path / "new", rows, max_label_changes=0.02, max_drop=0.05)
    except JobError as error:
        assert "labels change" in str(error) or "goes from" in str(error)  # noqa: PT017
        assert not (tmp_path / "new").exists()
        return
    assert sealed.decision.kind == "multiclass"
    assert result.label_changes <= 2
    again = pipelines.score(tmp_path / "new", table)
    pairs = zip(scored["predicted_label"].to_pylist(), again["predicted_label"].to_pylist(), strict=True)
    assert sum(one != other for one, other in pairs) == result.label_changes


def test_scores_that_are_lost_count_as_changed(labelled, tmp_path, monkeypatch):
    """A model that gives no finite numbers is refused, also for a regression, which has no labels to change."""
    folder, data = labelled["regression"]
    converted = quantizing._converted

    def then_nothing_finite(*arguments):
        found = converted(*arguments)
        monkeypatch.setattr(OpenVinoModel, "run", lambda _, rows: np.full((len(rows.length_W), 1), np.nan, np.float32))
        return found

    monkeypatch.setattr(quantizing, "_converted", then_nothing_finite)
    with pytest.raises(JobError, match="30 of 30 labels change"):
        quantized(folder, tmp_path / "new", data, max_drop=1.0, limit=30)


def test_metric_that_becomes_undefined_breaks_the_contract():
    reference = _Reference(None, None, None, np.zeros(2), np.ones(2, bool), None, "pearson", QuantizeOptions())
    assert reference.drop(0.5, None) == np.inf
    assert reference.drop(None, 0.5) == reference.drop(None, None) == 0


def test_dtype_of_what_is_not_quantized(labelled, tmp_path):
    folder, data = labelled["binary"]
    quantized(folder, tmp_path / "new", data, max_label_changes=0.2, max_drop=0.5, dtype="float32")
    assert json.loads((tmp_path / "new" / "openvino_model.json").read_text())["details"]["rest"] == "float32"
    with pytest.raises(SettingsError, match="own number formats; leave dtype=bfloat16 out"):
        pipelines.Scorer.load(tmp_path / "new", compute=ComputeSettings(dtype="bfloat16"))


@pytest.mark.parametrize("new", ["/proc/new", "/etc/hostname/new"])
def test_folder_that_cannot_be_written_is_said(labelled, new, capsys):
    folder, data = labelled["binary"]
    options = ["--data", data, "--limit", "20", "--max-label-changes", "1", "--max-drop", "1"]
    assert main(["quantize", str(folder), new, *options]) == 2
    assert f"{new} cannot be written" in capsys.readouterr().err


def test_command_prints_what_changed(labelled, tmp_path, capsys):
    folder, data = labelled["binary"]
    options = ["--data", data, "--max-label-changes", "0.2", "--max-drop", "0.5"]
    assert main(["quantize", str(folder), str(tmp_path / "new"), *options]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["labels changed"].endswith(" of 120 documents")
    assert "in int8" in lines["layers"]
    assert main(["quantize", str(folder), str(tmp_path / "new"), *options]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["format"] == "int8"


def test_mistakes_are_found_before_work(labelled, tmp_path, spam_folder):
    folder, data = labelled["binary"]
    with pytest.raises(SettingsError, match="metric=rmse is not one of a binary model"):
        quantized(folder, tmp_path / "new", data, metric="rmse")
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(SettingsError, match="max_drop"):
            QuantizeOptions(max_drop=wrong)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        quantized(folder, tmp_path / "full", data)


def test_int8_folder_is_for_openvino_on_cpus_and_is_not_trained(labelled, tmp_path):
    folder, data = labelled["binary"]
    new = tmp_path / "new"
    quantized(folder, new, data, max_label_changes=0.2, max_drop=0.5)
    for compute in (ComputeSettings(engine="torch"), ComputeSettings(device="cuda")):
        with pytest.raises(SettingsError, match="int8 model for CPUs"):
            pipelines.Scorer.load(new, compute=compute)
    job = {"model": str(new), "input": str(data), "output": str(tmp_path / "out"), "dtype": "float32"}
    with pytest.raises(SettingsError, match="leave dtype=float32 out"):
        check_job(ScoreJob.parse(job))
    assert not (tmp_path / "out").exists()
    assert estimate(check_job(ScoreJob.parse({**job, "dtype": "auto"})), rate=1000).rows == 120
    with pytest.raises(ModelFolderError, match="int8 model already"):
        quantized(new, tmp_path / "again", data)
    with pytest.raises(ModelFolderError, match="int8 model, which can be scored and served"):
        pipelines.train(data, new, tmp_path / "trained", kind="binary")
    with pytest.raises(ModelFolderError, match="int8 model, which can be scored and served"):
        ClassificationModel("bert", str(new), use_cuda=False)
    tuned = pipelines.tune(new, data)
    assert read_model_folder(new).decision.thresholds == tuned.thresholds
    assert read_model_folder(new).quantization, "tuning keeps what is known"
    content = bytearray((new / "openvino_model.bin").read_bytes())
    content[100] ^= 1
    (new / "openvino_model.bin").write_bytes(content)
    with pytest.raises(ModelFolderError, match="have changed"):
        pipelines.Scorer.load(new)


def test_scores_of_an_int8_folder_do_not_depend_on_the_batch(labelled, tmp_path, emails):
    folder, data = labelled["binary"]
    quantized(folder, tmp_path / "new", data, max_label_changes=0.2, max_drop=0.5)
    scorer = pipelines.Scorer.load(tmp_path / "new")
    texts = emails["text"].to_pylist()[:20]
    together = np.array(scorer.predict(texts)["scores"].to_pylist())
    alone = np.concatenate([np.array(scorer.predict([text])["scores"].to_pylist()) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-3)
