"""Tiny random classifiers of the sequence-classification families of transformers."""

import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from tests.tiny import OWN_SHAPES

FAMILIES = sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_inner", "d_ff", "ffn_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 130),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    "vocab_size": 600,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "moe_intermediate_size": 32,
    "initializer_range": 0.3,
    "init_std": 0.3,
}
"""Values of a config, by all names that they have. A family gets those that its config has."""
NO_HEAD_DIM = {"head_dim": None, "num_key_value_heads": None}
MLA = {
    **NO_HEAD_DIM,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
SHAPES = {
    "convbert": {"embedding_size": 32},
    "deepseek_v2": {**MLA, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {**MLA, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon": NO_HEAD_DIM,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlm": {"hidden_size": 36},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "markuplm": {"max_depth": 10},
    "minicpm3": MLA,
    "modernbert-decoder": {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 16},
    "nomic_bert": {"pad_token_id": 0},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_moe": {"num_experts_per_tok": 2},
    "qwen3_next": {"num_hidden_layers": 4, "num_experts_per_tok": 2},
    "roformer": {"embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
}
"""Values of single families, beside those that other tests use. None leaves a value out."""
_PARTS = "its config consists of parts of their own sizes, and the smallest model takes minutes"
SKIPPED = {
    "axk1": "the shapes of its config are not documented",
    "axk2": "the shapes of its config are not documented",
    "canine": "transformers itself fails on texts of less than four characters",
    "cohere_compass_text": "its config has no default layer types",
    "funnel": "transformers itself fails on rows of some lengths",
    "gemma3": _PARTS,
    "layoutlmv2": "needs detectron2",
    "layoutlmv3": "needs an image",
    "mistral4": "the shapes of its config are not documented",
    "modernvbert": _PARTS,
    "mra": "its attention is a CUDA kernel; its logits on a CPU do not depend on the text",
    "perceiver": "reads bytes, and its smallest model takes minutes",
    "qwen3_5": _PARTS,
    "reformer": "its attention draws random hashes",
    "t5gemma": _PARTS,
    "t5gemma2": _PARTS,
    "tapas": "reads tables",
    "ultravbert": _PARTS,
    "zamba": "needs CUDA kernels of state spaces",
    "zamba2": "needs CUDA kernels of state spaces",
}
"""Families that are not tried, with the reason."""


def tiny_classifier(family, **changes):
    """A random classifier with three labels. Decoders get no pad_token_id, as their usual configs."""
    config_class = CONFIG_MAPPING[family]
    usual = config_class()
    values = {name: value for name, value in SIZES.items() if hasattr(usual, name)}
    values |= {"bos_token_id": 2, "eos_token_id": 3, "num_labels": 3, "pad_token_id": 0}
    values |= {"decoder_start_token_id": 0} if usual.is_encoder_decoder else {}
    values |= {**OWN_SHAPES.get(family, {}), **SHAPES.get(family, {}), **changes}
    if family == "xlnet":  # has no such limit, and rejects the option
        del values["max_position_embeddings"]
    torch.manual_seed(0)
    config = config_class(**{name: value for name, value in values.items() if value is not None})
    if usual.pad_token_id is None and family != "esm":  # esm cannot run without it
        config.pad_token_id = None
    return AutoModelForSequenceClassification.from_config(config).eval()
