"""The model card: metadata that the Hub accepts, and no stale or lost text."""

import json

import pytest
from huggingface_hub import ModelCard

from pipelines.model_card import MARK, card_of, write_card
from pipelines.model_folder import read_model_folder


@pytest.mark.parametrize("kind", ["binary", "vote", "multiclass", "multilabel", "regression"])
def test_metadata_is_valid_and_the_text_names_the_labels(folders, kind):
    folder = folders[kind]
    text = (folder.path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    for label in folder.decision.labels:
        assert f"| {label} |" in text
    assert "It was not measured" in text
    assert 'pipeline("text-classification"' in text


def content_of(folder, **changes):
    return {**json.loads(json.dumps(folder.to_json())), **changes}


def test_card_of_a_trained_model(folders):
    per_label = {name: {"precision": 0.5, "recall": 0.25, "support": 9, "f1_score": 0.3} for name in "abc"}
    metrics = {"f1_macro": 0.25, "lrap": 0.75, "per_label": per_label}
    training = {
        "version": "0.1.0", "model": "bert-base-uncased", "columns": {}, "settings": {}, "documents": 1200,
        "fingerprint": "sha256:ab",
    }  # fmt: skip
    measured = {"documents": 300, "fingerprint": "sha256:cd"}
    text = card_of(content_of(folders["multilabel"], metrics=metrics, training=training, measured=measured))
    card = ModelCard(text)
    assert card.data.base_model == "bert-base-uncased"
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {"f1_macro": 0.25, "lrap": 0.75}
    assert "fine-tuned from `bert-base-uncased` on 1,200 documents" in text
    assert "On 300 validation documents (fingerprint `sha256:cd`" in text
    assert "| a | 0.4000 | 0.5000 | 0.2500 | 9 |" in text
    for path in ("/home/me/base", "./base", "s3://bucket/base", str(folders["binary"].path)):
        local = card_of(content_of(folders["multilabel"], training={**training, "model": path}))
        assert ModelCard(local).data.base_model is None, "a path is no name on the Hub"
        assert path not in local, "nor for other people"


def test_card_of_a_binary_model_has_the_numbers_of_its_labels(folders):
    content = content_of(folders["binary"], metrics={"tp": 63, "tn": 199, "fp": 9, "fn": 7})
    content["decision"]["thresholds"] = [0.4]
    text = card_of(content)
    names = folders["binary"].decision.labels
    assert f"| {names[0]} |  | 0.9660 | 0.9567 | 208 |" in text
    assert f"| {names[1]} | 0.4000 | 0.8750 | 0.9000 | 70 |" in text
    assert "| label | threshold |\n|---|---|\n" in card_of(content_of(folders["multiclass"], metrics={"mcc": 0.5}))


def test_labels_cannot_break_the_card(folders):
    decision = {**content_of(folders["multiclass"])["decision"], "labels": ["a|b", "c: d\n---\n# e", "'\"%{}"]}
    card = ModelCard(card_of(content_of(folders["multiclass"], decision=decision)))
    assert card.data.pipeline_tag == "text-classification"
    assert "| a\\|b |" in card.text
    assert "| c: d --- # e |" in card.text


def test_own_changes_are_kept(folders, tmp_path):
    content = content_of(folders["binary"])
    write_card(tmp_path, content)
    written = (tmp_path / "README.md").read_text()
    assert MARK in written
    (tmp_path / "README.md").write_text(written + "one more line")
    write_card(tmp_path, content)
    assert (tmp_path / "README.md").read_text() == written
    (tmp_path / "README.md").write_text("my own card")
    write_card(tmp_path, content)
    assert (tmp_path / "README.md").read_text() == "my own card"
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert read_model_folder(folders["binary"].path).weights_hash
