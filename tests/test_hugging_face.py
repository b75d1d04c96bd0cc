"""Classifiers of Hugging Face without pipeline.json: opened as they are, refused with a remedy, converted."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

import pipelines
from pipelines import cli
from pipelines.classifier_config import decision_of
from pipelines.errors import ModelFolderError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.model_files import model_location
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings
from pipelines.simpletransformers.convert import convert
from pipelines.simpletransformers.models import ClassificationModel
from pipelines.training.job import train_here
from tests import tiny
from tests.jobs import FLOAT32, read_scored, score_job, train_job

COMPUTE = ComputeSettings(**FLOAT32)
LABELS = {"id2label": {0: "sad", 1: "calm", 2: "glad"}, "label2id": {"sad": 0, "calm": 1, "glad": 2}}


def change_config(folder, **changes):
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture
def folder(tmp_path, emails):
    """A classifier with three labels, as transformers saves it."""
    path = tmp_path / "classifier"
    tiny.classifier(num_labels=3, **LABELS).save_pretrained(path)
    tiny.save_tokenizer(path, emails["text"].to_pylist()[:40])
    return path


def test_every_command_opens_it(folder, emails, tmp_path, log_lines, capsys):
    data = tmp_path / "data.parquet"
    table = emails.slice(0, 12)
    labels = pa.array([("sad", "calm", "glad")[row % 3] for row in range(12)])
    pq.write_table(pa.table({"text": table["text"], "label": labels}), data)
    opened = read_model_folder(folder)
    assert opened.decision.labels == ("sad", "calm", "glad")
    (line,) = [line for line in log_lines if "opens with the defaults" in line]
    assert "kind multiclass (or multilabel: config.json does not say), labels sad, calm, glad" in line
    assert f"`pipelines convert {folder} NEW`" in line
    scorer = Scorer.load(folder, compute=COMPUTE)
    assert scorer.plan.max_length == 130, "the model's own limit"
    tokenizer, module = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    text = "short enough for one window"
    with torch.no_grad():
        expected = module(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    np.testing.assert_allclose(scorer.predict(text)["scores"].to_pylist()[0], expected, atol=1e-5)
    pipelines.score(folder, data, tmp_path / "out", replicas=0, **FLOAT32)
    assert read_scored(tmp_path / "out")["error"].null_count == 12
    assert pipelines.evaluate(folder, data, **FLOAT32).rows == 12
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"]["kind"] == "multiclass"
    arguments = ["--input", str(data), "--output", str(tmp_path / "new"), "--dry-run", "--rate", "1000"]
    assert cli.main(["score", str(folder), *arguments]) == 0


def test_binary_classifier_can_be_tuned(tmp_path, emails):
    path = tmp_path / "binary"
    tiny.classifier(num_labels=2, id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1}).save_pretrained(path)
    tiny.save_tokenizer(path, emails["text"].to_pylist()[:40])
    result = pipelines.tune(path, emails.slice(0, 40), **FLOAT32)
    assert result.labels == ("spam",)
    assert read_model_folder(path).decision.thresholds == result.thresholds


@pytest.mark.parametrize("config", [
    {"id2label": {"0": "A"}, "problem_type": "multi_label_classification"},
    {"id2label": {"0": "A"}, "problem_type": "regression"},
    {"id2label": {"1": "B", "0": "A"}},
    {"num_labels": 2},
    {},
    {"id2label": {str(number): "abcdefghijk"[number] for number in (10, *range(10))},
     "problem_type": "single_label_classification"},
])  # fmt: skip
def test_decision_of_config(config):
    decision, is_guess = decision_of(config, where="x")
    kinds = {"multi_label_classification": "multilabel", "regression": "regression"}
    expected = kinds.get(config.get("problem_type")) or (
        "binary" if len(config.get("id2label", "ab")) < 3 else "multiclass"
    )
    assert (decision.kind, is_guess) == (expected, False)
    if len(decision.labels) == 11:
        assert decision.labels == tuple("abcdefghijk")
    elif decision.labels and config.get("id2label"):
        assert decision.labels == ("A", "B")[: len(decision.labels)]


def test_one_logit_needs_a_kind(tmp_path, emails):
    path = tmp_path / "one"
    tiny.classifier(num_labels=1).save_pretrained(path)
    change_config(path, problem_type=None, id2label={"0": "toxic"})
    tiny.save_tokenizer(path, emails["text"].to_pylist()[:40])
    message = r"one logit.*--kind regression .*--kind multilabel"
    for action in (read_model_folder, lambda path: convert(str(path), str(tmp_path / "new"))):
        with pytest.raises(SettingsError, match=message):
            action(path)
    convert(str(path), str(tmp_path / "new"), "multilabel")
    text = "some text"
    module = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        logit = module(**AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")).logits
    (row,) = Scorer.load(tmp_path / "new", compute=COMPUTE).predict(text).to_pylist()
    np.testing.assert_allclose(row["scores"], logit.sigmoid()[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["missing", "small", "large"])
def test_tokenizer_of_another_model_is_refused(folder, kind, emails, training_data, tmp_path):
    texts = emails["text"].to_pylist()[:40]
    match = "tokenizer's files are missing or belong to another model"
    if kind == "missing":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    elif kind == "small":
        tiny.save_tokenizer(folder, texts, vocab_size=200)
    else:
        tiny.save_tokenizer(folder, texts, vocab_size=700)
        match = "its model knows ids below 600"
    for action in (
        lambda: convert(str(folder), str(tmp_path / "new")),
        lambda: train_here(train_job(training_data, tmp_path / "out", model=str(folder))),
        lambda: ClassificationModel("bert", str(folder), use_cuda=False),
        lambda: Scorer.load(folder, compute=COMPUTE),
    ):
        with pytest.raises(ModelFolderError, match=match):
            action()
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "out").exists()


def test_base_models_are_not_scored(folder, training_data, tmp_path, capsys):
    bert = BertModel(tiny.config("bert"))
    for name in ("safe", "pickled"):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        bert.config.architectures = ["BertModel"]
        bert.config.save_pretrained(tmp_path / name)
    bert.save_pretrained(tmp_path / "safe")
    torch.save(bert.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"is a BertModel.* pipelines train --model"):
        read_model_folder(tmp_path / "safe")
    with pytest.raises(ModelFolderError, match=r"pipelines convert .* NEW"):
        train_here(train_job(training_data, tmp_path / "out", model=str(tmp_path / "pickled")))
    assert cli.main(["convert", str(tmp_path / "pickled"), str(tmp_path / "new")]) == 0
    assert "pipelines train --model" in capsys.readouterr().out
    trained = [train_here(train_job(training_data, tmp_path / f"out-{name}", model=str(tmp_path / name), seed=1))
               for name in ("safe", "new")]  # fmt: skip
    assert trained[0].losses == trained[1].losses


def test_labels_have_another_order_than_the_head(folder, training_data, tmp_path, emails):
    """Training on starts with the rows of the head that have the same names."""
    binary = tmp_path / "binary"
    names = {"id2label": {0: "spam", 1: "ham"}, "label2id": {"spam": 0, "ham": 1}}
    tiny.classifier(num_labels=2, **names).save_pretrained(binary)
    tiny.save_tokenizer(binary, emails["text"].to_pylist()[:40])
    settings = {"weight": None, "model": str(binary), "learning_rate": 1e-12, "limit": 10}
    train_here(train_job(training_data, tmp_path / "out", **settings))
    assert read_model_folder(tmp_path / "out").decision.labels == ("ham", "spam")
    old, new = (load_file(path / "model.safetensors") for path in (binary, tmp_path / "out"))
    for name in ("classifier.weight", "classifier.bias"):
        torch.testing.assert_close(new[name], old[name].flip(0))
    torch.testing.assert_close(new["bert.pooler.dense.weight"], old["bert.pooler.dense.weight"])


def test_number_of_labels_is_saved_where_it_is_not_the_default(tmp_path, emails):
    """bart's default is three labels, and transformers leaves two labels with default names out of config.json."""
    texts = emails["text"].to_pylist()[:40]
    tiny.save_encoder_decoder(tmp_path / "old", texts, "bart", num_labels=3)
    model = ClassificationModel(
        "bart", str(tmp_path / "old"), num_labels=2, use_cuda=False, ignore_mismatched_sizes=True
    )
    model.save_model(str(tmp_path / "new"))
    scores = Scorer.load(tmp_path / "new", compute=COMPUTE).predict(texts[:3])["scores"].to_pylist()
    expected = ClassificationModel("auto", str(tmp_path / "new"), use_cuda=False).predict(texts[:3])[1]
    np.testing.assert_allclose(scores, torch.tensor(np.array(expected)).softmax(-1), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_saved_decoder_runs_in_batches_of_transformers(tmp_path, emails, family):
    texts = [text[:200] for text in emails["text"].to_pylist()[:40]]
    tiny.save_decoder(tmp_path / "old", texts, family, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    convert(str(tmp_path / "old"), str(tmp_path / "new"))
    pipe = transformers.pipeline("text-classification", str(tmp_path / "new"), top_k=None, device="cpu")
    found = pipe(texts[:6], batch_size=3, truncation=True, max_length=120)
    expected = [{row["label"]: row["score"] for row in rows} for rows in found]
    scores = Scorer.load(tmp_path / "new", compute=COMPUTE).predict(texts[:6])["scores"].to_pylist()
    np.testing.assert_allclose(scores, [[row["a"], row["b"]] for row in expected], atol=1e-4)


def test_special_tokens_that_are_split(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "split_special_tokens": True}))
    text = "money [SEP] now"
    expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    scorer = Scorer.load(folder, compute=COMPUTE)
    for tokenizer in (scorer.tokenizer, pickle.loads(pickle.dumps(scorer.tokenizer))):
        (found,) = tokenizer.encode([text]).to_arrow().to_pylist()
        assert [2, *found, 3] == expected
        assert 3 not in found


