"""Facades as objects of Python programs: threads, pickle, plain calls of their model, forms of data, arguments."""

import datetime
import gzip
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from pipelines.classification import ClassificationArgs, ClassificationModel
from pipelines.decisions.labels import find_labels
from pipelines.errors import DataError, ModelFolderError, SettingsError, UnknownArgumentError
from pipelines.model.scorer import Scorer
from pipelines.settings import ComputeSettings
from pipelines.simpletransformers.inputs import read_rows
from pipelines.simpletransformers.loading import loss_weights
from pipelines.storage.tables import as_table
from tests import tiny
from tests.simpletransformers.facades import open_model, train_frame
from tests.simpletransformers.golden import freeze_simpletransformers as golden

pytestmark = pytest.mark.filterwarnings("ignore:without effect here")
TEXTS = [text[:400] for text in golden.read_texts()[:12]]


def test_threads_match_serial_calls():
    """Several models and dtypes in one process, each used by several threads."""
    models = [open_model("binary"), open_model("multilabel"), open_model("binary", dtype="bfloat16")]
    calls = [(model, text) for model in models for text in TEXTS] * 3
    expected = [model.predict([text])[1] for model, text in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: call[0].predict([call[1]])[1], calls))
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left[0], right[0], atol=1e-6)


def test_predictions_wait_for_training():
    model = open_model("binary", no_save=True, num_train_epochs=2)
    before = model.predict(TEXTS)[1]
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(model.train_model, train_frame("binary"))
        during = [model.predict(TEXTS)[1] for _ in range(20)]
        training.result()
    after = model.predict(TEXTS)[1]
    for outputs in during:  # before or after training, never in between
        assert any(np.allclose(outputs[0], state[0], atol=1e-6) for state in (before, after))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickle(dtype):
    model = open_model("binary", dtype=dtype)
    expected = model.predict(TEXTS)[1]
    again = pickle.loads(pickle.dumps(model))
    for left, right in zip(again.predict(TEXTS)[1], expected, strict=True):
        np.testing.assert_array_equal(left, right)
    assert again.args.sliding_window == model.args.sliding_window
    again.train_model(train_frame("binary"), args={"no_save": True})
    np.testing.assert_array_equal(model.predict(TEXTS)[1][0], expected[0])


def test_pickle_of_scorer(spam_folder, emails):
    for dtype in ("float32", "bfloat16"):
        scorer = Scorer.load(spam_folder, compute=ComputeSettings(dtype=dtype, device="cpu"))
        again = pickle.loads(pickle.dumps(scorer))
        assert again.model.is_packed
        texts = emails["text"].to_pylist()[:5]
        assert again.predict(texts).equals(scorer.predict(texts))


