"""Every sequence-classification family of transformers: logits are those of windows that run alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.model.weights import set_pad_token
from pipelines.model.window_model import WindowModel
from pipelines.settings import ComputeSettings
from pipelines.text.template import Template
from pipelines.text.tokenization import assemble
from tests.model.families import FAMILIES, SKIPPED, tiny_classifier
from tests.model.rows import TEMPLATE, ragged

FLOAT32 = ComputeSettings(dtype="float32", device="cpu")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the families' own code


def logits_alone(module, rows):
    """Logits of each window in a batch of its own, by transformers alone."""
    bounds = zip(rows.offsets, rows.offsets[1:], strict=False)
    with torch.no_grad():
        return np.stack([module(input_ids=torch.tensor(rows.ids[None, a:b])).logits[0].numpy() for a, b in bounds])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SKIPPED])
def test_logits_match_transformers_one_by_one(family):
    module = tiny_classifier(family)
    set_pad_token(module.config, 0)
    cut = ragged()
    rows = assemble(cut, TEMPLATE, np.arange(len(cut.length_W)))
    expected = logits_alone(module, rows)
    assert np.ptp(expected, axis=0).max() > 1e-3, "the logits must depend on the texts"
    for pad_left in (False, True):  # whatever the tokenizer says
        model = WindowModel(module, replace(TEMPLATE, pad_left=pad_left), replace(FLOAT32, packing="off"))
        np.testing.assert_allclose(model.logits(cut), expected, atol=1e-4)
    model = WindowModel(module, TEMPLATE, FLOAT32)  # packed, if the family can be
    np.testing.assert_allclose(model.logits(cut), expected, atol=1e-4)


def test_skipped_families_exist():
    assert set(SKIPPED) <= set(FAMILIES)


def test_rows_with_different_numbers_of_end_tokens():
    module = tiny_classifier("t5")
    cut = ragged()
    cut.tokens.ids[::7] = 3  # texts may contain the end token
    rows = assemble(cut, TEMPLATE, np.arange(len(cut.length_W)))
    model = WindowModel(module, TEMPLATE, FLOAT32)
    np.testing.assert_allclose(model.logits(cut), logits_alone(module, rows), atol=1e-4)


def test_window_without_tokens_has_no_effect_on_others():
    template = Template((), ())
    module = tiny_classifier("gpt2")
    set_pad_token(module.config, 0)
    cut = ragged((5, 0, 31, 0))
    cut = replace(cut, num_special_tokens=0)
    model = WindowModel(module, template, FLOAT32)
    found = model.logits(cut)
    assert (found[cut.length_W == 0] == 0).all()
    index_W = np.flatnonzero(cut.length_W)
    np.testing.assert_allclose(found[index_W], logits_alone(module, assemble(cut, template, index_W)), atol=1e-4)
