"""LoRA: adapters are trained, resumed, continued and merged, and peft reads and writes the same folders."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from pipelines.errors import ModelFolderError, SettingsError
from pipelines.model.lora import find_adapter
from pipelines.model.scorer import Scorer
from pipelines.model.weights import num_labels_of
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings
from pipelines.simpletransformers.convert import convert
from pipelines.training.job import train_here
from tests import tiny
from tests.jobs import train_job
from tests.training.runs import stopped_at

LORA = {"weight": None, "lora_rank": 4, "learning_rate": 1e-2}
FLOAT32 = ComputeSettings(dtype="float32", device="cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft


@pytest.fixture(scope="module")
def bases(training_data, tmp_path_factory, emails):
    """A bert and a decoder to fine-tune."""
    decoder = tmp_path_factory.mktemp("decoder")
    tiny.save_decoder(decoder, emails["text"].to_pylist()[:40])
    return {"bert": training_data / "base", "qwen3": decoder}


@pytest.fixture(scope="module", params=["bert", "qwen3"])
def trained(request, bases, training_data, tmp_path_factory):
    """A finished LoRA run and its base model."""
    output = tmp_path_factory.mktemp("lora") / "out"
    summary = train_here(train_job(training_data, output, **LORA, model=str(bases[request.param]), epochs=2))
    return bases[request.param], output, summary


def logits_of(module, folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"] for text in texts]
        return np.stack([module(input_ids=row).logits[0].numpy() for row in rows])


def test_finished_folder_is_merged_and_adapter_is_of_peft(trained, emails):
    from peft import PeftModel

    base, output, summary = trained
    assert min(summary.losses) < summary.losses[0]
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert not any("lora" in name for name in after)
    moved = {name for name, weight in after.items() if name in before and not np.array_equal(weight, before[name])}
    assert any("embed" in name for name in before.keys() - moved), "embeddings have no adapter"
    assert any("layer" in name for name in moved)
    texts = emails["text"].to_pylist()[:6]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = PeftModel.from_pretrained(plain, output / "adapter").eval()
    adapted.config.pad_token_id = 3
    merged = AutoModelForSequenceClassification.from_pretrained(output).eval()
    expected = logits_of(merged, output, texts)
    np.testing.assert_allclose(logits_of(adapted, output, texts), expected, atol=1e-4)
    scores = Scorer.load(output, compute=FLOAT32).predict([text[:30] for text in texts])["scores"].to_pylist()
    short = torch.tensor(logits_of(merged, output, [text[:30] for text in texts])).softmax(-1)
    np.testing.assert_allclose(scores, short, atol=1e-5)


def test_interrupted_run_resumes_with_same_weights(bases, training_data, tmp_path):
    settings = {**LORA, "epochs": 2, "save_steps": 3, "lora_dropout": 0.1, "model": str(bases["qwen3"])}
    train_here(train_job(training_data, tmp_path / "whole", **settings))
    with stopped_at(8):
        train_here(train_job(training_data, tmp_path / "out", **settings))
    (newest,) = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1:]
    kept = load_file(newest / "trained.safetensors")
    assert all("lora_" in name or name.startswith("score") for name in kept), "only what is trained is saved"
    train_here(train_job(training_data, tmp_path / "out", **settings))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    for name, weight in whole.items():
        np.testing.assert_allclose(resumed[name], weight, atol=1e-6, err_msg=name)


def test_adapter_is_continued_and_converted(trained, training_data, tmp_path, emails):
    _, output, _ = trained
    texts = emails["text"].to_pylist()[:6]
    folder = convert(str(output / "adapter"), str(tmp_path / "merged"), labels=["ham", "spam"])
    assert folder.decision == read_model_folder(output).decision, "with its tuned thresholds"
    assert folder.windows == read_model_folder(output).windows
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    expected = logits_of(AutoModelForSequenceClassification.from_pretrained(output).eval(), output, texts)
    np.testing.assert_allclose(logits_of(merged, output, texts), expected, atol=1e-5)
    settings = {"weight": None, "model": str(output / "adapter"), "learning_rate": 1e-12}
    train_here(train_job(training_data, tmp_path / "more", **settings))
    more = AutoModelForSequenceClassification.from_pretrained(tmp_path / "more").eval()
    np.testing.assert_allclose(logits_of(more, output, texts), expected, atol=1e-4, err_msg="it begins where it stands")
    assert json.loads((tmp_path / "more" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(SettingsError, match=r"lora_rank=8 cannot be changed: the adapter .* is continued"):
        train_here(train_job(training_data, tmp_path / "other", **settings, lora_rank=8))
    with pytest.raises(ModelFolderError, match="is a LoRA adapter; merge it into its model: pipelines convert"):
        Scorer.load(output / "adapter")


def test_adapter_of_peft_is_converted(tmp_path, emails):
    from peft import LoraConfig, get_peft_model

    tiny.save_decoder(tmp_path / "base", emails["text"].to_pylist()[:40], num_labels=3)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    base.config.pad_token_id = 3
    torch.manual_seed(1)
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SettingsError, match="add --kind multiclass or multilabel"):
        convert(str(tmp_path / "adapter"), str(tmp_path / "new"))
    folder = convert(str(tmp_path / "adapter"), str(tmp_path / "new"), "multiclass")
    assert folder.decision.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    texts = [text[:30] for text in emails["text"].to_pylist()[:6]]
    scores = Scorer.load(tmp_path / "new", compute=FLOAT32).predict(texts)["scores"].to_pylist()
    expected = torch.tensor(logits_of(model, tmp_path / "base", texts)).softmax(-1)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_mistakes(bases, training_data, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"no linear layer of the model ends with 'qurey'; known: .*query"):
        train_here(train_job(training_data, tmp_path / "out", **LORA, lora_target="qurey"))
    bad = tmp_path / "bad"
    bad.mkdir()
    for content, message in {
        "{": "cannot be read",
        '{"peft_type": "IA3", "base_model_name_or_path": "x"}': "only LORA is supported",
        '{"peft_type": "LORA", "base_model_name_or_path": null}': "does not name the model of the adapter",
    }.items():
        (bad / "adapter_config.json").write_text(content)
        with pytest.raises(ModelFolderError, match=message):
            train_here(train_job(training_data, tmp_path / "out", weight=None, model=str(bad)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"LoRA needs the package peft: pip install .*\[lora\]"):
        train_here(train_job(training_data, tmp_path / "out", **LORA))
    assert not (tmp_path / "out").exists()


def test_adapter_of_regression_predicts_the_labels_unit(bases, training_data, tmp_path, emails):
    table = pq.read_table(training_data / "data").drop_null()
    years = pa.array([1900.0 + len(text) / 10 for text in table["text"].to_pylist()])
    pq.write_table(pa.table({"text": table["text"], "label": years}), tmp_path / "years.parquet")
    settings = {**LORA, "kind": "regression", "train": str(tmp_path / "years.parquet"), "valid": None}
    train_here(train_job(training_data, tmp_path / "out", **settings))
    convert(str(tmp_path / "out" / "adapter"), str(tmp_path / "new"))
    texts = emails["text"].to_pylist()[:6]
    found = [
        Scorer.load(tmp_path / name, compute=FLOAT32).predict([text[:60] for text in texts]) for name in ("out", "new")
    ]
    values = [table["predicted_value"].to_pylist() for table in found]
    assert min(values[0]) > 1850
    np.testing.assert_allclose(values[0], values[1], atol=1e-2)


def test_new_pooler_and_labels_are_in_the_adapter(training_data, tmp_path, emails):
    """The base has no pooler, and another head: the adapter must not depend on either."""
    base = tmp_path / "base"
    AutoModelForMaskedLM.from_config(tiny.config("bert")).save_pretrained(base)
    tiny.save_tokenizer(base, emails["text"].to_pylist()[:40])
    train_here(train_job(training_data, tmp_path / "out", **LORA, model=str(base), seed=7))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "pooler"]
    folder = convert(str(tmp_path / "out" / "adapter"), str(tmp_path / "new"))
    assert (folder.decision.kind, folder.decision.labels) == ("binary", ("ham", "spam"))
    texts = emails["text"].to_pylist()[:6]
    merged, again = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval() for name in ("out", "new")
    )
    expected = logits_of(merged, tmp_path / "out", texts)
    np.testing.assert_allclose(logits_of(again, tmp_path / "out", texts), expected, atol=1e-5)
    assert again.config.id2label == {0: "ham", 1: "spam"}


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"rank_pattern": {"query": 3}}]
)
def test_variants_of_peft(options, training_data, tmp_path, emails):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tmp_path / "base"
    tiny.classifier(num_labels=2).save_pretrained(base)
    tiny.save_tokenizer(base, emails["text"].to_pylist()[:40])
    torch.manual_seed(1)
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False, **options)
    model = get_peft_model(plain, config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    convert(str(tmp_path / "adapter"), str(tmp_path / "new"))
    texts = emails["text"].to_pylist()[:4]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    np.testing.assert_allclose(logits_of(merged, base, texts), logits_of(model, base, texts), atol=1e-5)
    settings = {"weight": None, "model": str(tmp_path / "adapter"), "learning_rate": 1e-2}
    train_here(train_job(training_data, tmp_path / "more", **settings))
    more = AutoModelForSequenceClassification.from_pretrained(tmp_path / "more").eval()
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    opened = PeftModel.from_pretrained(plain, tmp_path / "more" / "adapter").eval()
    expected = logits_of(more, base, texts)
    np.testing.assert_allclose(logits_of(opened, base, texts), expected, atol=1e-4)
    convert(str(tmp_path / "more" / "adapter"), str(tmp_path / "again"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    np.testing.assert_allclose(logits_of(again, base, texts), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "num_labels", "parts"),
    [("roberta", 40, ["classifier"]), ("bert", 40, ["classifier", "pooler"]), ("xlnet", 3, ["logits_proj"])],
)
def test_number_of_labels_of_an_adapter(family, num_labels, parts, tmp_path):
    """More labels than the hidden size, and a head of two layers."""
    from peft import LoraConfig, get_peft_model

    tiny.classifier(family, num_labels=2).save_pretrained(tmp_path / "base")
    plain = tiny.classifier(family, num_labels=num_labels)
    plain.name_or_path = str(tmp_path / "base")
    targets = ["q_proj"] if family == "xlnet" else ["query"]
    if family == "xlnet":
        targets = ["ff.layer_1"]
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=targets, modules_to_save=parts)
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    assert num_labels_of(find_adapter(str(tmp_path / "adapter"))) == num_labels


def test_parts_of_a_head_are_no_head(training_data, tmp_path, emails):
    """An adapter that lacks a weight of its head, or a weight of the body that has another shape."""
    base = tmp_path / "base"
    AutoModelForMaskedLM.from_config(tiny.config("bert")).save_pretrained(base)
    tiny.save_tokenizer(base, emails["text"].to_pylist()[:40])
    train_here(train_job(training_data, tmp_path / "out", **LORA, model=str(base)))
    adapter = tmp_path / "out" / "adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    bias = next(name for name in weights if name.endswith("classifier.bias"))
    save_file({name: weight for name, weight in weights.items() if name != bias}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match=r"has a classification head that fits"):
        convert(str(adapter), str(tmp_path / "new"))
    name = "base_model.model.bert.embeddings.LayerNorm.weight"
    save_file({**weights, name: np.ones(7, np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match=r"has no such weight: bert\.embeddings\.LayerNorm\.weight"):
        convert(str(adapter), str(tmp_path / "new"))
    (adapter / "pipeline_settings.json").write_text("{}")
    with pytest.raises(ModelFolderError, match=r"pipeline_settings\.json cannot be read"):
        convert(str(adapter), str(tmp_path / "new"))


def test_adapter_of_other_layers_is_named(bases, training_data, tmp_path):
    train_here(train_job(training_data, tmp_path / "out", **LORA, model=str(bases["bert"])))
    file = tmp_path / "out" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q_proj"]}))
    with pytest.raises(ModelFolderError, match=r"the adapter .* does not fit .*q_proj"):
        convert(str(file.parent), str(tmp_path / "new"))


def test_settings_without_effect_are_refused(training_data, tmp_path):
    with pytest.raises(SettingsError, match="lora_target='query' has no effect without lora_rank"):
        train_here(train_job(training_data, tmp_path / "out", lora_target="query"))
