import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.model.batching import token_batches


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
