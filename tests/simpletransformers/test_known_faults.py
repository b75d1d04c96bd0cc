"""Known faults of Simple Transformers 0.70.8. Each test fails if this package has the fault."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from pipelines.simpletransformers.models import ClassificationArgs, ClassificationModel, MultiLabelClassificationModel
from tests.simpletransformers.facades import open_model, train_frame
from tests.simpletransformers.golden import freeze_simpletransformers as golden

pytestmark = pytest.mark.filterwarnings("ignore:without effect here")


def test_no_stale_cache_between_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = open_model("binary", sliding_window=True, no_cache=False, reprocess_input_data=False)
    texts = golden.read_texts()
    first = pd.DataFrame({"text": texts[:20], "labels": [0] * 20})
    second = pd.DataFrame({"text": texts[20:40], "labels": [1] * 20})
    outputs = [model.eval_model(frame)[1] for frame in (first, second)]
    fresh = open_model("binary", sliding_window=True).predict(texts[20:40])[1]
    for left, right in zip(outputs[1], fresh, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    assert list(tmp_path.iterdir()) == [], "evaluation writes no files"


def test_predict_twice_with_multiprocessing():
    code = """
from tests.simpletransformers.facades import open_model
from tests.simpletransformers.golden import freeze_simpletransformers as golden
model = open_model("multilabel", **{"use_multiprocessing": True, "use_multiprocessing_for_evaluation": True})
texts = golden.read_texts()
assert model.predict(texts)[0] == model.predict(texts)[0]
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "done\n", done.stderr[-2000:]


@pytest.mark.parametrize("workers", [True, False])
def test_multilabel_with_and_without_multiprocessing(workers):
    model = open_model("multilabel", use_multiprocessing=workers, use_multiprocessing_for_evaluation=workers,
                       no_save=True)  # fmt: skip
    frame = train_frame("multilabel")
    assert model.train_model(frame)[0] == 3
    assert 0 <= model.eval_model(frame)[0]["LRAP"] <= 1
    assert np.shape(model.predict(frame["text"].tolist())[0]) == (24, 3)


def test_threshold_zero_in_evaluation():
    frame = train_frame("multilabel")
    wrong = [open_model("multilabel", threshold=value).eval_model(frame)[2] for value in (0.0, 0.5)]
    expected = [row for row, labels in enumerate(frame["labels"]) if labels != [1, 1, 1]]
    assert [item.guid for item in wrong[0]] == expected
    assert len(wrong[1]) != len(wrong[0])


def test_memory_per_window():
    """Simple Transformers needs over a kilobyte of Python objects per window. This package stores each token once."""
    model = open_model("binary", sliding_window=True, stride=4, dense_windows=True)
    texts = ["free money now and then some more of it " * 400] * 4
    documents = model._engine.documents(texts, None)
    num_windows = documents.num_tokens_D.sum() / 4
    tracemalloc.start()
    model._engine.scorer().score_documents(documents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_windows > 5_000
    assert peak / num_windows < 1_000, f"{peak / num_windows:.0f} bytes a window"


def test_regression_windows_print_nothing(capfd):
    model = open_model("regression", sliding_window=True)
    model.eval_model(train_frame("regression"))
    assert capfd.readouterr().out == ""


def test_derived_warmup_steps_are_not_written_back():
    model = open_model("binary", no_save=True)
    model.train_model(train_frame("binary"))
    assert model.args.warmup_steps == 0


def test_uncased_tokenizer_stays_uncased():
    model = MultiLabelClassificationModel("bert", str(golden.HERE / "binary"), num_labels=2, use_cuda=False)
    assert np.array_equal(
        model._engine._tokenizer.encode(["FREE Money"]).ids, model._engine._tokenizer.encode(["free money"]).ids
    )


def test_single_regression_text_keeps_shape():
    model = open_model("regression")
    values, raw = model.predict(["one"])
    assert values.shape == raw.shape == (1,)
    assert "rmse" in model.eval_model(train_frame("regression", 1))[0]


def test_arguments_of_other_class_are_kept():
    args = ClassificationArgs(max_seq_length=16, silent=True)
    model = MultiLabelClassificationModel("bert", str(golden.HERE / "multilabel"), args=args, use_cuda=False)
    assert model._engine.scorer().plan.max_length == 16


def test_default_device_without_gpu():
    assert ClassificationModel("bert", str(golden.HERE / "binary")).predict(["a"])[0].shape == (1,)