@pytest.mark.parametrize("kind", ["binary", "roberta"])
def test_model_and_tokenizer_are_ordinary(kind):
    model = open_model(kind)
    assert model._engine.model.is_packed
    texts = [text[:40] for text in TEXTS[:4]]
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(golden.HERE / kind).eval()
    inputs = model.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = plain(**inputs).logits
        torch.testing.assert_close(model.model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    pipe = transformers.pipeline("text-classification", model=model.model, tokenizer=model.tokenizer, device="cpu")
    scores = [item["score"] for item in pipe(texts)]
    np.testing.assert_allclose(scores, expected.softmax(-1).amax(-1), atol=1e-5)
    model.model(**inputs).logits.sum().backward()
    assert next(model.model.parameters()).grad is not None


def test_added_tokens_are_used_and_saved(tmp_path):
    model = open_model("binary")
    text = "hello <company> again"
    before = model.predict([text])[1][0]
    model.tokenizer.add_tokens(["<company>"])
    with pytest.raises(ModelFolderError, match=r"resize them: model\.model\.resize_token_embeddings"):
        model.predict([text])
    torch.manual_seed(0)
    model.model.resize_token_embeddings(len(model.tokenizer))
    after = model.predict([text])[1][0]
    assert not np.allclose(before, after, atol=1e-5)
    model.save_model(str(tmp_path / "saved"))
    again = ClassificationModel("bert", str(tmp_path / "saved"), use_cuda=False)
    np.testing.assert_allclose(again.predict([text])[1][0], after, atol=1e-5)
    model.train_model(train_frame("binary"), args={"no_save": True})


def test_changed_weights_are_used_in_every_dtype():
    model = open_model("binary", dtype="bfloat16")
    before = model.predict(TEXTS)[1][0]
    with torch.no_grad():
        model.model.classifier.bias += 1.0
    np.testing.assert_allclose(model.predict(TEXTS)[1][0], before + 1, atol=1e-5)


LABELS = [0, 1, 0]
FORMS = {
    "label": lambda: pd.DataFrame({"text": list("abc"), "label": LABELS}),
    "target": lambda: pd.DataFrame({"target": LABELS, "text": list("abc")}),
    "nullable": lambda: pd.DataFrame({"text": pd.array(list("abc"), "string"), "labels": pd.array(LABELS, "Int64")}),
    "object": lambda: pd.DataFrame({"text": list("abc"), "labels": LABELS}, dtype=object, index=[7, 3, 9]),
    "categorical": lambda: pd.DataFrame({"text": pd.Categorical(list("abc")), "labels": LABELS}),
    "polars": lambda: pl.DataFrame({"text": list("abc"), "labels": LABELS}),
    "dataset": lambda: datasets.Dataset.from_dict({"text": list("abc"), "label": LABELS}),
    "arrow": lambda: pa.table({"text": list("abc"), "label": LABELS}),
    "columns": lambda: {"text": list("abc"), "labels": np.array(LABELS)},
    "rows": lambda: [{"text": text, "labels": label} for text, label in zip("abc", LABELS, strict=True)],
    "pairs of values": lambda: [[text, label] for text, label in zip("abc", LABELS, strict=True)],
    "numpy": lambda: np.array([["a", 0], ["b", 1], ["c", 0]], dtype=object),
    "unnamed": lambda: pd.DataFrame([["a", 0], ["b", 1], ["c", 0]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labelled_data(form):
    rows = read_rows(FORMS[form]())
    assert (rows.texts, rows.pairs, [int(label) for label in rows.labels]) == (list("abc"), None, LABELS)


def test_forms_of_several_labels(tmp_path):
    model = open_model("multilabel", no_save=True)
    wide = pd.DataFrame({"text": TEXTS[:4], "a": [1, 0, 1, 0], "b": [0, 0, 1, 1], "c": [True, False, True, False]})
    rows = [list(map(int, row)) for row in wide[["a", "b", "c"]].to_numpy()]
    frame = pd.DataFrame({"text": TEXTS[:4], "labels": rows})
    expected = model.eval_model(frame)[0]
    for labels in ([np.array(row) for row in rows], [tuple(row) for row in rows]):
        assert model.eval_model(frame.assign(labels=labels))[0] == expected
    model.args.label_columns = ["a", "b", "c"]
    assert model.eval_model(wide)[0] == expected
    with pytest.raises(DataError, match="no column 'd', which label_columns names"):
        read_rows(wide, ["a", "d"])
    model.args.labels_list, model.args.label_columns = ["a", "b", "c"], ["c", "a", "b"]
    assert model.eval_model(wide)[0]["eval_loss"] == expected["eval_loss"], "columns are found by name"
    model.args.label_columns = ["a", "b"]
    with pytest.raises(SettingsError, match="must be the labels of the model"):
        model.eval_model(wide)
    for text in ("101", "[1, 0, 1]"):
        with pytest.raises(DataError, match=r"the labels of row 0 are (the|a) text"):
            open_model("multilabel").eval_model(pd.DataFrame({"text": ["a"], "labels": [text]}))


def test_files(tmp_path):
    frame = train_frame("binary", 5)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    expected = read_rows(frame)
    for file in sorted(tmp_path.iterdir()):
        assert read_rows(str(file)) == expected, file.name
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"text,labels\n" * 9)[:-9])
    with pytest.raises(DataError, match=r"bad\.csv\.gz cannot be read"):
        read_rows(tmp_path / "bad.csv.gz")


def test_ambiguous_tables_are_refused_or_warned_about():
    frame = pd.DataFrame({"id": [1, 2], "body": ["a", "b"], "label": [0, 1]})
    with pytest.warns(UserWarning, match="'id' is read as the texts, and 'body' as the labels"):
        read_rows(frame)
    assert read_rows(frame.assign(text=["a", "b"])).labels == [0, 1]
    assert read_rows(pd.DataFrame({"text": ["a"], "x": [1], "y": [2]})).labels is None
    twice = pd.DataFrame([["a", "b", 0]], columns=["text", "text", "labels"])
    with pytest.raises(DataError, match="several columns named 'text'"):
        read_rows(twice)
    for bad in (7, ["a", "b"], "text", datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})):
        with pytest.raises(DataError):
            read_rows(bad)


