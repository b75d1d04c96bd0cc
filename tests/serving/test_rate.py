"""Estimates of the durations of forward passes, from simulated passes: a fixed time and a time for each token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.serving.rate import Rate

PASS_SECONDS = 0.2


@pytest.mark.parametrize("seconds", [0.02, 0.15, 3.0])
def test_short_texts_say_nothing_about_long_ones(seconds):
    rate = Rate(2000.0)
    for _ in range(200):
        rate.add(8, seconds)
    assert rate.seconds(20_000) == pytest.approx(10)


def test_rate_follows_large_passes():
    rate = Rate(2000.0)
    for _ in range(20):
        rate.add(1000, 5.0)
    assert rate.seconds(1000) == pytest.approx(5, rel=0.01)


@given(fixed=st.floats(0, 1), per_second=st.floats(20, 100_000), tokens=st.integers(1, 600), is_measured=st.booleans())
def test_passes_grow_until_most_of_their_time_is_useful(fixed, per_second, tokens, is_measured):
    """Many short texts wait: each pass takes as many as fit, and at least one."""
    rate = Rate(per_second if is_measured else None)
    seconds, total = 0.0, 0
    for turn in range(40):
        num_tokens = max(int(min(rate.pass_tokens(PASS_SECONDS), 10**6) // tokens), 1) * tokens
        seconds = fixed + num_tokens / per_second
        rate.add(num_tokens, seconds)
        if turn >= 20:
            total += num_tokens
    least_seconds = total / per_second
    assert 20 * fixed <= 2 * least_seconds + 20 * tokens / per_second, "at least a third is useful"
    assert seconds <= max(4 * PASS_SECONDS, 5 * fixed, 2.5 * tokens / per_second), "and no pass is much too long"
