"""Regression tests for faults that a review of the facades found."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings
from pipelines.simpletransformers.convert import convert
from pipelines.simpletransformers.models import ClassificationArgs, ClassificationModel, MultiLabelClassificationModel
from pipelines.simpletransformers.saving import replace_folder
from pipelines.text.pretrained import load_tokenizer
from tests.simpletransformers.facades import open_model, train_frame
from tests.simpletransformers.golden import freeze_simpletransformers as golden

pytestmark = pytest.mark.filterwarnings("ignore:without effect here")


def changed(model, before):
    return {name for name, tensor in model.model.state_dict().items() if not tensor.equal(before[name])}


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def test_frozen_layers_stay_unchanged():
    model = open_model("binary", no_save=True, learning_rate=1e-2)
    for parameter in model.model.bert.parameters():
        parameter.requires_grad_(False)
    before = copy_of(model)
    for _ in range(2):
        model.train_model(train_frame("binary"))
    assert changed(model, before) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kind", ["binary", "roberta"])
def test_args_object_keeps_window_plan(kind):
    args = ClassificationArgs(sliding_window=True, max_seq_length=32, silent=True)
    path = str(golden.HERE / kind)
    outputs = [ClassificationModel("auto", path, args=given, use_cuda=False).predict(golden.read_texts())[1]
               for given in (args, {"sliding_window": True, "max_seq_length": 32})]  # fmt: skip
    assert [len(windows) for windows in outputs[0]] == [len(windows) for windows in outputs[1]]
    exact = ClassificationModel("auto", path, args={"sliding_window": True, "window_plan": "exact"}, use_cuda=False)
    assert sum(map(len, exact.predict(golden.read_texts())[1])) < sum(map(len, outputs[0]))


@pytest.mark.parametrize(
    "labels", [[-1, 0, 1], ["b", "a", "c"], [0.0, 0.5, 1.0], list(np.array([7, 5, 6])), [True, False]], ids=str
)
def test_labels_keep_their_type(labels, tmp_path):
    args = {"labels_list": labels, "output_dir": str(tmp_path / "out"), "silent": True}
    model = ClassificationModel("bert", str(golden.HERE / "binary"), args=args, use_cuda=False,
                                ignore_mismatched_sizes=True)  # fmt: skip
    frame = pd.DataFrame({"text": golden.read_texts()[:12], "labels": (labels * 6)[:12]})
    model.train_model(frame)
    first = model.predict(golden.read_texts()[:12])
    again = ClassificationModel("bert", str(tmp_path / "out"), use_cuda=False)
    second = again.predict(golden.read_texts()[:12])
    assert list(first[0]) == list(second[0])
    assert {type(label) for label in first[0]} == {type(label) for label in second[0]} == {type(labels[0].item()
                if hasattr(labels[0], "item") else labels[0])}  # fmt: skip
    assert [labels.index(label) for label in first[0]] == np.argmax(first[1], axis=1).tolist()
    assert again.eval_model(frame)[0]["accuracy"] == model.eval_model(frame)[0]["accuracy"]


def test_labels_map_and_labels_list_conflicts():
    path = str(golden.HERE / "binary")
    plain = open_model("binary").predict(golden.read_texts())
    turned = ClassificationModel("bert", path, args={"labels_map": {1: 1, 0: 0}, "max_seq_length": 32}, use_cuda=False)
    assert list(turned.predict(golden.read_texts())[0]) == list(plain[0]), "the order of a map does not matter"
    with pytest.raises(SettingsError, match="must give each label its own id from 0 to 2"):
        ClassificationModel("bert", path, args={"labels_map": {"good": 1, "great": 1, "bad": 0}}, use_cuda=False)
    with pytest.raises(SettingsError, match="name different labels"):
        ClassificationModel("bert", path, args={"labels_map": {"a": 0, "b": 1}, "labels_list": ["a", "c"]})
    with pytest.raises(SettingsError, match=r"num_labels=1 is for regression; set regression=True"):
        ClassificationModel("bert", path, num_labels=1, use_cuda=False)


def test_labels_list_overrides_saved_map(tmp_path):
    args = {"labels_list": ["ham", "spam"], "silent": True, "max_seq_length": 32}
    ClassificationModel("bert", str(golden.HERE / "binary"), args=args, use_cuda=False).save_model(str(tmp_path / "m"))
    other = ClassificationModel("bert", str(tmp_path / "m"), args={"labels_list": ["neg", "pos"]}, use_cuda=False)
    assert set(other.predict(golden.read_texts())[0]) == {"neg", "pos"}
    with pytest.raises(ModelFolderError, match="do not fit 3 labels; give the number that it was trained with"):
        ClassificationModel("bert", str(tmp_path / "m"), args={"labels_list": ["a", "b", "c"]}, use_cuda=False)


def test_metrics_may_return_numpy_values(tmp_path):
    model = open_model("binary", evaluate_during_training=True, output_dir=str(tmp_path / "out"))
    frame = train_frame("binary")
    _, progress = model.train_model(
        frame, eval_df=frame, right=lambda true, found: (true == found).sum(), both=lambda true, found: np.array([1, 2])
    )
    assert progress["both"] == [[1, 2]]
    assert progress["right"] == [round(24 * model.eval_model(frame)[0]["accuracy"])]


def test_multilabel_metrics_get_probabilities():
    seen = {}
    frame = train_frame("multilabel")
    open_model("multilabel").eval_model(frame, look=lambda true, found: seen.update(shape=found.shape, top=found.max()))
    assert seen["shape"] == (24, 3)
    assert 0 < seen["top"] < 1


def test_killed_save_leaves_no_finished_folder(tmp_path):
    folder = tmp_path / "out"
    open_model("binary").save_model(str(folder))
    code = f"""
