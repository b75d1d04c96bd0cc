"""The head runs in float32: a narrow number format does not flatten the scores of a weak model."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from pipelines.decisions.metrics import count_distinct, tie_warning
from pipelines.model.precision import InFloat32, head_of
from pipelines.model.scorer import Scorer
from pipelines.model.window_model import WindowModel
from pipelines.model_folder import seal
from pipelines.settings import ComputeSettings, DecisionSettings
from tests import tiny
from tests.model.rows import TEMPLATE

TAGS = DecisionSettings(kind="multilabel", labels=tuple(f"tag{number}" for number in range(32)))


def scores_of(folder, texts, dtype):
    scorer = Scorer.load(folder, compute=ComputeSettings(dtype=dtype, device="cpu"))
    return np.stack(scorer.predict(texts)["scores"].to_pylist())


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "roberta"])
def test_ranking_of_weak_model(tmp_path, emails, family):
    folder = tiny.model_folder(tmp_path, emails["text"].to_pylist()[:40], TAGS, family=family, max_length=64)
    weights = load_file(tmp_path / "model.safetensors")
    last = "classifier.out_proj" if "classifier.out_proj.weight" in weights else "classifier"
    weights[f"{last}.weight"] *= 1e-3  # it has learned little: logits near -3 that differ in the third digit
    weights[f"{last}.bias"][:] = -3.0
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    seal(folder)
    texts = emails["text"].to_pylist()[:150]
    exact, narrow = scores_of(folder.path, texts, "float32"), scores_of(folder.path, texts, "bfloat16")
    truth = exact > np.median(exact, axis=0)
    areas = [roc_auc_score(truth[:, label], narrow[:, label]) for label in range(32)]
    assert min(areas) > 0.95
    distinct = [len(np.unique(narrow[:, label])) for label in range(32)]
    assert min(distinct) > 100
    assert tie_warning(count_distinct(narrow.astype(np.float32), TAGS)) is None


def test_head_is_outside_of_autocast():
    module = tiny.classifier("bert", num_labels=2)
    model = WindowModel(module, TEMPLATE, ComputeSettings(dtype="float32", device="cpu"))
    seen = {}
    module.classifier.register_forward_hook(lambda _layer, inputs, output: seen.update(into=inputs[0], out=output))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        module(input_ids=torch.tensor([[2, 50, 60, 3]]))
    assert seen["out"].dtype == torch.float32
    assert [type(layer.forward) for layer in head_of(module)] == [InFloat32]
    copied = model.copy(ComputeSettings(dtype="bfloat16", device="cpu"))
    assert copied.module.classifier.weight.dtype == torch.float32
    assert not isinstance(copied.module.classifier.forward.forward, InFloat32), "wrapped once"
    assert next(copied.module.bert.encoder.parameters()).dtype == torch.bfloat16


def test_ties_are_named():
    decision = DecisionSettings(kind="multilabel", labels=("a", "b", "sure"))
    scores = np.random.default_rng(0).uniform(0.2, 0.8, (300, 3)).astype(np.float32)
    scores[:, 2] = 0.9999
    assert tie_warning(count_distinct(scores, decision)) is None, "a sure model is not suspicious"
    scores[:, 1] = np.where(scores[:, 1] > 0.5, 0.5, 0.501)
    warning = tie_warning(count_distinct(scores, decision))
    assert warning.startswith("the scores of 1 of 3 labels tie: 300 documents have at most 2 different scores of 'b'")
    assert tie_warning(count_distinct(scores[:10], decision)) is None, "too few to tell"
    assert count_distinct(scores[:, :1], DecisionSettings(kind="regression")) == {}
