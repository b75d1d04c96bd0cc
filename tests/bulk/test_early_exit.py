"""Jobs that read texts only until their labels are sure."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipelines import api, cli
from pipelines.bulk.drift import drift
from pipelines.decisions.early_exit import Margin
from pipelines.errors import DataError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.model_folder import read_model_folder, write_pipeline_file
from pipelines.settings import ComputeSettings, ScoreSettings
from pipelines.storage.listing import list_files
from tests import tiny
from tests.jobs import FLOAT32, read_scored

MARGIN = Margin(0.02, "spread", 2, 0.9, 0.9, 1000, 1, 2000, 1000)


@pytest.fixture
def folder(folders, tmp_path):
    """A folder with a threshold that some documents pass, and a margin."""
    shutil.copytree(folders["binary"].path, tmp_path / "model")
    found = replace(read_model_folder(tmp_path / "model"), early_exit=MARGIN.to_json())
    write_pipeline_file(replace(found, decision=replace(found.decision, thresholds=(0.47,))))
    return tmp_path / "model"


def score(folder, source, output, *more, code=3):
    command = ["score", folder, "--input", source, "--output", output, "--replicas", 0, "--set", "dtype=float32", *more]
    assert cli.main([str(argument) for argument in command]) == code
    return None if code not in (0, 3) else read_scored(output)


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_job_scorer_and_table_read_the_same(folder, source, tmp_path, mode):
    full = score(folder, source, tmp_path / "full")
    found = score(folder, source, tmp_path / mode, "--early-exit", mode, "--set", "unit_bytes=9000")
    assert "windows_read" not in full.column_names
    assert found["num_windows"].equals(full["num_windows"])
    read, windows = found["windows_read"].to_pylist(), found["num_windows"].to_pylist()
    assert all(one <= other for one, other in zip(read, windows, strict=True))
    assert sum(read) < sum(windows)
    assert read[7] == 0, "row 7 has no text"
    if mode == "exact":
        assert found["predicted_label"].equals(full["predicted_label"])
    summary = json.loads((tmp_path / mode / "_summary.json").read_text())
    assert (summary["windows"], summary["windows_read"]) == (sum(windows), sum(read))
    scorer = Scorer.load(folder, compute=ComputeSettings(**FLOAT32), early_exit=mode)
    alone = scorer.predict(pq.read_table(source)["text"].to_pylist())
    assert alone["windows_read"].equals(found["windows_read"])
    assert alone["predicted_label"].equals(found["predicted_label"])
    table = api.score(str(folder), pq.read_table(source), early_exit=mode, dtype="float32")
    assert table["windows_read"].equals(found["windows_read"])


def test_other_ways_to_read_are_another_run(folder, source, tmp_path, capsys):
    score(folder, source, tmp_path / "scored", "--early-exit", "exact")
    score(folder, source, tmp_path / "scored", code=2)
    assert "early_exit was 'exact' and is now 'off'" in capsys.readouterr().err
    score(folder, source, tmp_path / "scored", "--early-exit", "certified", code=2)
    assert "early_exit was 'exact' and is now 'certified, margin 0.02, spread, first 2'" in capsys.readouterr().err
    score(folder, source, tmp_path / "scored", "--early-exit", "exact")
    score(folder, source, tmp_path / "old")  # as a run of a version without early exit
    manifest = json.loads((tmp_path / "old" / "_manifest.json").read_text())
    del manifest["early_exit"]
    (tmp_path / "old" / "_manifest.json").write_text(json.dumps(manifest))
    score(folder, source, tmp_path / "old")
    relabel = ["relabel", tmp_path / "scored", "--thresholds", "0.4", "--output", tmp_path / "new"]
    assert cli.main(list(map(str, relabel))) == 2
    assert "was scored with early_exit=exact" in capsys.readouterr().err


def test_what_cannot_stop_early_is_refused(folders, folder, source, tmp_path, capsys):
    score(folders["regression"].path, source, tmp_path / "out", "--early-exit", "exact", code=2)
    assert "kind regression has none" in capsys.readouterr().err
    score(folders["binary"].path, source, tmp_path / "out", "--early-exit", "certified", code=2)
    assert "pipelines tune MODEL --data VALID --early-exit" in capsys.readouterr().err
    score(folder, source, tmp_path / "out", "--early-exit", "certified", "--set", "thresholds=0.6", code=2)
    assert "fitted for these thresholds" in capsys.readouterr().err
    write_pipeline_file(replace(read_model_folder(folder), early_exit={"margin": "wide"}))
    score(folder, source, tmp_path / "out", "--early-exit", "certified", code=2)
    assert "early_exit cannot be read" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="set early_exit there"):
        ScoreSettings(via_serve="other", early_exit="exact")


def test_tune_fits_a_margin_and_other_thresholds_end_it(folder, source, tmp_path, capsys):
    command = ["tune", folder, "--data", source, "--set", "dtype=float32", "--json"]
    assert cli.main([*map(str, command), "--early-exit", "0.99"]) == 2
    before_work = capsys.readouterr()
    assert "60 documents are too few" in before_work.err
    assert "scored" not in before_work.err
    assert cli.main([*map(str, command), "--early-exit", "99"]) == 2
    assert "both must be at least 0.5" in capsys.readouterr().err
    assert cli.main([*map(str, command), "--early-exit", "0.6", "--confidence", "0.9"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["early_exit"] == read_model_folder(folder).early_exit
    assert found["early_exit"]["documents"] == 59
    assert found["thresholds"] == [0.47]
    assert cli.main([*map(str, command), "--early-exit", "0.6", "--calibrate", "temperature"]) == 2
    assert "tune them first" in capsys.readouterr().err
    assert cli.main([*map(str, command)]) == 3
    assert read_model_folder(folder).early_exit == {}
    assert "needs a new fit" in capsys.readouterr().err


def test_early_exit_is_compared_with_its_like(folder, folders, source, emails, tmp_path, capsys):
    """Scores of the windows that were read are no scores of whole texts. A promise is one of whole texts."""
    promised = {"objective": "recall=0.9", "confidence": 0.95, "joint": False, "rows": 50, "labels": {}}
    write_pipeline_file(replace(read_model_folder(folder), guarantees=promised))
    for mode in ("off", "exact", "certified"):
        score(folder, source, tmp_path / mode, "--early-exit", mode)
        assert ("pipelines relabel" in capsys.readouterr().out) == (mode == "off"), "relabel would be refused"
    with pytest.raises(DataError, match=r"early_exit=off, and .* early_exit=exact: scores of windows that were read"):
        drift(str(tmp_path / "off"), str(tmp_path / "exact"))
    with pytest.raises(DataError, match="cannot be compared"):
        drift(str(tmp_path / "exact"), str(tmp_path / "certified"))
    assert drift(str(tmp_path / "exact"), str(tmp_path / "exact"))["spam"].psi == pytest.approx(0)
    assert "different models" not in capsys.readouterr().err
    score(folders["binary"].path, source, tmp_path / "same")
    drift(str(tmp_path / "same"), str(tmp_path / "off"))
    assert "different models" not in capsys.readouterr().err, "other thresholds leave the scores as they are"
    (tmp_path / "weights").mkdir()
    other = tiny.model_folder(
        tmp_path / "weights", emails["text"].to_pylist(), read_model_folder(folder).decision, seed=1
    )
    score(other.path, source, tmp_path / "other")
    drift(str(tmp_path / "other"), str(tmp_path / "off"))
    assert "different models: what moved can be the model" in capsys.readouterr().err
    metadata = {mode: pq.read_schema(list_files(str(tmp_path / mode))[0]).metadata for mode in ("exact", "certified")}
    assert b"pipelines.guarantees" in metadata["exact"]
    assert b"pipelines.guarantees" not in metadata["certified"]