def test_fnet_says_which_dtype_it_needs(tmp_path, emails):
    tiny.model_folder(tmp_path, emails["text"].to_pylist()[:40], tiny.BINARY, family="fnet")
    assert len(Scorer.load(tmp_path, compute=COMPUTE).predict("hello")) == 1
    with pytest.raises(ModelFolderError, match=r"fnet cannot run in bfloat16 on cpu: .*; set dtype=float32"):
        Scorer.load(tmp_path, compute=ComputeSettings(device="cpu", dtype="bfloat16"))


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_location("cardiffnlp/roberta-base.v2_1") == "cardiffnlp/roberta-base.v2_1"
    assert model_location("./here") == str(tmp_path / "here")
    (tmp_path / "runs" / "spam").mkdir(parents=True)
    assert model_location("runs/spam") == str(tmp_path / "runs" / "spam")
    for name in ("somebody/no-such-model", "no-such-folder"):
        with pytest.raises(ModelFolderError, match=f"{name} is not a folder.* or a model of the Hugging Face Hub"):
            read_model_folder(name)
    with pytest.raises(ModelFolderError, match="nowhere is not a folder; give a model folder"):
        read_model_folder(str(tmp_path / "nowhere"))


def test_folder_of_the_hub_cache(folder, tmp_path, monkeypatch, emails):
    """As the Hub's library lays out its cache: files are links to blobs."""
    snapshot = tmp_path / "hub" / "models--me--mood" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "models--me--mood" / "blobs"
    for path in (snapshot, blobs, snapshot.parent.parent / "refs"):
        path.mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    scored = Scorer.load("me/mood", compute=COMPUTE).predict("hello")
    assert scored.equals(Scorer.load(folder, compute=COMPUTE).predict("hello"))
    data = tmp_path / "data.parquet"
    pq.write_table(emails.slice(0, 3), data)
    from pipelines.bulk.job import ScoreJob
    from pipelines.bulk.score import score_here

    job = ScoreJob.parse({"model": "me/mood", "input": str(data), "output": str(tmp_path / "out"), "replicas": 0})
    assert score_here(job).rows_out == 3
    assert job.model == "me/mood"
    assert score_job(read_model_folder(folder), data, tmp_path / "out").model == str(folder)


