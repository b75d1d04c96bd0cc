"""Tiny models and tokenizers. The weights are random from a seed."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from pipelines.settings import DecisionSettings

BINARY = DecisionSettings(kind="binary", labels=("ham", "spam"))
DECISIONS = {
    "binary": DecisionSettings(kind="binary", labels=("ham", "spam")),
    "vote": DecisionSettings(kind="binary", labels=("ham", "spam"), merge="vote"),
    "multiclass": DecisionSettings(kind="multiclass", labels=("a", "b", "c"), merge="max"),
    "multilabel": DecisionSettings(kind="multilabel", labels=("a", "b", "c"), thresholds=(0.4, 0.5, 0.6)),
    "regression": DecisionSettings(kind="regression"),
}
"""A decision of each kind."""
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def rust_tokenizer(texts, *, vocab_size=600, roberta=False):
    """A WordPiece tokenizer trained on texts. With `roberta`, pairs have two separators as in RoBERTa."""
    tokenizer = RustTokenizer.from_str(_trained(tuple(texts), vocab_size))
    pair = "[CLS] $A [SEP] [SEP] $B [SEP]" if roberta else "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@cache
def _trained(texts, vocab_size):
    """Cached, because the trainer breaks ties differently in each run."""
    tokenizer = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False)
    )
    return tokenizer.to_str()


def save_tokenizer(folder: Path, texts, **options):
    """Save tokenizer.json and tokenizer_config.json as transformers does for BERT."""
    rust_tokenizer(texts, **options).save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}))


XLM_SHAPE = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1, "embed_init_std": 0.3, "init_std": 0.3,
             "pad_index": 0, "unk_index": 1, "bos_index": 2, "eos_index": 3, "layerdrop": 0.0}  # fmt: skip
OWN_SHAPES = {
    "albert": {"embedding_size": 16},
    "big_bird": {"attention_type": "original_full"},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 16},
    "flaubert": XLM_SHAPE,
    "longformer": {"attention_window": 8, "sep_token_id": 3},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 16, "global_attn_every_n_layers": 2},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "squeezebert": {"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1,
                    "intermediate_groups": 2, "output_groups": 2},
    "xlm": XLM_SHAPE,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip
"""Size options of families that do not use BERT's names."""


def save_python_tokenizer(folder: Path, kind: str):
    """Save a tokenizer that exists only in Python: xlm, flaubert or bertweet."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?$%-'\"()@/"
    ends = ["</w>"] if kind != "bertweet" else []
    symbols = [letter + end for letter in letters for end in ["", *ends]]
    symbols += ["th", "in", "er", "an", "the</w>" if ends else "the"]
    merges = ["t h", "i n", "e r", "a n", "th e</w>" if ends else "th e"]
    if kind == "bertweet":
        lines = [f"{symbol}@@ 1" for symbol in symbols] + [f"{symbol} 1" for symbol in symbols]
        (folder / "vocab.txt").write_text("\n".join(lines))
        (folder / "bpe.codes").write_text("\n".join(f"{merge} 1" for merge in merges) + "\n")
    else:
        names = ["<pad>", "<unk>", "<s>", "</s>", *(f"<special{number}>" for number in range(10)), *symbols]
        (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
        (folder / "merges.txt").write_text("\n".join(f"{merge} 1" for merge in merges) + "\n")
    classes = {"xlm": "XLMTokenizer", "flaubert": "FlaubertTokenizer", "bertweet": "BertweetTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": classes[kind]}))


def config(family, **changes):
    """A config of a family with two layers of size 32 and 600 tokens."""
    from transformers import AutoConfig

    values = {
        "vocab_size": 600,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "initializer_range": 0.3,
    }
    values.update(OWN_SHAPES.get(family, {}))
    if family == "xlnet":  # xlnet has no position limit and rejects the option
        del values["max_position_embeddings"]
    return AutoConfig.for_model(family, **{**values, **changes})


def classifier(family="bert", *, seed=0, **changes):
    """A random classifier with large weights, so that its logits differ between texts."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config(family, **changes)).eval()


def save_decoder(folder: Path, texts, family="qwen3", **changes):
    """Save a random decoder whose tokenizer adds no special tokens. Neither it nor the config has a padding token."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8} if family in ("qwen3", "llama", "mistral") else {}
    classifier(family, **{**sizes, "pad_token_id": None, **changes}).save_pretrained(folder)
    rust = RustTokenizer.from_str(_trained(tuple(texts), 600))
    rust.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def save_encoder_decoder(folder: Path, texts, family="t5", **changes):
    """Save a random encoder-decoder whose tokenizer puts an end token behind each text."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "encoder_layers": 2,
             "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
             "decoder_ffn_dim": 64, "decoder_start_token_id": 0}  # fmt: skip
    classifier(family, **{**sizes, **changes}).save_pretrained(folder)
    rust = RustTokenizer.from_str(_trained(tuple(texts), 600))
    rust.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)]
    )
    rust.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


def model_folder(folder: Path, texts, decision, *, family="bert", max_length=32, seed=0, **windows):
    """A finished model folder with random weights."""
    from pipelines.model_folder import ModelFolder, seal
    from pipelines.settings import WindowSettings

    labels = list(decision.labels) or ["value"]
    module = classifier(
        family,
        seed=seed,
        num_labels=decision.num_labels,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    module.save_pretrained(folder)
    save_tokenizer(folder, texts)
    return seal(ModelFolder(folder, WindowSettings(max_length=max_length, **windows), decision))
