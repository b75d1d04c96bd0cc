import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext

from pipelines.bulk.job import ScoreJob
from pipelines.errors import DataError, JobError, OutputError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.on_ray.score import score
from pipelines.settings import ComputeSettings
from pipelines.storage.listing import list_files
from tests.jobs import FLOAT32, logged, read_scored, score_job

pytestmark = pytest.mark.usefixtures("local_ray")


def job(folder, source, output, **settings):
    return score_job(folder, source, output, **{"replicas": 1, **settings})


@pytest.fixture(scope="module")
def scored(local_ray, spam_folder, input_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("scored") / "out"
    with logged() as lines:
        summary = score(job(spam_folder, input_folder, output, unit_bytes=10_000))
    return output, summary, lines


def test_rows_are_in_order_with_errors(scored, input_folder):
    output, summary, lines = scored
    table = read_scored(output)
    rows = table.select(["source_file", "source_row"]).to_pylist()
    expected = [(f"{input_folder}/shard-{s}.parquet", row) for s in range(3) for row in range(20)]
    assert [(row["source_file"], row["source_row"]) for row in rows] == expected
    errors = table["error"].to_pylist()
    assert errors[23] == "the text is null"
    assert errors[39].startswith("the text is not valid UTF-8")
    assert (summary.rows_in, summary.rows_out, summary.rows_in_error) == (60, 60, 2)
    assert summary.positive_rates.keys() == {"ham", "spam"}
    written = json.loads((output / "_summary.json").read_text())
    assert written.items() >= summary.to_json().items()
    manifest = json.loads((output / "_manifest.json").read_text())
    assert manifest["generations"][0]["units"] == len(list_files(str(output))) > 5
    assert lines[0].startswith("3 files, 60 rows")
    assert summary.errors == {"the text is null": 1, "the text is not valid UTF-8": 1}
    assert set(summary.seconds) == {"read", "tokenize", "wait", "forward", "write"}


def test_ray_data_context_of_the_caller_is_unchanged(scored):
    assert DataContext.get_current().target_max_block_size == DataContext().target_max_block_size > 1
    assert DataContext.get_current().enable_progress_bars == DataContext().enable_progress_bars


def test_output_columns_and_metadata(scored, spam_folder):
    table = read_scored(scored[0])
    names = ["id", "label", "source_file", "source_row", "predicted_label", "score", "scores", "num_tokens",
             "num_windows", "truncated", "error"]  # fmt: skip
    assert table.column_names == names
    assert table.schema.field("scores").type == pa.list_(pa.float32(), 2)
    metadata = pq.read_schema(list_files(str(scored[0]))[0]).metadata
    assert metadata[b"pipelines.weights_hash"].decode() == spam_folder.weights_hash
    assert json.loads(metadata[b"pipelines.thresholds"]) == {"spam": 0.4}


def test_job_matches_scorer(scored, spam_folder, input_folder):
    table = read_scored(scored[0])
    scorer = Scorer.load(spam_folder, compute=ComputeSettings(**FLOAT32))
    here = pa.concat_tables([scorer.score_table(pq.read_table(f"{input_folder}/shard-{s}.parquet")) for s in range(3)])
    for name in ("predicted_label", "num_tokens", "num_windows", "truncated", "error"):
        assert table[name].to_pylist() == here[name].to_pylist(), name
    for found, expected in zip(table["scores"].to_pylist(), here["scores"].to_pylist(), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_unit_size_and_filesystem_change_nothing(scored, spam_folder, input_folder, tmp_path):
    settings = {"keep": ["id"], "prefix": "m_", "limit": 30, "replicas": 2, "thresholds": {"spam": 0.9}}
    score(job(spam_folder, f"{input_folder}/*.parquet", f"file://{tmp_path}/out", **settings))
    table, whole = read_scored(tmp_path / "out"), read_scored(scored[0]).slice(0, 30)
    assert table["id"].to_pylist() == whole["id"].to_pylist()
    good = [row for row in range(30) if whole["error"][row].as_py() is None]
    found = np.array([table["m_scores"][row].as_py() for row in good])
    np.testing.assert_allclose(found, [whole["scores"][row].as_py() for row in good], atol=1e-5)
    labels = [table["m_predicted_label"][row].as_py() for row in good]
    assert labels == ["spam" if score >= np.float32(0.9) else "ham" for score in found[:, 1]]
    assert "label" not in table.column_names


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"text_column": "body"}, DataError, "has no column 'body'; it has: id, text, label"),
        ({"input": "/nowhere"}, DataError, "/nowhere does not exist"),
        ({"keep": ["nope"]}, DataError, "--keep names 'nope'"),
        ({"thresholds": [0.1, 0.2]}, SettingsError, "needs 1"),
        ({"device": "cuda:7"}, SettingsError, r"needs 1 GPU at once, and the local Ray has 0 GPU: ask for less"),
        ({"device": "cuda:7", "gpus_per_replica": 0}, JobError, "device='cuda:7' is not available"),
        ({"replicas": 2, "replica_resources": {"spot": 1}}, SettingsError, "needs 2 spot at once"),
    ],
)
def test_bad_job_error_messages(spam_folder, input_folder, tmp_path, settings, error, message):
    paths = {"model": str(spam_folder.path), "input": str(input_folder), "output": str(tmp_path / "out")}
    with pytest.raises(error, match=message):
        score(ScoreJob.parse({**paths, **settings}))


def test_scored_folder_can_be_scored_with_prefix(scored, spam_folder, tmp_path):
    output = tmp_path / "again"
    score(job(spam_folder, scored[0], output, prefix="m_", text_column="predicted_label", limit=8))
    table = read_scored(output)
    assert {"source_file", "m_source_file", "m_predicted_label"} <= set(table.column_names)


def test_conflicting_columns_are_refused_early(spam_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for name, ids in (("a", [1]), ("b", ["x"])):
        pq.write_table(pa.table({"id": ids, "text": ["t"]}), tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"a column of .*b\.parquet does not fit"):
        score(job(spam_folder, tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert score(job(spam_folder, tmp_path / "in", tmp_path / "out", keep=[])).rows_out == 2, "the suggested remedy"


def test_used_output_and_column_clash_are_refused(scored, spam_folder, input_folder, tmp_path):
    with pytest.raises(
        OutputError, match=r"text_column was 'text' and is now 'label'; give a new folder, or --overwrite"
    ):
        score(job(spam_folder, input_folder, scored[0], text_column="label"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty and has no scoring run \(it has notes.txt\)"):
        score(job(spam_folder, input_folder, tmp_path / "other", overwrite=True))
    with pytest.raises(DataError, match="has the same name as an output column"):
        score(job(spam_folder, scored[0], tmp_path / "again", text_column="id"))
