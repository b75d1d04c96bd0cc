"""A server that reads texts only until their labels are sure."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from pipelines.decisions.early_exit import Margin
from pipelines.errors import SettingsError
from pipelines.model.scorer import Scorer
from pipelines.model_folder import read_model_folder, write_pipeline_file
from pipelines.serving.job import ServeJob, check_job
from pipelines.settings import ComputeSettings
from tests.jobs import FLOAT32
from tests.serving.conftest import ApiClient

MARGIN = Margin(0.01, "spread", 2, 0.9, 0.9, 1000, 1, 2000, 1000)


@pytest.fixture(scope="module")
def folder(spam_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("early") / "spam"
    shutil.copytree(spam_folder.path, path)
    found = replace(read_model_folder(path), early_exit=MARGIN.to_json())
    write_pipeline_file(found)
    return found


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_server_reads_as_the_scorer_does(folder, emails, mode):
    texts = [text for text in emails["text"].to_pylist()[:60] if text]
    scorer = Scorer.load(folder, compute=ComputeSettings(**FLOAT32), early_exit=mode)
    wanted = scorer.predict(texts).to_pylist()
    full = Scorer.load(folder, compute=ComputeSettings(**FLOAT32)).predict(texts).to_pylist()
    job = ServeJob.parse({"model": str(folder.path), "early_exit": mode, "batch_tokens": 256, **FLOAT32})
    api = ApiClient(job)
    try:
        groups = [texts[start : start + 7] for start in range(0, len(texts), 7)]
        with ThreadPoolExecutor(4) as pool:  # requests that share forward passes
            answers = list(pool.map(lambda group: api.predict(inputs=group, windows=True).json(), groups))
        found = [prediction for answer in answers for prediction in answer["predictions"]]
        assert [one["windows_read"] for one in found] == [row["windows_read"] for row in wanted]
        assert [one["label"] for one in found] == [row["predicted_label"] for row in wanted]
        assert all(len(one["windows"]) == one["windows_read"] for one in found)
        assert sum(one["windows_read"] for one in found) < sum(one["num_windows"] for one in found)
        for one, row in zip(found, wanted, strict=True):
            assert one["scores"]["spam"] == pytest.approx(row["scores"][1], abs=1e-5)
        for threshold in (0.3, 0.47, 0.9):  # labels under other thresholds are those of a full read
            answer = api.predict(inputs=texts[:14], thresholds=threshold).json()
            labels = [one["label"] for one in answer["predictions"]]
            assert labels == ["spam" if row["scores"][1] >= threshold else "ham" for row in full[:14]]
        assert api.get("/info").json()["early_exit"]["mode"] == mode
        assert api.get("/info").json()["early_exit"]["margin"] == MARGIN.margin
    finally:
        api.close()


def test_other_thresholds_have_no_margin(folder, spam_folder):
    check_job(ServeJob.parse({"model": str(folder.path), "early_exit": "certified"}))
    for model, values in ((folder, {"thresholds": 0.7}), (spam_folder, {})):
        with pytest.raises(SettingsError, match="fitted for these thresholds"):
            check_job(ServeJob.parse({"model": str(model.path), "early_exit": "certified", **values}))
    check_job(ServeJob.parse({"model": str(folder.path), "early_exit": "exact", "thresholds": 0.7}))
