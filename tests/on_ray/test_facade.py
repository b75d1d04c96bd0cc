import numpy as np
import pandas as pd
import pytest

from pipelines.errors import JobError
from pipelines.simpletransformers.models import ClassificationModel
from tests.simpletransformers.golden import freeze_simpletransformers as golden

pytestmark = pytest.mark.filterwarnings("ignore:without effect here")


def mean_prediction(true, predicted):
    return float(np.mean(predicted))


def train(folder, **args):
    settings = {**golden.arguments("binary", {}), **golden.no_dropout(), "no_save": False, "learning_rate": 1e-2,
                "num_train_epochs": 2, "evaluate_during_training": True, "output_dir": str(folder), **args}  # fmt: skip
    model = ClassificationModel("bert", str(golden.HERE / "binary"), args=settings, use_cuda=False)
    frame = pd.DataFrame({"text": golden.read_texts(), "labels": golden.read_labels("binary")})
    return model, model.train_model(frame, eval_df=frame, mean=mean_prediction), frame


@pytest.mark.slow
def test_num_workers_matches_single_process(local_ray, tmp_path):
    alone, (steps, progress), frame = train(tmp_path / "alone")
    workers, (their_steps, theirs), _ = train(tmp_path / "workers", num_workers=2)
    assert their_steps == steps == 14
    assert list(theirs) == list(progress)
    np.testing.assert_allclose(theirs["eval_loss"], progress["eval_loss"], rtol=1e-3)
    np.testing.assert_allclose(theirs["mean"], progress["mean"], atol=0.05)
    texts = frame["text"].tolist()
    np.testing.assert_allclose(workers.predict(texts)[1], alone.predict(texts)[1], atol=1e-2)
    names = {path.name for path in (tmp_path / "workers").iterdir()}
    assert names == {path.name for path in (tmp_path / "alone").iterdir()}
    assert {"best_model", "checkpoint-7-epoch-1", "pipeline.json", "training_progress_scores.csv"} <= names
    again = ClassificationModel("bert", str(tmp_path / "workers"), use_cuda=False)
    np.testing.assert_allclose(again.predict(texts)[1], workers.predict(texts)[1], atol=1e-6)


@pytest.mark.slow
def test_metric_error_in_worker_is_raised(local_ray, tmp_path):
    def broken(true, predicted):
        raise ZeroDivisionError("no positives")

    model = ClassificationModel("bert", str(golden.HERE / "binary"), use_cuda=False, args={
        "num_workers": 1, "evaluate_during_training": True, "output_dir": str(tmp_path / "out"), "silent": True,
    })  # fmt: skip
    frame = pd.DataFrame({"text": golden.read_texts()[:8], "labels": [0, 1] * 4})
    with pytest.raises(JobError, match="no positives"):
        model.train_model(frame, eval_df=frame, mine=broken)