@pytest.mark.parametrize("case", ["cased", "added", "vocab.txt"])
def test_tokenizer_is_that_of_transformers(folder, case, emails, tmp_path):
    """Settings outside of tokenizer.json count, also after tune has written pipeline.json."""
    if case == "vocab.txt":
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
        (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
        (folder / "tokenizer.json").unlink()
    else:
        file = folder / "tokenizer_config.json"
        added = {"added_tokens_decoder": {"600": {"content": "hello", "special": False}}}
        changes = {"do_lower_case": False} if case == "cased" else added
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        if case == "added":
            module = AutoModelForSequenceClassification.from_pretrained(folder)
            module.resize_token_embeddings(610)
            module.save_pretrained(folder)
    texts = ["hello there", "Hello THERE my Friend"]
    tokenizer, module = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    with torch.no_grad():
        expected = [module(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].numpy() for text in texts]
    np.testing.assert_allclose(
        Scorer.load(folder, compute=COMPUTE).predict(texts)["scores"].to_pylist(), expected, atol=1e-5
    )
    convert(str(folder), str(tmp_path / "new"), "multilabel")
    convert(str(folder), str(tmp_path / "other"), "multiclass")
    again = Scorer.load(tmp_path / "other", compute=COMPUTE).predict(texts)["scores"].to_pylist()
    np.testing.assert_allclose(again, expected, atol=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "new").config.problem_type.startswith("multi")


def test_missing_weights_of_the_body_are_refused(folder, training_data, tmp_path, log_lines):
    weights = load_file(folder / "model.safetensors")
    first = {name: weight for name, weight in weights.items() if ".layer.1." not in name}
    save_file(first, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"lacks 16 weights of its body, such as bert\.encoder\.layer\.1"):
        train_here(train_job(training_data, tmp_path / "out", model=str(folder)))
    with pytest.raises(ModelFolderError, match="lacks 16 weights of its body"):
        ClassificationModel("bert", str(folder), use_cuda=False)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, num_hidden_layers=1)
    Scorer.load(folder, compute=COMPUTE)
    assert any("has 16 weights that its config.json has no place for" in line for line in log_lines)


