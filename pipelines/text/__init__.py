"""Texts: tokenizers, token ids and the windows that long texts are cut into."""
