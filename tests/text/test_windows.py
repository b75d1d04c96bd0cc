import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import SettingsError
from pipelines.settings import WindowSettings
from pipelines.text.windows import count_votes, merge_windows, plan_windows, resolve_plan


def spans(num_tokens, max_length, stride, *, special=2, model_type="bert", **settings):
    plan = resolve_plan(
        WindowSettings(max_length=max_length, stride=stride, **settings),
        num_special_tokens=special,
        model_type=model_type,
    )
    windows = plan_windows(np.array([num_tokens]), plan)
    return list(zip(windows.start_W.tolist(), windows.stop_W.tolist(), strict=True))


@pytest.mark.parametrize(
    ("num_tokens", "max_length", "stride", "expected"),
    [
        (126, 128, 0.8, [(0, 126)]),
        (127, 128, 0.8, [(0, 126), (102, 127)]),
        (205, 128, 0.8, [(0, 126), (102, 205)]),
        (229, 128, 0.8, [(0, 126), (102, 228), (204, 229)]),
        (1000, 512, 0.8, [(0, 510), (409, 919), (818, 1000)]),
        (20, 10, 4, [(0, 8), (4, 12), (8, 16), (12, 20)]),
        (20, 10, 8, [(0, 8), (8, 16), (16, 20)]),
        (20, 10, 1.0, [(0, 8), (8, 16), (16, 20)]),
        (0, 128, 0.8, [(0, 0)]),
    ],
)
def test_conformance_vectors(num_tokens, max_length, stride, expected):
    assert spans(num_tokens, max_length, stride) == expected


@pytest.mark.parametrize(
    ("num_tokens", "max_length", "stride", "model_type", "expected"),
    [
        (205, 128, 0.8, "bert", [(0, 126), (102, 205), (204, 205)]),
        (20, 10, 4, "bert", [(0, 8), (4, 12), (8, 16), (12, 20), (16, 20)]),
        (126, 128, 0.8, "roberta", [(0, 125), (102, 126)]),
        (126, 128, 0.8, "bert", [(0, 126)]),
    ],
)
def test_simpletransformers_plan_vectors(num_tokens, max_length, stride, model_type, expected):
    found = spans(num_tokens, max_length, stride, model_type=model_type, window_plan="simpletransformers")
    assert found == expected


def test_exact_plan_of_roberta():
    assert spans(126, 128, 0.8, model_type="roberta") == [(0, 126)]


@pytest.mark.parametrize(
    ("stride", "message"),
    [(0.9, r"steps 9 tokens and would skip tokens"), (9, "skip tokens"), (0.05, "never end")],
)
def test_step_outside_budget_is_refused(stride, message):
    with pytest.raises(SettingsError, match=message):
        spans(20, 10, stride)


def test_stride_of_one_token_needs_dense_windows():
    with pytest.raises(SettingsError, match="scored about 126 times"):
        spans(500, 128, 1)
    assert len(spans(500, 128, 1, dense_windows=True)) == 500 - 126 + 1


def test_max_length_limits():
    with pytest.raises(SettingsError, match="max_length=600 is above the model's 512 positions"):
        resolve_plan(WindowSettings(max_length=600), num_special_tokens=2, model_limit=512)
    with pytest.raises(SettingsError, match="leaves no room for text"):
        resolve_plan(WindowSettings(max_length=4), num_special_tokens=4)
    assert resolve_plan(WindowSettings(), num_special_tokens=2, model_limit=8192).max_length == 512
    assert resolve_plan(WindowSettings(), num_special_tokens=2, model_limit=64).max_length == 64


def test_truncation_is_reported():
    assert spans(20, 10, 8, max_windows=2) == [(0, 8), (8, 16)]
    plan = resolve_plan(WindowSettings(max_length=10, stride=8, max_windows=2), num_special_tokens=2)
    assert plan_windows(np.array([20, 16, 8]), plan).truncated_D.tolist() == [True, False, False]
    plan = resolve_plan(WindowSettings(max_length=10, sliding_window=False), num_special_tokens=2)
    windows = plan_windows(np.array([20, 8]), plan)
    assert windows.stop_W.tolist() == [8, 8]
    assert windows.truncated_D.tolist() == [True, False]


lengths = st.lists(st.integers(0, 3000), max_size=30)


@given(lengths, st.integers(5, 600), st.floats(0.1, 1.0), st.booleans())
def test_windows_cover_every_token(num_tokens_D, max_length, stride, tails):
    plan_name = "simpletransformers" if tails else "exact"
    try:
        plan = resolve_plan(
            WindowSettings(max_length=max_length, stride=stride, window_plan=plan_name), num_special_tokens=2
        )
    except SettingsError:
        return
    windows = plan_windows(np.array(num_tokens_D, dtype=np.int64), plan)
    assert not windows.truncated_D.any()
    for document, num_tokens in enumerate(num_tokens_D):
        first, last = windows.offsets[document], windows.offsets[document + 1]
        covered = np.zeros(num_tokens, dtype=bool)
        for start, stop in zip(windows.start_W[first:last], windows.stop_W[first:last], strict=True):
            assert 0 <= start <= stop <= num_tokens
            assert stop - start <= plan.budget
            covered[start:stop] = True
        assert covered.all(), "every token is covered"
        if not tails:
            assert (windows.stop_W[first : last - 1] < num_tokens).all(), "only the last window reaches the end"


@given(lengths.filter(bool), st.integers(1, 5))
def test_merge_matches_loop_over_documents(num_tokens_D, num_labels):
    plan = resolve_plan(WindowSettings(max_length=100), num_special_tokens=2)
    windows = plan_windows(np.array(num_tokens_D), plan)
    values_WL = np.random.default_rng(0).normal(size=(windows.offsets[-1], num_labels)).astype(np.float32)
    mean, largest = (merge_windows(values_WL, windows.offsets, how) for how in ("mean", "max"))
    votes = count_votes(values_WL, windows.offsets)
    for document in range(len(num_tokens_D)):
        own = values_WL[windows.offsets[document] : windows.offsets[document + 1]]
        np.testing.assert_allclose(mean[document], own.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(largest[document], own.max(axis=0))
        np.testing.assert_array_equal(votes[document], np.bincount(own.argmax(axis=1), minlength=num_labels))


def test_regression_merge_is_mean():
    assert merge_windows(np.array([[1.0], [2.0], [6.0]]), np.array([0, 1, 3]), "mean").ravel().tolist() == [1.0, 4.0]


def test_zero_documents():
    plan = resolve_plan(WindowSettings(max_length=100), num_special_tokens=2)
    windows = plan_windows(np.zeros(0, np.int64), plan)
    assert windows.offsets.tolist() == [0]
    assert merge_windows(np.zeros((0, 3), np.float32), windows.offsets, "mean").shape == (0, 3)


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(0, 5))
def test_part_equals_plan_of_slice(start, length):
    num_tokens_D = np.array([0, 500, 3, 1000, 99, 98, 5, 700, 1, 1])
    plan = resolve_plan(WindowSettings(max_length=100), num_special_tokens=2)
    part = plan_windows(num_tokens_D, plan).slice(start, start + length)
    alone = plan_windows(num_tokens_D[start : start + length], plan)
    for name in ("document_W", "start_W", "stop_W", "offsets", "truncated_D"):
        np.testing.assert_array_equal(getattr(part, name), getattr(alone, name))
