"""Every model family of Simple Transformers: training, windows, prediction, saving and loading."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import processors

from pipelines.model.scorer import Scorer
from pipelines.settings import ComputeSettings
from pipelines.simpletransformers.loading import MODEL_TYPES
from pipelines.simpletransformers.models import ClassificationModel
from pipelines.text.pretrained import load_tokenizer
from tests import tiny
from tests.simpletransformers.golden.freeze_simpletransformers import read_texts

FAMILIES = ["albert", "bert", "bigbird", "camembert", "deberta", "debertav2", "distilbert", "electra", "flaubert",
            "longformer", "mobilebert", "modernbert", "mpnet", "nystromformer", "rembert", "roberta", "squeezebert",
            "xlm", "xlmroberta", "xlnet", "bertweet"]  # fmt: skip
PAIRS_LIKE_ROBERTA = ("camembert", "longformer", "roberta", "xlmroberta")
pytestmark = pytest.mark.filterwarnings("ignore:without effect here")


def save_base(folder, family, emails, **shape):
    if family in ("xlm", "flaubert", "bertweet"):
        shape["vocab_size"] = 150  # their tokenizers have 120 tokens
    tiny.classifier(MODEL_TYPES.get(family, family), num_labels=2, **shape).save_pretrained(folder)
    if family in ("xlm", "flaubert", "bertweet"):
        tiny.save_python_tokenizer(folder, family)
        return
    tiny.save_tokenizer(folder, emails["text"].to_pylist()[:40], roberta=family in PAIRS_LIKE_ROBERTA)
    if family == "xlnet":
        rust = tiny.rust_tokenizer(emails["text"].to_pylist()[:40])
        rust.post_processor = processors.TemplateProcessing(
            single="$A:0 [SEP]:0 [CLS]:2",
            pair="$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        rust.save(str(folder / "tokenizer.json"))
        file = folder / "tokenizer_config.json"
        config = {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
        file.write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_train_predict_save_load(family, tmp_path, emails):
    save_base(tmp_path / "base", family, emails)
    args = {"max_seq_length": 32, "sliding_window": True, "silent": True, "output_dir": str(tmp_path / "out"),
            "train_batch_size": 64, "warmup_ratio": 0.0, "save_model_every_epoch": False}  # fmt: skip
    model = ClassificationModel(family, str(tmp_path / "base"), args=args, use_cuda=False)
    texts = [text.lower() for text in read_texts()[:12]]
    untrained = model.predict(texts)[1]
    rows = [[text, number % 2] for number, text in enumerate(texts[:4])]
    steps, _ = model.train_model(rows)
    assert steps >= 1
    labels, outputs = model.predict(texts)
    assert not np.allclose(outputs[0], untrained[0], atol=1e-7), "the step changed the model"
    assert max(len(windows) for windows in outputs) > 3
    assert np.ptp(np.concatenate(outputs), axis=0).max() > 1e-4, "scores differ between windows"
    shutil.rmtree(tmp_path / "base")
    after = ClassificationModel(family, str(tmp_path / "out"), use_cuda=False).predict(texts)
    assert np.array_equal(labels, after[0])
    alone = model.predict(texts[:1])[1]
    np.testing.assert_allclose(alone[0], outputs[0], atol=1e-5, err_msg="the batch must not change the scores")
    for left, right in zip(outputs, after[1], strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    core = Scorer.load(str(tmp_path / "out"), compute=ComputeSettings(dtype="float32", device="cpu"))
    assert core.predict(texts)["predicted_label"].to_pylist() == [str(label) for label in labels]


def test_bigbird_scores_do_not_depend_on_batch(tmp_path, emails):
    (tmp_path / "base").mkdir()
    save_base(tmp_path / "base", "bigbird", emails, attention_type="block_sparse", block_size=4, num_random_blocks=1,
              max_position_embeddings=130)  # fmt: skip
    args = {"max_seq_length": 64, "sliding_window": True, "silent": True}
    model = ClassificationModel("bigbird", str(tmp_path / "base"), args=args, use_cuda=False)
    long = emails["text"].to_pylist()[0][:2000]
    after_short = [model.predict(["hi"]), model.predict([long])][1]
    together = model.predict(["hi", long])
    np.testing.assert_allclose(after_short[1][0], together[1][1], atol=1e-5)


@pytest.mark.parametrize("kind", ["xlm", "flaubert", "bertweet"])
def test_templates_of_python_only_tokenizers(kind, tmp_path):
    from transformers import AutoTokenizer

    tiny.save_python_tokenizer(tmp_path, kind)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    text, other = "the winner takes it", "all"
    ids, second = (ours.encode([part]).ids.tolist() for part in (text, other))
    assert len(ids) > 5
    template = ours.template
    assert [*template.prefix, *ids, *template.suffix] == theirs(text)["input_ids"]
    pair = [*template.pair_prefix, *ids, *template.pair_middle, *second, *template.pair_suffix]
    assert pair == theirs(text, other)["input_ids"]
