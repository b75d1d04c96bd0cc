"""The facades against stored answers of Simple Transformers (made by golden/freeze_simpletransformers.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError, ModelFolderError, OutputError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.simpletransformers.arguments import ARGUMENTS, SCHEDULERS, markdown_table
from pipelines.simpletransformers.inputs import read_rows
from pipelines.simpletransformers.models import (
    ClassificationArgs,
    ClassificationModel,
    MultiLabelClassificationArgs,
)
from pipelines.training.corpus import Corpus
from pipelines.training.loop import Hooks, TrainLoop
from pipelines.training.losses import resolve_loss
from pipelines.training.order import steps_of, training_windows
from pipelines.training.state import BestMetric
from tests.simpletransformers.facades import open_model, train_frame
from tests.simpletransformers.golden import freeze_simpletransformers as golden

ANSWERS = json.loads((golden.HERE / "answers.json").read_text())
CASES = [(kind, case) for kind, cases in golden.CASES.items() for case in cases]
pytestmark = pytest.mark.filterwarnings("ignore:without effect here")


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_predictions_match_simpletransformers(kind, case):
    predictions, outputs = open_model(kind, **golden.CASES[kind][case]).predict(golden.read_texts())
    expected = ANSWERS[kind][case]
    np.testing.assert_allclose(predictions, expected["predictions"], atol=1e-4)
    assert len(outputs) == len(expected["outputs"]) == 50
    for found, theirs in zip(outputs, expected["outputs"], strict=True):
        assert np.shape(found) == np.shape(theirs)
        np.testing.assert_allclose(found, theirs, atol=1e-4)


def test_golden_cases_differ():
    binary, multiclass = ANSWERS["binary"], ANSWERS["multiclass"]
    for kind in (binary, multiclass):
        assert min(np.bincount(kind["windows"]["predictions"])) >= 5, "every label is predicted"
    assert binary["tie_0"]["predictions"] != binary["windows"]["predictions"]
    assert binary["int_stride"]["outputs"] != binary["windows"]["outputs"] != binary["plain"]["outputs"]
    assert multiclass["tie_0"]["predictions"] != multiclass["tie_2"]["predictions"]
    assert max(len(windows) for windows in binary["windows"]["outputs"]) > 5
    multilabel = ANSWERS["multilabel"]
    assert len({json.dumps(multilabel[case]["predictions"]) for case in ("plain", "zero", "list")}) == 3


@pytest.mark.parametrize("kind", golden.CASES)
def test_metrics_match_simpletransformers(kind):
    frame = pd.DataFrame({"text": golden.read_texts(), "labels": golden.read_labels(kind)})
    result, outputs, wrong = open_model(kind).eval_model(frame)
    expected = ANSWERS[kind]["metrics"]
    for name, value in expected["result"].items():
        assert result[name] == pytest.approx(value, abs=1e-4), name
    assert [item.guid for item in wrong] == expected["wrong"]
    assert wrong[0].text_a == frame["text"][wrong[0].guid]
    np.testing.assert_allclose(outputs, ANSWERS[kind]["plain"]["outputs"], atol=1e-4)


@pytest.mark.parametrize("kind", golden.CASES)
@pytest.mark.parametrize("windows", [False, True])
def test_train_evaluate_predict_save_load(kind, windows, tmp_path, capsys):
    model = open_model(kind, sliding_window=windows, output_dir=str(tmp_path / "out"), num_train_epochs=2)
    frame = train_frame(kind)
    steps, loss = model.train_model(frame)
    assert steps >= 6
    assert 0 < loss < 100
    result, outputs, _ = model.eval_model(frame, mine=lambda true, predicted: 7.0)
    assert result["mine"] == 7.0
    assert np.isfinite(result["eval_loss"])
    texts = frame["text"].tolist()
    first, second = model.predict(texts), model.predict(texts)
    assert np.array_equal(first[0], second[0]), "a second call gives the same answer"
    assert len(outputs) == len(first[1]) == 24
    again = type(model)("auto", str(tmp_path / "out"), use_cuda=False)
    assert again.args.sliding_window == windows
    reopened = again.predict(texts)
    assert np.array_equal(np.asarray(reopened[0]), np.asarray(first[0]))
    for left, right in zip(reopened[1], first[1], strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    core = Scorer.load(str(tmp_path / "out")).predict(texts).to_pylist()
    column = {"multilabel": "predicted_labels", "regression": "predicted_value"}.get(kind, "predicted_label")
    assert len(core) == 24
    assert core[0][column] is not None, "score and serve can use the saved folder"
    assert capsys.readouterr().out == "", "nothing is printed on stdout"


def test_string_labels_round_trip(tmp_path):
    frame = train_frame("binary").assign(labels=["ham", "spam"] * 12)
    args = {"labels_list": ["ham", "spam"], "output_dir": str(tmp_path / "out"), "silent": True}
    model = ClassificationModel("auto", str(golden.HERE / "binary"), args=args, use_cuda=False)
    model.train_model(frame)
    assert set(model.predict(["a", "b"])[0]) <= {"ham", "spam"}
    assert ClassificationModel("bert", str(tmp_path / "out")).args.labels_map == {"ham": 0, "spam": 1}
    with pytest.raises(DataError, match="labels outside the label set: 'eggs'"):
        model.eval_model(frame.assign(labels="eggs"))


def test_input_data_types(tmp_path):
    model = open_model("binary", sliding_window=True, no_save=True)
    frame = train_frame("binary")
    rows = [[text, int(label)] for text, label in frame.itertuples(index=False)]
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "rows.parquet")
    unnamed = pd.DataFrame(rows)
    results = [model.eval_model(data)[0] for data in (frame, rows, str(tmp_path / "rows.parquet"), unnamed)]
    assert all(result == results[0] for result in results)
    pairs = pd.DataFrame({"text_a": frame["text"], "text_b": frame["text"] * 3, "labels": frame["labels"]})
    predictions, outputs = model.predict(pairs[["text_a", "text_b"]].to_numpy().tolist())
    assert len(predictions) == 24
    assert len(outputs[-1]) > 3, "pairs have windows too"
    assert model.eval_model(pairs)[0]["accuracy"] == np.mean(predictions == frame["labels"].to_numpy())
    assert len(model.predict([])[0]) == 0


@pytest.mark.parametrize("kind", golden.LOSSES)
def test_first_losses_match_simpletransformers(kind):
    case = {**golden.LOSSES[kind], **golden.no_dropout()}
    model = open_model(kind, weights=golden.WEIGHTS[kind], **case)
    frame = train_frame(kind, 50)
    settings, scorer = model._train_settings(), model._engine.scorer()
    corpus = Corpus.of(model._engine.labelled(read_rows(frame)))
    windows = training_windows(scorer, corpus, settings)
    data = windows.first()
    order = np.array(ANSWERS[kind]["training"]["order"])
    num_windows = len(data.cut.length_W)
    assert len(order) == num_windows * settings.epochs
    loss = resolve_loss(settings, scorer.decision, data.targets)

    def steps(epoch, skip):
        assert skip == 0
        mine = order[epoch * num_windows : (epoch + 1) * num_windows]
        batches = [mine[start : start + 8] for start in range(0, num_windows, 8)]
        return steps_of(batches, data, loss, rank=0, world_size=1)

    metric = BestMetric.of(settings, scorer.decision)
    loop = TrainLoop(scorer.model, windows, settings, loss, metric, hooks=Hooks(steps=steps))
    expected = ANSWERS[kind]["training"]["losses"]
    np.testing.assert_allclose(loop.run().losses[:10], expected, atol=1e-4)


def test_progress_scores_and_best_model(tmp_path):
    model = open_model("binary", evaluate_during_training=True, num_train_epochs=3, learning_rate=1e-2,
                       output_dir=str(tmp_path / "out"), evaluate_during_training_steps=2)  # fmt: skip
    frame = train_frame("binary")
    steps, progress = model.train_model(frame, eval_df=frame, mine=lambda true, predicted: float(np.mean(predicted)))
    assert progress["global_step"] == [2, 3, 4, 6, 8, 9]
    assert steps == 9
    assert len(progress["mcc"]) == len(progress["train_loss"]) == len(progress["mine"]) == 6
    assert model.eval_model(frame)[0]["eval_loss"] == pytest.approx(min(progress["eval_loss"]), rel=1e-5)
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    epochs = [f"checkpoint-{3 * epoch}-epoch-{epoch}" for epoch in (1, 2, 3)]
    assert folders == sorted(["best_model", "checkpoint-2", "checkpoint-4", "checkpoint-8", *epochs])
    rows = pd.read_csv(tmp_path / "out" / "training_progress_scores.csv")
    assert rows["eval_loss"].tolist() == pytest.approx(progress["eval_loss"])
    best = ClassificationModel("bert", str(tmp_path / "out" / "best_model"), use_cuda=False)
    assert best.eval_model(frame)[0]["eval_loss"] == pytest.approx(min(progress["eval_loss"]), rel=1e-5)
    assert "eval_loss = " in (tmp_path / "out" / "best_model" / "eval_results.txt").read_text()


def test_early_stopping_keeps_best_weights(log_lines):
    frame = train_frame("binary")
    values = iter([0.5, 0.9, 0.1, 0.2, 0.3, 0.4])
    args = {"evaluate_during_training": True, "num_train_epochs": 6, "no_save": True, "learning_rate": 1e-2,
            "use_early_stopping": True, "early_stopping_consider_epochs": True, "early_stopping_patience": 1,
            "early_stopping_metric": "mine", "early_stopping_metric_minimize": False, "silent": False}  # fmt: skip
    model = open_model("binary", **args)
    seen = []

    def mine(true, predicted):
        seen.append(model.model.state_dict()["classifier.bias"].tolist())
        return next(values)

    steps, progress = model.train_model(frame, eval_df=frame, mine=mine)
    assert progress["mine"] == [0.5, 0.9, 0.1, 0.2], "the second evaluation without improvement ends the run"
    assert steps == 12
    assert model.model.state_dict()["classifier.bias"].tolist() == seen[1] != seen[3]
    assert any(line.startswith("stopped early") for line in log_lines)
    with pytest.raises(SettingsError, match="metric='f2' is not a metric of kind binary; it has loss, mcc, "):
        open_model("binary", **{**args, "early_stopping_metric": "f2"}).train_model(frame, eval_df=frame)


def test_resume_from_checkpoint(tmp_path):
    frame = train_frame("binary")
    args = {"num_train_epochs": 3, "learning_rate": 1e-2, "evaluate_during_training": True, "save_steps": 4}
    whole = open_model("binary", output_dir=str(tmp_path / "mymodel-7"), **args)
    steps, progress = whole.train_model(frame, eval_df=frame)
    assert steps == 9, "a number in the folder name is not a step"
    checkpoint = shutil.copytree(tmp_path / "mymodel-7" / "checkpoint-4", tmp_path / "saved")
    resumed = ClassificationModel("bert", str(checkpoint), use_cuda=False, args={"output_dir": str(tmp_path / "two")})
    again_steps, again = resumed.train_model(frame, eval_df=frame)
    assert (again_steps, again["global_step"]) == (9, progress["global_step"])
    np.testing.assert_allclose(again["eval_loss"], progress["eval_loss"], atol=1e-6)
    for name, tensor in whole.model.state_dict().items():
        np.testing.assert_allclose(resumed.model.state_dict()[name].numpy(), tensor.numpy(), atol=1e-6, err_msg=name)
    other = ClassificationModel("bert", str(checkpoint), use_cuda=False, args={"output_dir": str(tmp_path / "three")})
    with pytest.warns(UserWarning, match="a checkpoint of another run: other training data; training starts again"):
        assert other.train_model(frame[:8], eval_df=frame)[0] == 3


def test_custom_parameter_groups_and_layers(tmp_path):
    frame = train_frame("binary")
    args = {"no_save": True, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    layers = [{"layer": 1, "lr": 1e-3}]
    groups = [{"params": ["classifier.weight"], "lr": 5e-2}]
    model = open_model("binary", custom_layer_parameters=layers, custom_parameter_groups=groups,
                       train_custom_parameters_only=True, **args)  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    for _ in range(2):
        model.train_model(frame)
    moved = {name for name, tensor in model.model.state_dict().items() if not tensor.equal(before[name])}
    assert "classifier.weight" in moved
    assert all(name == "classifier.weight" or "layer.1." in name for name in moved)
    assert any("layer.1." in name for name in moved)
    assert layers == [{"layer": 1, "lr": 1e-3}], "the caller's lists are not modified"
    with pytest.raises(
        SettingsError, match=r"'classifier.weigth', which the model lacks; the nearest is \['classifier.w"
    ):
        open_model("binary", custom_parameter_groups=[{"params": ["classifier.weigth"]}], **args).train_model(frame)
    with pytest.raises(SettingsError, match=r"'layer': 9.* fits no parameter"):
        open_model("binary", custom_layer_parameters=[{"layer": 9}], **args).train_model(frame)


def test_special_tokens_list_is_never_split(tmp_path):
    text = "money [E1] back [/E1] today"
    model = open_model("binary", special_tokens_list=["[E1]", "[/E1]"], output_dir=str(tmp_path / "out"))
    ids = model._engine._tokenizer.encode([text]).ids
    assert sum(ids >= 400) == 2
    assert model.model.get_input_embeddings().weight.shape[0] == 402
    model.train_model(train_frame("binary").assign(text=text))
    again = ClassificationModel("bert", str(tmp_path / "out"), use_cuda=False)
    np.testing.assert_allclose(again.predict([text])[1], model.predict([text])[1], atol=1e-6)


def test_scalars_reach_tensorboard(tmp_path):
    folder = tmp_path / "board"
    model = open_model("binary", tensorboard_dir=str(folder), logging_steps=1, no_save=True,
                       evaluate_during_training=True)  # fmt: skip
    frame = train_frame("binary")
    model.train_model(frame, eval_df=frame)
    (events,) = folder.iterdir()
    content = events.read_bytes()
    for tag in (b"loss", b"lr", b"valid/mcc"):
        assert tag in content


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_optimizer_and_schedule_trains(optimizer, scheduler):
    model = open_model("binary", optimizer=optimizer, scheduler=scheduler, learning_rate=1e-3, no_save=True)
    steps, loss = model.train_model(train_frame("binary"))
    assert steps == 3
    assert np.isfinite(loss)


def test_prob_metrics_get_raw_outputs():
    frame = train_frame("binary")
    outputs = open_model("binary").predict(frame["text"].tolist())[1]
    result, _, _ = open_model("binary").eval_model(frame, prob_shape=lambda true, raw: raw.shape)
    assert result["prob_shape"] == outputs.shape == (24, 2)


def test_seed_zero_is_used():
    def losses(seed):
        model = ClassificationModel("bert", str(golden.HERE / "multiclass"), num_labels=3, use_cuda=False,
                                    args={"manual_seed": seed, "no_save": True, "silent": True})  # fmt: skip
        return model.train_model(train_frame("multiclass"))[1]

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.name)
def test_argument_defaults_and_refusals(argument):
    for kind in (ClassificationArgs, MultiLabelClassificationArgs):
        assert getattr(kind(**{argument.name: argument.default}), argument.name) == argument.default
    if argument.use == "refused":
        with pytest.raises(SettingsError, match=f"argument {argument.name}=.* is refused: "):
            ClassificationArgs(**{argument.name: ["something else"]})
    assert argument.note


def test_docs_argument_table_is_current():
    page = (Path(__file__).parent.parent.parent / "docs" / "reference" / "simpletransformers.md").read_text()
    assert markdown_table() in page


def test_error_messages(tmp_path):
    path = str(golden.HERE / "binary")
    with pytest.raises(SettingsError, match="unknown argument 'num_train_epoch'; did you mean 'num_train_epochs'"):
        ClassificationModel("bert", path, args={"num_train_epoch": 3})
    with pytest.raises(SettingsError, match="did you mean 'max_seq_length'"):
        ClassificationArgs().max_seq_len = 3
    with pytest.raises(ModelFolderError, match=r"model_type is 'roberta' but .* holds a 'bert'"):
        ClassificationModel("roberta", path)
    with pytest.raises(SettingsError, match="tie_value=2 is not a label id"):
        ClassificationModel("bert", path, args={"tie_value": 2})
    with pytest.raises(SettingsError, match="num_labels=3 but labels_list names 2"):
        ClassificationModel("bert", path, num_labels=3, args={"labels_list": ["a", "b"]})
    with pytest.raises(SettingsError, match="device='cuda' is not available"):
        ClassificationModel("bert", path, use_cuda=True)
    with pytest.raises(SettingsError, match="steps 115 tokens"):
        ClassificationModel("bert", path, args={"sliding_window": True, "max_seq_length": 64, "stride": 115})
    model = open_model("binary", output_dir=path)
    with pytest.raises(OutputError, match="set overwrite_output_dir=True"):
        model.train_model(train_frame("binary"))
    with pytest.raises(DataError, match="put the text into a list"):
        model.predict("text")
    with pytest.raises(DataError, match="needs text and labels"):
        model.eval_model(pd.DataFrame({"a": ["x"]}))
    with pytest.raises(DataError, match="text 1: the text is null"):
        model.predict(["a", None])
    with pytest.raises(DataError, match="evaluate_during_training needs eval_df"):
        open_model("binary", evaluate_during_training=True, no_save=True).train_model(train_frame("binary"))


def test_inert_arguments_warn():
    with pytest.warns(
        UserWarning, match=r"without effect here: .*use_multiprocessing.*docs/reference/simpletransformers\.md"
    ):
        ClassificationModel("bert", str(golden.HERE / "binary"), args={"use_multiprocessing": False}, use_cuda=False)
