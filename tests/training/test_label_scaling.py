import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipelines.decisions.labels import Scaling
from pipelines.model.scorer import Scorer
from pipelines.model.weights import new_classifier
from pipelines.model.window_model import WindowModel
from pipelines.settings import ComputeSettings, DecisionSettings
from pipelines.text.template import Template
from pipelines.text.tokenization import InputRows
from pipelines.training.corpus import LabelledDocuments
from pipelines.training_settings import TrainSettings
from tests import tiny
from tests.training.runs import FLOAT32, make_job, run

REGRESSION = DecisionSettings(kind="regression")
YEARS = Scaling(1903.7, 64.0)
ROWS = InputRows(np.arange(10, 27), np.zeros(17, np.int64), np.array([0, 7, 17]))


def in_years(data):
    """Map the labels 0 and 3 to the years 1880 and 1940."""
    return LabelledDocuments(data.documents, (data.targets * 20 + 1880).astype(np.float32))


def logits(module, **compute):
    model = WindowModel(copy.deepcopy(module), Template((2,), (3,)), ComputeSettings(device="cpu", **compute))
    with torch.inference_mode():
        return model(ROWS)


def test_scaling_mean_and_scale():
    found = Scaling.of(np.array([1840.0, 1900.0, 1960.0], np.float32))
    assert (found.mean, found.scale) == (1900, 64), "the power of two whose ratio to the deviation 49 is nearest to 1"
    assert Scaling.of(np.array([7, 7])) == Scaling(7, 1)
    assert Scaling.of(np.array([0.001, -0.001])).scale == 2**-10


@pytest.mark.parametrize(
    "family", ["bert", "distilbert", "roberta", "xlnet", "deberta-v2", "modernbert", "squeezebert"]
)
def test_logits_unchanged_by_scaling_and_saving(family, tmp_path):
    module = tiny.classifier(family, num_labels=1)
    before = logits(module, dtype="float32")
    model = WindowModel(module, Template((2,), (3,)), FLOAT32)
    assert model.learn_scaled(YEARS, is_scaled=False)
    with torch.inference_mode():
        np.testing.assert_allclose(model(ROWS), before, atol=1e-3)
        np.testing.assert_allclose(model.copy(FLOAT32)(ROWS), before, atol=1e-3)
    model.save(tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(saved, dtype="float32"), before, atol=1e-3)


def test_checkpoint_keeps_scaled_weights(tmp_path):
    model = WindowModel(tiny.classifier(num_labels=1), Template((2,), (3,)), FLOAT32)
    assert model.learn_scaled(YEARS, is_scaled=False)
    model.snapshot()(tmp_path)
    module, has_new_head = new_classifier(str(tmp_path), REGRESSION, pad_id=0, settings=TrainSettings(seed=1))
    assert not has_new_head
    again = WindowModel(module, Template((2,), (3,)), FLOAT32)
    assert again.learn_scaled(YEARS, is_scaled=True)
    assert again(ROWS).equal(model(ROWS))


def test_new_head_starts_at_mean(tmp_path):
    tiny.classifier(num_labels=2).save_pretrained(tmp_path)
    module, has_new_head = new_classifier(str(tmp_path), REGRESSION, pad_id=0, settings=TrainSettings(seed=1))
    own = logits(module, dtype="float32")
    model = WindowModel(module, Template((2,), (3,)), FLOAT32)
    assert has_new_head
    assert model.learn_scaled(YEARS, is_scaled=True)
    with torch.inference_mode():
        np.testing.assert_allclose(model(ROWS), own * 64 + 1903.7, atol=1e-3)


def test_last_layer_without_bias_is_unchanged():
    module = tiny.classifier("gpt2", num_labels=1)
    model = WindowModel(module, Template((2,), (3,)), FLOAT32)
    before = model(ROWS)
    assert not model.learn_scaled(YEARS, is_scaled=False)
    assert model(ROWS).equal(before)


def test_bfloat16_values_keep_precision():
    module = tiny.classifier(num_labels=1, initializer_range=0.02)
    with torch.no_grad():
        module.classifier.bias += 1903.7
    exact, rounded = (logits(module, dtype=dtype) for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose(rounded, exact, atol=0.05)


def test_labels_far_from_zero_are_learned(tmp_path, emails):
    found = {}
    for is_on in (True, False):
        job, *data = make_job(tmp_path / str(is_on), emails, REGRESSION, epochs=4, standardize_labels=is_on)
        found[is_on] = run(job, *map(in_years, data))
    assert found[True].valid["mae"] < 25, "predicting the mean gives an error of 30"
    assert found[False].valid["mae"] > 1000, "training without scaling must fail, or the test proves nothing"
    texts = emails["text"].slice(60, 3).to_pylist()
    scored = Scorer.load(found[True].model, compute=FLOAT32).predict([text[:60] for text in texts])
    assert scored["num_windows"].to_pylist() == [1, 1, 1]
    module = AutoModelForSequenceClassification.from_pretrained(found[True].model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(found[True].model)
    theirs = [module(**tokenizer(text[:60], return_tensors="pt")).logits.item() for text in texts]
    np.testing.assert_allclose(scored["predicted_value"].to_pylist(), theirs, atol=1e-2)
