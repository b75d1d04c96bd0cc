import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.model import batching
from pipelines.model.batching import first_of_equal, token_batches
from pipelines.text.tokenization import Tokens, assemble, cut_documents, offsets_of
from pipelines.text.windows import WindowPlan
from tests.model.rows import TEMPLATE, ragged


@pytest.mark.parametrize("padded", [True, False])
@given(st.lists(st.integers(0, 512), max_size=200), st.integers(1, 4096))
def test_token_batches_cover_windows_within_budget(padded, lengths, batch_tokens):
    lengths = np.array(lengths, dtype=np.int64)
    batches = token_batches(lengths, batch_tokens=batch_tokens, padded=padded)
    flat = np.concatenate([np.zeros(0, np.int64), *batches])
    assert sorted(flat.tolist()) == list(range(len(lengths)))
    for batch in batches:
        cost = lengths[batch].max() * len(batch) if padded else lengths[batch].sum()
        assert len(batch) == 1 or cost <= batch_tokens
    assert (np.diff(lengths[flat]) <= 0).all(), "longest first"


@given(st.data())
def test_first_of_equal_finds_exactly_the_equal_windows(data):
    texts = data.draw(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=30))
    ids = np.array([token for text in texts for token in text], np.int32)
    tokens = Tokens(ids, offsets_of(np.array(list(map(len, texts)))))
    cut = cut_documents(tokens, WindowPlan(5, 3, 2), TEMPLATE)
    index_W = np.array(data.draw(st.permutations(range(len(cut.length_W)))), np.int64)
    rows = assemble(cut, TEMPLATE, index_W)
    windows = [tuple(rows.ids[start:stop]) for start, stop in itertools.pairwise(rows.offsets)]
    with mock.patch.object(batching, "HASHED_TOKENS", data.draw(st.integers(1, 40))):
        found = first_of_equal(cut, TEMPLATE, index_W)
    assert found.tolist() == [windows.index(window) for window in windows]


def test_equal_hashes_of_different_windows_are_told_apart(monkeypatch):
    monkeypatch.setattr(batching, "_hashes", lambda rows, _: np.zeros(len(rows.length_W), np.uint64))
    cut = ragged((5, 5, 7))
    assert first_of_equal(cut, TEMPLATE, np.array([0, 1, 0, 2])).tolist() == [0, 1, 0, 3]