LATER = {
    "polars": lambda: pl.LazyFrame({"text": ["a"], "label": ["x"]}),
    "datasets": lambda: datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]}).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", LATER)
def test_tables_that_are_read_later_are_refused(kind):
    for read in (read_rows, as_table):
        with pytest.raises(DataError, match="is read only later: collect it first"):
            read(LATER[kind]())


def test_columns_that_are_mappings_are_refused():
    frame = pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}, index=[5, 6])
    for read in (read_rows, as_table):
        with pytest.raises(DataError, match=r"a dict; give .*df.to_dict\('list'\)"):
            read(frame.to_dict())
        assert read(frame.to_dict("list")) is not None
        assert read(frame.to_dict("records")) is not None


def test_names_of_classes():
    """A Hugging Face dataset stores the ids of its classes; -1 means that there is no label."""
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["ham", "spam"]), "text": datasets.Value("string")}
    )
    found = datasets.Dataset.from_dict({"text": list("abc"), "label": [1, 0, -1]}, features=features)
    assert as_table(found)["label"].to_pylist() == ["spam", "ham", None]
    several = datasets.List(datasets.ClassLabel(names=["joy", "anger"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": several})
    found = datasets.Dataset.from_dict({"text": list("abc"), "label": [[0], [1, 0], []]}, features=features)
    assert as_table(found)["label"].to_pylist() == [["joy"], ["anger", "joy"], []]
    for kind in (pl.Enum(["spam", "ham"]), pl.Categorical()):
        frame = pl.DataFrame({"text": list("ab"), "label": pl.Series(["ham", "spam"], dtype=kind)})
        assert read_rows(frame).labels == ["ham", "spam"]
        assert find_labels([as_table(frame)["label"]], "binary") == ("ham", "spam")


@pytest.mark.parametrize("labels", [["1", "0", "1"], ("0", "0", "0"), np.array(["0", "1", "1"])])
def test_texts_of_digits_are_no_labels(labels):
    with pytest.raises(DataError, match=r"are the texts .*; give numbers, such as"):
        open_model("multilabel").eval_model([["a", labels], ["b", labels]])


def test_labels_that_are_lists_are_refused():
    model = open_model("binary", labels_list=["ham", "spam"])
    with pytest.raises(DataError, match=r"the label of row 1 is \['spam'\]; give one label for each text"):
        model.eval_model([["a", "ham"], ["b", ["spam"]]])


def test_predict_reads_tables():
    model = open_model("binary")
    expected = model.predict(TEXTS)[0]
    for form in (pd.DataFrame({"text": TEXTS, "id": range(len(TEXTS))}), {"text": TEXTS}, pl.Series(TEXTS),
                 pd.Series(TEXTS), np.array(TEXTS), pa.chunked_array([TEXTS]), (text for text in TEXTS)):  # fmt: skip
        assert list(model.predict(form)[0]) == list(expected)
    with pytest.raises(DataError, match=r"has no column text, or text_a and text_b; it has \['body', 'id'\]"):
        model.predict(pd.DataFrame({"body": TEXTS, "id": range(len(TEXTS))}))


def test_values_that_are_no_texts_are_refused():
    model = open_model("binary")
    assert list(model.predict([{"text": text} for text in TEXTS])[0]) == list(model.predict(TEXTS)[0])
    for wrong in (["a", b"bytes"], ["a", ["b", "c"]], [["a", "b"], "c"], [{"text": {"a": 1}}], np.array("hello"), "a",
                  [object()], [datetime.date(2020, 1, 1)], [torch.tensor(1)]):  # fmt: skip
        with pytest.raises(DataError):
            model.predict(wrong)
    assert [len(part) for part in model.predict([])] == [0, 0]


def test_pairs_by_column_names():
    model = open_model("binary")
    first, second = TEXTS[:4], TEXTS[4:8]
    expected = model.predict([list(pair) for pair in zip(first, second, strict=True)])[1]
    for names in (("text_a", "text_b"), ("text", "text_pair")):
        found = model.predict(pd.DataFrame(dict(zip(names, (first, second), strict=True))))[1]
        np.testing.assert_array_equal(found[0], expected[0])


def test_model_that_the_caller_changes():
    model = open_model("binary")
    expected = model.predict(TEXTS)[1]
    model.model.set_attn_implementation("eager")  # as transformers asks for attention weights
    for left, right in zip(model.predict(TEXTS)[1], expected, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    model.model.dropout.train()
    for left, right in zip(model.predict(TEXTS)[1], expected, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    narrow = open_model("binary", dtype="bfloat16")
    before = narrow.predict(TEXTS)[1][0]
    narrow.model.classifier.bias.data.add_(1.0)
    np.testing.assert_allclose(narrow.predict(TEXTS)[1][0], before + 1, atol=1e-5)


def test_trainings_in_threads_match_serial_ones():
    def train(seed):
        model = open_model("binary", manual_seed=seed, no_save=True)
        model.train_model(train_frame("binary", 12))
        return model.predict(TEXTS)[1]

    serial = [train(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(train, range(3)))
    for left, right in zip(found, serial, strict=True):
        np.testing.assert_allclose(left[0], right[0], atol=1e-5)


def test_json_texts_stay_as_they_are(tmp_path):
    texts = ["2020-01-01", "2020-01-01T10:00:00Z", "x" * 3_000_000, "1", "line\nbreak\u2028and another", ""]
    rows = [{"text": text, "labels": 0} for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert read_rows(tmp_path / "a.jsonl").texts == texts
    (tmp_path / "a.csv").write_text("text,labels\n" + "".join(f'"{"y" * 3_000_000}",{row}\n' for row in range(2)))
    assert [len(text) for text in read_rows(tmp_path / "a.csv").texts] == [3_000_000] * 2
    for content in ("[1]\n", "{\n", '{"text": "a"}\n{"text": \n'):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"bad\.jsonl cannot be read"):
            read_rows(tmp_path / "bad.jsonl")


def test_csv_texts_stay_texts(tmp_path):
    (tmp_path / "rows.csv").write_text("text,labels\ntrue,1\n007,0\n1e5,1\n")
    assert read_rows(tmp_path / "rows.csv").texts == ["true", "007", "1e5"]
    (tmp_path / "latin.csv").write_bytes("text,labels\ncaf\u00e9 now,1\n".encode("latin1"))
    with pytest.raises(DataError, match=r"latin\.csv cannot be read.*UTF8"):
        read_rows(tmp_path / "latin.csv")


def test_weights_by_label():
    assert loss_weights({0: 1.0, 1: 2.0}, "weight", [0, 1]) == (1.0, 2.0)
    assert loss_weights({np.int64(1): 3, np.int64(0): 1}, "weight", [0, 1]) == (1.0, 3.0)
    assert loss_weights({"spam": 2, "ham": 1}, "weight", ["ham", "spam"]) == (1.0, 2.0)
    assert loss_weights({1: 2, 0: 1}, "weight", ["ham", "spam"]) == (1.0, 2.0), "ids, where the labels have names"
    assert loss_weights(np.array([1.0, 2.0]), "weight", [0, 1]) == (1.0, 2.0)
    assert loss_weights({"0": 1, "1": 3}, "weight", [0, 1]) == (1.0, 3.0)
    assert loss_weights(pd.Series([0, 1, 1, 1]).value_counts(), "weight", [0, 1]) == (1.0, 3.0), "sorted by frequency"
    for wrong in ({0: 1.0}, {0: 1.0, 2: 1.0}, {"spam": 1, 0: 2}, 3, ["a", "b"], [1, None], {0: None, 1: 1}):
        with pytest.raises(SettingsError, match="must have one"):
            loss_weights(wrong, "weight", [0, 1])
    with pytest.raises(SettingsError, match=r"MultiLabelClassificationModel has no weight.*; use pos_weight"):
        open_model("multilabel", weights={"weight": [1, 2, 3]})
    with pytest.raises(SettingsError, match=r"ClassificationModel has no pos_weight.*; use weight"):
        open_model("binary", weights={"pos_weight": [1, 2]})
    with pytest.raises(UnknownArgumentError, match="weight is a parameter of the model class"):
        ClassificationArgs(weight=[1, 2])


def test_numbers_of_numpy():
    args = ClassificationArgs(num_train_epochs=np.int64(2), learning_rate=np.float32(0.5), stride=np.int32(4))
    assert (type(args.num_train_epochs), type(args.stride)) == (int, int)
    model = open_model("binary", train_batch_size=np.int64(8), max_seq_length=np.int16(32), no_save=True)
    assert model.train_model(train_frame("binary"))[0] > 0


def test_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="wandb_project has no effect: pip install wandb") as caught:
        open_model("binary", wandb_project="mine", no_save=True).train_model(train_frame("binary"))
    assert sum("wandb" in str(warning.message) for warning in caught) == 1
    open_model("binary", wandb_project="", no_save=True).train_model(train_frame("binary"))


def test_wandb_gets_every_number(monkeypatch):
    """Without wandb itself: its two calls, as its documentation gives them."""
    logged, started, ended = [], [], []
    run = SimpleNamespace(log=logged.append, finish=lambda: ended.append(True))

    def init(**options):
        started.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, init=init))
    monkeypatch.setattr("pipelines.progress.PROGRESS_SECONDS", 0)
    own = {"wandb_project": "mine", "wandb_kwargs": {"name": "first"}, "evaluate_during_training": True}
    model = open_model("binary", **own, no_save=True)
    model.train_model(train_frame("binary"), eval_df=train_frame("binary"))
    (options,) = started
    assert (options["project"], options["name"], ended) == ("mine", "first", [True])
    assert options["config"]["wandb_project"] == "mine"
    assert [numbers["step"] for numbers in logged if "step" in numbers] == [1, 2, 3]
    assert {"loss", "learning_rate"} <= logged[0].keys()
    assert "valid_mcc" in logged[-1]


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    options = {"mode": "offline", "dir": str(tmp_path)}
    open_model("binary", wandb_project="mine", wandb_kwargs=options, no_save=True).train_model(train_frame("binary"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_lower_case(tmp_path, emails):
    for kind, labels in (("binary", 2), ("multilabel", 3)):
        base = tmp_path / kind
        tiny.classifier(num_labels=labels).save_pretrained(base)
        tiny.save_tokenizer(base, emails["text"].to_pylist()[:40])  # lowercases
        facade = type(open_model(kind))
        for value in (None, True, False):
            args = {} if value is None else {"do_lower_case": value}
            model = facade("bert", str(base), num_labels=labels, args=args, use_cuda=False)
            lower, upper = model.predict(["free money now", "Free MONEY now"])[1]
            assert np.allclose(lower, upper, atol=1e-6) == (value is not False)
            model.save_model(str(tmp_path / f"{kind}-{value}"))
            again = facade("bert", str(tmp_path / f"{kind}-{value}"), use_cuda=False)
            np.testing.assert_allclose(again.predict(["Free MONEY now"])[1][0], upper, atol=1e-6)
