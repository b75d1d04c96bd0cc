"""Decoders and encoder-decoders: trained, converted, scored, and read by transformers with the same logits."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipelines.bulk.score import score_here
from pipelines.errors import DataError
from pipelines.model.scorer import Scorer
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings
from pipelines.simpletransformers.convert import convert
from pipelines.simpletransformers.models import ClassificationModel
from pipelines.training.job import train_here
from tests import tiny
from tests.jobs import FLOAT32, read_scored, score_job, train_job

DECODERS = ("gpt2", "llama", "mistral", "gpt_neox", "qwen3")
ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart")


def save_base(folder, family, emails):
    texts = emails["text"].to_pylist()[:40]
    save = tiny.save_decoder if family in DECODERS else tiny.save_encoder_decoder
    save(folder, texts, family, num_labels=2)
    return texts


def expected_scores(folder, texts):
    """Scores of texts that fit into one window, by transformers alone."""
    tokenizer, module = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    with torch.no_grad():
        return [
            module(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits.softmax(-1)[0] for text in texts
        ]


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_train_score_and_reload(family, emails, training_data, tmp_path):
    texts = save_base(tmp_path / "base", family, emails)
    summary = train_here(train_job(training_data, tmp_path / "out", weight=None, model=str(tmp_path / "base")))
    assert summary.losses[-1] != summary.losses[0]
    short = [text[:20] for text in texts[:5]]
    scorer = Scorer.load(tmp_path / "out", compute=ComputeSettings(**FLOAT32))
    np.testing.assert_allclose(
        np.stack(scorer.predict(short)["scores"].to_pylist()),
        np.stack(expected_scores(tmp_path / "out", short)),
        atol=1e-5,
    )
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.pad_token_id == (3 if family in DECODERS else 0), "the end-of-text token, or the padding token"


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.filterwarnings("ignore:without effect here")
def test_convert_and_facade(family, emails, tmp_path):
    texts = save_base(tmp_path / "base", family, emails)
    convert(str(tmp_path / "base"), str(tmp_path / "new"))
    short = [text[:20] for text in texts[:5]]
    expected = expected_scores(tmp_path / "base", short)
    found = Scorer.load(tmp_path / "new", compute=ComputeSettings(**FLOAT32)).predict(short)["scores"].to_pylist()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    args = {"max_seq_length": 32, "no_save": True, "silent": True}
    model = ClassificationModel(family, str(tmp_path / "base"), num_labels=2, args=args, use_cuda=False)
    np.testing.assert_allclose(torch.tensor(model.predict(short)[1]).softmax(-1), expected, atol=1e-5)
    model.train_model([[text, number % 2] for number, text in enumerate(texts[:8])])


def test_texts_without_tokens(emails, tmp_path):
    """A tokenizer that adds no special tokens makes nothing of an empty text."""
    texts = save_base(tmp_path / "base", "gpt2", emails)
    labels = ["ham", "spam"] * 5
    rows = [*texts[:8], "", " "]
    pq.write_table(pa.table({"text": rows, "label": labels}), tmp_path / "data.parquet")
    settings = {"train": str(tmp_path / "data.parquet"), "valid": str(tmp_path / "data.parquet"), "weight": None,
                "model": str(tmp_path / "base"), "kind": "binary", "labels": ["ham", "spam"]}  # fmt: skip
    summary = train_here(train_job(tmp_path, tmp_path / "out", **settings))
    assert (summary.documents, summary.rows_in_error) == (8, 4), "two rows of train and two of valid"
    scorer = Scorer.load(tmp_path / "out", compute=ComputeSettings(**FLOAT32))
    error = "the text has no tokens"
    for batch in ([""], ["", texts[0]], [texts[0], "", texts[1]]):
        found = scorer.predict(batch)
        assert found["error"].to_pylist() == [error if text == "" else None for text in batch]
        assert found["scores"].to_pylist()[batch.index("")] is None
    assert scorer.predict([("", "")])["error"].to_pylist() == [error]
    assert scorer.predict([("", "a")])["error"].to_pylist() == [None]
    score_here(score_job(read_model_folder(tmp_path / "out"), tmp_path / "data.parquet", tmp_path / "scored"))
    assert read_scored(tmp_path / "scored")["error"].to_pylist() == [None] * 8 + [error] * 2
    pq.write_table(pa.table({"text": ["", ""], "label": ["ham", "spam"]}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no row has a text"):
        train_here(train_job(tmp_path, tmp_path / "other", **{**settings, "train": str(tmp_path / "empty.parquet")}))
