import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pipelines
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.model_folder import read_model_folder, seal, write_pipeline_file
from pipelines.settings import Calibration, ComputeSettings
from tests.tiny import DECISIONS

FLOAT32 = ComputeSettings(dtype="float32", device="cpu")


def reference(folder, text):
    """Document scores computed with transformers alone, one window at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    module = AutoModelForSequenceClassification.from_pretrained(folder.path).eval()
    ids = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
    budget, step = 30, int(32 * 0.8)
    starts = [0]
    while starts[-1] + budget < len(ids):
        starts.append(starts[-1] + step)
    rows = []
    for start in starts:
        row = [tokenizer.cls_token_id, *ids[start : start + budget], tokenizer.sep_token_id]
        with torch.no_grad():
            rows.append(module(torch.tensor([row])).logits[0].double())
    logits = torch.stack(rows)
    if folder.decision.kind == "regression":
        return logits.mean(0).numpy(), len(starts)
    scores = logits.sigmoid() if folder.decision.kind == "multilabel" else logits.softmax(-1)
    return (scores.amax(0) if folder.decision.merge == "max" else scores.mean(0)).numpy(), len(starts)


@pytest.mark.parametrize("kind", DECISIONS)
def test_scores_match_transformers(folders, kind, emails):
    scorer = Scorer.load(folders[kind], compute=FLOAT32)
    texts = [*emails["text"].to_pylist()[:4], "", "short", "émigré 💰 \x00 text"]
    table = scorer.predict(texts)
    for text, row in zip(texts, table.to_pylist(), strict=True):
        scores, num_windows = reference(folders[kind], text)
        np.testing.assert_allclose(row["scores"], scores, atol=1e-5)
        assert row["num_windows"] == num_windows
        assert not row["truncated"]


def test_scores_do_not_depend_on_batch(folders, emails):
    scorer = Scorer.load(folders["multilabel"], compute=FLOAT32)
    texts = emails["text"].to_pylist()[:30]
    alone = np.concatenate([scorer.predict([text]).column("scores").combine_chunks().flatten() for text in texts])

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.permutations(range(30)), st.integers(1, 3000))
    def together(order, batch_tokens):
        scorer.model.batch_tokens = batch_tokens
        table = scorer.predict([texts[row] for row in order])
        scores = np.asarray(table.column("scores").combine_chunks().flatten()).reshape(-1, 3)
        np.testing.assert_allclose(scores, alone.reshape(-1, 3)[list(order)], atol=1e-5)

    together()


def test_bad_rows_get_error_and_no_score(folders):
    scorer = Scorer.load(folders["binary"], compute=FLOAT32)
    rows = scorer.predict(["fine", None, "also fine"]).to_pylist()
    assert [row["error"] for row in rows] == [None, "the text is null", None]
    assert rows[1]["predicted_label"] is None
    assert rows[1]["num_windows"] == 0
    np.testing.assert_allclose(rows[0]["scores"], scorer.predict(["fine"]).to_pylist()[0]["scores"], atol=1e-5)
    assert len(scorer.predict([])) == 0


def test_nan_output_is_a_row_error(folders):
    scorer = Scorer.load(folders["binary"], compute=FLOAT32)
    with torch.no_grad():
        scorer.model.module.classifier.bias[0] = torch.nan
    rows = scorer.predict(["fine"]).to_pylist()
    assert rows[0]["error"] == "the model's output is not finite"
    assert rows[0]["scores"] is None


def test_pair_scores_match_transformers(folders):
    scorer = Scorer.load(folders["binary"], compute=FLOAT32)
    tokenizer = AutoTokenizer.from_pretrained(folders["binary"].path)
    module = AutoModelForSequenceClassification.from_pretrained(folders["binary"].path).eval()
    table = scorer.score_table(pa.table({"a": ["free money"], "b": ["meeting at noon"]}), "a", "b")
    with torch.no_grad():
        inputs = tokenizer("free money", "meeting at noon", return_tensors="pt")
        expected = module(**inputs).logits.softmax(-1)[0].numpy()
    np.testing.assert_allclose(table.to_pylist()[0]["scores"], expected, atol=1e-5)
    long = scorer.score_table(pa.table({"a": ["free money"], "b": ["meeting at noon " * 30]}), "a", "b")
    assert long.to_pylist()[0]["num_windows"] > 3
    assert not long.to_pylist()[0]["truncated"]


def test_threshold_overrides(folders):
    assert Scorer.load(folders["multilabel"], thresholds={"b": 0.9}).decision.thresholds == (0.4, 0.9, 0.6)
    with pytest.raises(SettingsError, match="needs 3"):
        Scorer.load(folders["multilabel"], thresholds=(0.1,))


def test_temperature_divides_logits(folders):
    folder = folders["binary"]
    hot = Scorer.load(replace(folder, calibration=Calibration(4.0)), compute=FLOAT32)
    cold = Scorer.load(folder, compute=FLOAT32)
    log_odds = [np.diff(np.log(s.predict(["text"]).to_pylist()[0]["scores"]))[0] for s in (hot, cold)]
    assert log_odds[1] == pytest.approx(4 * log_odds[0], rel=1e-3)


def test_mismatched_weights_and_labels_are_refused(folders, tmp_path):
    import shutil

    shutil.copytree(folders["binary"].path, tmp_path / "model")
    folder = read_model_folder(tmp_path / "model")
    write_pipeline_file(replace(folder, decision=DECISIONS["multiclass"]))
    with pytest.raises(ModelFolderError, match=r"config\.json has 2 labels and pipeline\.json 3"):
        Scorer.load(str(tmp_path / "model"))
    write_pipeline_file(folder)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    import safetensors.torch

    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    safetensors.torch.save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    seal(folder)
    with pytest.raises(ModelFolderError, match=r"lacks weights of the classifier \(classifier\.bias"):
        Scorer.load(str(tmp_path / "model"))


def test_out_of_memory_batch_is_halved(folders, emails):
    scorer = Scorer.load(folders["binary"], compute=replace(FLOAT32, packing="off"))
    expected = scorer.predict(emails["text"].to_pylist()[:20])
    module, sizes = scorer.model.module, []
    forward = module.forward

    def limited(*args, **kwargs):
        tokens = next(iter([*args, *kwargs.values()])).numel()
        sizes.append(tokens)
        if tokens > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    module.forward = limited
    found = scorer.predict(emails["text"].to_pylist()[:20])
    assert max(sizes) > 300 > scorer.model.batch_tokens, "later passes have half the size"
    for left, right in zip(found["scores"].to_pylist(), expected["scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    sizes.clear()
    scorer.predict(emails["text"].to_pylist()[:20])
    assert max(sizes) <= 300
    module.forward = lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("one window"))
    with pytest.raises(torch.OutOfMemoryError):
        scorer.predict(["a"])


def test_threads_match_serial_calls(folders, emails):
    """Guards against temporary hooks on the module, which would affect calls in other threads."""
    scorer = Scorer.load(folders["binary"], compute=ComputeSettings(dtype="float32", device="cpu"))
    texts = [text[:300] for text in emails["text"].to_pylist()[:40]]
    expected = [scorer.predict([text])["scores"].to_pylist()[0] for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: scorer.predict([text])["scores"].to_pylist()[0], texts * 6))
    np.testing.assert_allclose(found, expected * 6, atol=1e-6)


def test_texts_of_every_arrow_type(spam_folder):
    scorer = Scorer.load(spam_folder, compute=FLOAT32)
    texts = ["free money", None, "see you"]
    expected = scorer.predict(texts)
    strings = pa.array(texts, pa.string())
    columns = [strings, strings.cast(pa.large_string()), strings.cast(pa.string_view()), strings.dictionary_encode(),
               strings.cast(pa.binary()), pa.chunked_array([strings[:1], strings[1:]]),
               pa.chunked_array([strings.dictionary_encode()])]  # fmt: skip
    for column in columns:
        assert scorer.predict(column).equals(expected), column.type
    table = pa.table({"text": strings})
    assert scorer.predict(table.to_reader()).equals(expected)
    assert scorer.predict(pa.nulls(2))["error"].to_pylist() == ["the text is null"] * 2
    with pytest.raises(DataError, match="type int64, not string"):
        scorer.predict(pa.array([1, 2]))


SETTINGS = {"dtype": "float32", "device": "cpu"}


def test_frames_with_odd_columns_and_without_texts(spam_folder, log_lines):
    scorer = Scorer.load(spam_folder, compute=FLOAT32)
    frame = pd.DataFrame({"text": ["free money", "see you"], "o": pd.Series([1, "a"], dtype=object), "z": [1j, 2j]})
    assert scorer.predict(frame).equals(scorer.predict(frame["text"]))
    scored = pipelines.score(spam_folder.path, frame, **SETTINGS)
    assert scored["o"].to_pylist() == ["1", "a"]
    assert any("column 'o' has values of several types" in line for line in log_lines)
    missing = pd.DataFrame({"text": [float("nan")] * 2})
    for found in (scorer.predict(missing), pipelines.score(spam_folder.path, missing, **SETTINGS)):
        assert found["error"].to_pylist() == ["the text is null"] * 2
