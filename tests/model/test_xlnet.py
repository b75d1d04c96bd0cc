"""XLNet pads on the left and puts its class token last. Scores must not depend on the batch."""

import json

import numpy as np
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, XLNetConfig

from pipelines.model.window_model import WindowModel
from pipelines.settings import ComputeSettings
from pipelines.text.pretrained import save_tokenizer
from pipelines.text.tokenization import cut_documents
from pipelines.text.windows import WindowPlan
from tests.tiny import rust_tokenizer


def test_left_padding_from_tokenizer_class(tmp_path, emails):
    rust = RustTokenizer.from_str(rust_tokenizer(emails["text"].to_pylist()[:40]).to_str())
    rust.post_processor = processors.TemplateProcessing(
        single="$A:0 [SEP]:0 [CLS]:2",
        pair="$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    source = tmp_path / "source"
    source.mkdir()
    rust.save(str(source / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **names}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    small = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.3}
    module = AutoModelForSequenceClassification.from_config(XLNetConfig(vocab_size=600, num_labels=2, **small)).eval()
    module.config.save_pretrained(source)
    target = tmp_path / "target"
    target.mkdir()
    tokenizer = save_tokenizer(str(source), target)
    assert tokenizer.template.pad_left
    assert tokenizer.template.prefix == ()
    assert tokenizer.template.suffix == (3, 2)
    model = WindowModel(module, tokenizer.template, ComputeSettings(dtype="float32", device="cpu"))
    texts = ["a", "free money now", emails["text"][0].as_py()]
    together = model.logits(cut_documents(tokenizer.encode(texts), WindowPlan(32, 30, 25), tokenizer.template))
    with torch.no_grad():
        ids = [*tokenizer.encode(["a"]).ids.tolist(), 3, 2]
        alone = module(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(together[0], alone, atol=1e-5)