@pytest.mark.parametrize("changes", [
    {"id2label": ["a", "b", "c"]}, {"id2label": {"x": "a", "y": "b", "z": "c"}}, {"vocab_size": "many"},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, {"model_type": "no-such-type"},
    {"hidden_size": 33},
])  # fmt: skip
def test_unusable_configs_are_errors_of_ours(folder, changes, training_data, tmp_path):
    change_config(folder, **changes)
    for action in (
        lambda: Scorer.load(folder, compute=COMPUTE),
        lambda: convert(str(folder), str(tmp_path / "new"), "multiclass"),
        lambda: train_here(train_job(training_data, tmp_path / "out", model=str(folder))),
    ):
        with pytest.raises(ModelFolderError):
            action()


def test_pickled_base_model_without_architectures(folder, tmp_path):
    bert = BertModel(tiny.config("bert"))
    shutil.copytree(folder, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    bert.config.save_pretrained(tmp_path / "old")
    torch.save(bert.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    assert convert(str(tmp_path / "old"), str(tmp_path / "new")) is None


def test_decoder_whose_texts_end_with_its_end_token(tmp_path, emails):
    """The end token cannot also be the padding: a decoder would take the token before it."""
    texts = emails["text"].to_pylist()[:40]
    tiny.save_decoder(tmp_path, texts, "llama", num_labels=3)
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    rust.save(str(tmp_path / "tokenizer.json"))
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    short = [text[:20] for text in texts[:4]]
    with torch.no_grad():
        rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in short]
        expected = [module(input_ids=row).logits.softmax(-1)[0].numpy() for row in rows]
    found = Scorer.load(tmp_path, compute=COMPUTE).predict(short)["scores"].to_pylist()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_padding_token_in_a_text(tmp_path, emails):
    """RoBERTa numbers only the tokens that are not padding, also in packed rows."""
    folder = tiny.model_folder(tmp_path, emails["text"].to_pylist()[:40], tiny.BINARY, family="roberta")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    scorer = Scorer.load(folder, compute=COMPUTE)
    assert scorer.model.is_packed
    texts = ["[PAD] hello", "hello [PAD] there [PAD]", "hello"]
    with torch.no_grad():
        expected = [module(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].numpy() for text in texts]
    np.testing.assert_allclose(scorer.predict(texts)["scores"].to_pylist(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [({"1": "b", "2": "a"}, "must name the ids 0 to 1 once each, not 1, 2"), ({"0": "a", "2": "b"}, "not 0, 2"),
     ({"0": "a", "00": "b"}, "once each"), ({"0": "", "1": "b"}, "without a name"),
     ({"0": None, "1": "b"}, "without a name")],
)  # fmt: skip
def test_label_names_that_do_not_fit_the_logits(names, message):
    with pytest.raises(ModelFolderError, match=message):
        decision_of({"id2label": names}, where="folder")
    assert decision_of({"id2label": {"1": "b", "0": "a"}}, where="folder")[0].labels == ("a", "b")