import os, signal
from pathlib import Path
from tests.simpletransformers.facades import open_model
model = open_model("binary")
replace, count = os.replace, [0]
def dies(*args):
    count[0] += 1
    if ".saving-" in str(args[0]) and Path(args[1]).name == "model.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*args)
os.replace = dies
model.save_model({str(folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    with pytest.raises(ModelFolderError, match=r"has no pipeline\.json"):
        read_model_folder(folder)
    open_model("binary").save_model(str(folder))
    assert read_model_folder(folder).decision.kind == "binary"


def test_interrupted_replacement_is_restored(tmp_path):
    def write(content):
        return lambda folder: (folder.mkdir(), (folder / "file").write_text(content))

    best = tmp_path / "best"
    replace_folder(best, write("one"))
    replace_folder(best, write("two"))
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    best.rename(tmp_path / ".best.old")  # state after a kill between the two renames

    def fails(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(best, fails)
    assert (best / "file").read_text() == "two"


def test_interrupted_training_leaves_usable_model():
    model = open_model("binary", no_save=True, evaluate_during_training=True)
    frame = train_frame("binary")

    def interrupted(true, found):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train_model(frame, eval_df=frame, mine=interrupted)
    assert not model.model.training
    assert all(parameter.requires_grad for parameter in model.model.parameters())
    model.model.train()
    texts = frame["text"].tolist()
    np.testing.assert_array_equal(model.predict(texts)[1], model.predict(texts)[1])


@pytest.mark.parametrize(("every", "steps"), [(3, 6), (1, 2)])
def test_step_evaluations_count_for_patience(every, steps):
    args = {"evaluate_during_training": True, "evaluate_during_training_steps": every, "num_train_epochs": 8,
            "use_early_stopping": True, "early_stopping_patience": 0, "no_save": True,
            "early_stopping_metric": "flat"}  # fmt: skip
    frame = train_frame("binary")
    assert open_model("binary", **args).train_model(frame, eval_df=frame, flat=lambda true, found: 1.0)[0] == steps


def test_no_checkpoints_for_disabled_evaluations(tmp_path):
    folder = tmp_path / "out"
    open_model("binary", save_steps=-1, save_model_every_epoch=False, evaluate_during_training_steps=1,
               output_dir=str(folder)).train_model(train_frame("binary"))  # fmt: skip
    assert not [path for path in folder.iterdir() if path.is_dir()]
    again = tmp_path / "steps"
    open_model("binary", save_steps=3, save_model_every_epoch=False, output_dir=str(again)).train_model(
        train_frame("binary")
    )
    assert [path.name for path in again.iterdir() if path.is_dir()] == ["checkpoint-3"]


def test_api_calls_of_common_scripts(tmp_path):
    model = open_model("binary", output_dir=str(tmp_path / "out"))
    model.save_model(str(tmp_path / "a"), model=model.model, results={"mcc": 1.0})
    assert (tmp_path / "a" / "eval_results.txt").read_text() == "mcc = 1.0\n"
    model.save_model_args(str(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "model_args.json").read_text())["model_class"] == "ClassificationModel"
    assert "classifier.weight" in model.get_named_parameters()
    assert model.tokenizer.tokenize("free money") == model.tokenizer.convert_ids_to_tokens(
        model.tokenizer("free money", add_special_tokens=False)["input_ids"]
    )
    assert model.tokenizer is model.tokenizer
    assert not hasattr(ClassificationArgs(), "foo")
    several = open_model("multilabel", evaluate_during_training=True, no_save=True)
    frame = train_frame("multilabel")
    assert len(several.train_model(frame, True, frame)[1]["LRAP"]) == 1
    for kwargs in ({"weight": "balanced"}, {"onnx_execution_provider": None, "global_attention_fn": None}):
        plain = ClassificationModel(
            "bert", str(golden.HERE / "binary"), use_cuda=False, args={"no_save": True}, **kwargs
        )
        assert plain.train_model(train_frame("binary"))[0] == 3
    with pytest.raises(SettingsError, match="remote code never runs"):
        ClassificationModel("bert", str(golden.HERE / "binary"), trust_remote_code=True)
    with pytest.raises(SettingsError, match="output_hidden_states is refused"):
        ClassificationModel("bert", str(golden.HERE / "binary"), args={"config": {"output_hidden_states": True}})
    predictions = model.predict(np.array([["a", "b"], ["c", "d"]]))[0]
    assert predictions.shape == (2,)
    assert model.predict([12, 3.5])[0].shape == (2,), "numbers become text, as in Simple Transformers"


def test_missing_values_and_text_files(tmp_path):
    model = open_model("binary")
    for missing in (None, float("nan"), np.float32("nan"), pd.NA, pd.NaT):
        with pytest.raises(DataError, match="text 1: the text is null"):
            model.predict(["a", missing])
    with pytest.raises(DataError, match="text 1: the text is not valid UTF-8"):
        model.predict(["a", "b\ud800"])
    with pytest.raises(DataError, match="predict takes a list of texts"):
        model.predict("one text")
    for labels in ([0, None], pd.array([0, None], dtype="Int64")):
        with pytest.raises(DataError, match="row 1 has no label"):
            model.eval_model(pd.DataFrame({"text": ["a", "b"], "labels": labels}))
    with pytest.raises(DataError, match=r"nowhere\.tsv does not exist; give a Parquet, \.csv, \.tsv or \.jsonl file"):
        model.eval_model(str(tmp_path / "nowhere.tsv"))
    rows = train_frame("binary", 6).assign(text=["a", "b b", "c", "d", "e", "f"])
    rows.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
    assert model.eval_model(str(tmp_path / "rows.tsv"))[0] == model.eval_model(rows)[0]
    with pytest.raises(SettingsError, match=r"^num_train_epochs=1\.5 must be int"):
        open_model("binary", num_train_epochs=1.5, no_save=True).train_model(rows)
    assert open_model("binary", num_train_epochs=1.0, no_save=True).train_model(rows)[0] == 1


def test_other_metrics_or_valid_data_restart_training(tmp_path):
    frame = train_frame("binary")
    args = {"evaluate_during_training": True, "save_steps": 2, "output_dir": str(tmp_path / "out")}
    open_model("binary", **args).train_model(frame, eval_df=frame, mine=lambda true, found: 1.0)
    path = str(tmp_path / "out" / "checkpoint-2")
    settings = {"output_dir": str(tmp_path / "two"), "overwrite_output_dir": True}
    with pytest.warns(UserWarning, match="other metrics; training starts again"):
        ClassificationModel("bert", path, args=settings, use_cuda=False).train_model(frame, eval_df=frame)
    with pytest.warns(UserWarning, match="other validation data; training starts again"):
        ClassificationModel("bert", path, args=settings, use_cuda=False).train_model(
            frame, eval_df=frame[:10], mine=lambda true, found: 1.0
        )


def test_training_uses_float32_weights(tmp_path):
    frame = train_frame("binary")
    args = {"no_save": True, "learning_rate": 1e-5, "fp16": False}
    full, half = open_model("binary", **args), open_model("binary", dtype="bfloat16", **args)
    half.predict(["a"])
    for model in (full, half):
        model.train_model(frame)
    for name, tensor in full.model.state_dict().items():
        assert half.model.state_dict()[name].equal(tensor), name
    texts = frame["text"].tolist()
    assert not np.array_equal(half.predict(texts)[1], full.predict(texts)[1])
    np.testing.assert_allclose(half.predict(texts)[1], full.predict(texts)[1], atol=0.1)


def test_facade_and_core_agree_on_core_folder(tmp_path, folders):
    path = folders["multiclass"].path
    texts = golden.read_texts()
    core = Scorer.load(str(path), compute=ComputeSettings(dtype="float32", device="cpu")).predict(texts)
    facade = ClassificationModel("auto", str(path), use_cuda=False)
    assert facade.predict(texts)[0] == core["predicted_label"].to_pylist()
    facade.save_model(str(tmp_path / "again"))
    again = read_model_folder(tmp_path / "again")
    assert (again.decision, again.windows) == (folders["multiclass"].decision, folders["multiclass"].windows)


def test_bertweet_keeps_its_merges(tmp_path):
    from transformers import AutoTokenizer

    from pipelines.text.pretrained import save_tokenizer
    from tests import tiny

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    tiny.save_python_tokenizer(tmp_path / "old", "bertweet")
    expected = AutoTokenizer.from_pretrained(tmp_path / "old")("then there in the inner van", add_special_tokens=False)
    for opened in (save_tokenizer(str(tmp_path / "old"), tmp_path / "new"), load_tokenizer(tmp_path / "new")):
        (found,) = opened.encode(["then there in the inner van"]).to_arrow().to_pylist()
        assert found == expected["input_ids"]
    assert len(found) < 20


def test_bertweet_windows_match_core(tmp_path):
    args = {"sliding_window": True, "max_seq_length": 32, "window_plan": "simpletransformers"}
    facade = ClassificationModel("bertweet", str(golden.HERE / "roberta"), args=args, use_cuda=False)
    facade.save_model(str(tmp_path / "m"))
    scorer = Scorer.load(str(tmp_path / "m"), compute=ComputeSettings(dtype="float32", device="cpu"))
    assert scorer.plan.budget == 30
    labels = scorer.predict(golden.read_texts())["predicted_label"].to_pylist()
    assert labels == [str(label) for label in facade.predict(golden.read_texts())[0]]


def test_convert_detects_kind(tmp_path):
    open_model("multilabel").save_model(str(tmp_path / "ours"))
    with pytest.raises(ModelFolderError, match="is a finished model folder already; there is nothing to convert"):
        convert(str(tmp_path / "ours"), str(tmp_path / "new"))
    (tmp_path / "ours" / "pipeline.json").unlink()
    assert convert(str(tmp_path / "ours"), str(tmp_path / "new")).decision.kind == "multilabel"
    with pytest.raises(SettingsError, match="has 3 logits"):
        convert(str(tmp_path / "ours"), str(tmp_path / "wrong"), "regression")
    assert convert(str(golden.HERE / "multiclass"), str(tmp_path / "kind"), "multilabel").decision.kind == "multilabel"
    assert os.listdir(tmp_path / "kind")


def test_multilabel_balanced_pos_weight():
    model = MultiLabelClassificationModel("bert", str(golden.HERE / "multilabel"), num_labels=3, pos_weight="balanced",
                                          args={"no_save": True, "silent": True}, use_cuda=False)  # fmt: skip
    assert model.train_model(train_frame("multilabel"))[0] == 3


def test_dtype_may_change_between_calls():
    model = open_model("binary", dtype="bfloat16")
    raw = {}
    for dtype in ("bfloat16", "float32", "float16", "bfloat16"):
        model.args.dtype = dtype
        raw.setdefault(dtype, []).append(model.predict(["one text", "another one"])[1])
    assert (raw["bfloat16"][0] == raw["bfloat16"][1]).all()
    assert not (raw["bfloat16"][0] == raw["float16"][0]).all()
    np.testing.assert_allclose(raw["float16"][0], raw["float32"][0], atol=0.01)
