import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.decisions.calibration import WindowLogits
from pipelines.decisions.early_exit import Margin, Reading, _labels, _spread, check_early_exit, fit_margin, replayed
from pipelines.errors import DataError, SettingsError
from pipelines.settings import UNCALIBRATED, Calibration, DecisionSettings

NAMES = ("a", "b", "c", "d")


@st.composite
def decisions(draw):
    """Any decision that has labels."""
    kind = draw(st.sampled_from(["binary", "multiclass", "multilabel"]))
    labels = NAMES[: 2 if kind == "binary" else draw(st.integers(3, 4))]
    merge = draw(st.sampled_from(["mean", "max"] if kind == "multilabel" else ["mean", "max", "vote"]))
    values = {"kind": kind, "labels": labels, "merge": merge}
    threshold = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    if kind == "multilabel":
        values["thresholds"] = tuple(draw(threshold) for _ in labels)
    elif kind == "binary" and draw(st.booleans()):
        values["thresholds"] = (draw(threshold),)
    if kind == "multiclass" and draw(st.booleans()):
        values["abstain_below"] = draw(st.floats(0, 1))
    if merge == "vote":
        values["tie_value"] = draw(st.integers(0, len(labels) - 1))
    return DecisionSettings(**values)


def some_documents(seed, decision, num_documents=12):
    """Documents of 1 to 40 windows. Some scores are at a threshold, some votes tie, and some are extreme."""
    rng = np.random.default_rng(seed)
    counts_D = rng.integers(1, rng.choice([3, 40]), num_documents)
    offsets = np.concatenate([[0], np.cumsum(counts_D)])
    shape = (offsets[-1], decision.num_labels)
    tone_D = np.repeat(rng.normal(0, 2, (num_documents, decision.num_labels)), counts_D, axis=0)
    logits_WL = rng.choice([0.1, 1, 30]) * (tone_D + rng.normal(size=shape))
    if rng.random() < 0.3:
        logits_WL = np.round(logits_WL)
    return WindowLogits(logits_WL.astype(np.float32), offsets, np.zeros(num_documents))


@settings(max_examples=300, deadline=None)
@given(decision=decisions(), seed=st.integers(0, 10**6), temperature=st.sampled_from([1.0, 0.3]))
def test_exact_never_changes_a_label(decision, seed, temperature):
    found, calibration = some_documents(seed, decision), Calibration(temperature)
    labels, read_D = replayed(found, decision, calibration, None)
    np.testing.assert_array_equal(labels, _labels(found, decision, calibration))
    assert (read_D <= np.diff(found.offsets)).all()
    assert (read_D >= 1).all()


@settings(max_examples=100, deadline=None)
@given(
    decision=decisions(),
    seed=st.integers(0, 10**6),
    order=st.sampled_from(["front", "spread"]),
    first=st.sampled_from([1, 2]),
    margin=st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_a_result_does_not_depend_on_what_is_read_beside_it(decision, seed, order, first, margin):
    found = some_documents(seed, decision)
    fitted = None if margin is None else Margin(margin, order, first, 0.99, 0.95, 1000, 0, 1, 1)
    _, together_D = replayed(found, decision, UNCALIBRATED, fitted)
    for document in range(3):
        first, last = found.offsets[document : document + 2]
        alone = WindowLogits(found.logits_WL[first:last], np.array([0, last - first]), np.zeros(1))
        assert replayed(alone, decision, UNCALIBRATED, fitted)[1] == together_D[document]
        # all windows at once, as in a forward pass that has room for them
        reading = Reading(alone.offsets, decision, UNCALIBRATED, fitted)
        reading.add(reading._place_W, alone.logits_WL[reading._place_W])
        assert reading.read_D[0] == together_D[document]


def test_exact_reads_what_can_be_needed():
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.5,))
    logits_WL = np.tile(np.array([[0, 20]], np.float32), (10, 1))
    found = WindowLogits(logits_WL, np.array([0, 10]), np.zeros(1))
    assert replayed(found, decision, UNCALIBRATED, None)[1] == 6, "5 of 10 are at the threshold, which is not sure"
    biggest = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.5,), merge="max")
    assert replayed(found, biggest, UNCALIBRATED, None)[1] == 1
    votes = DecisionSettings(kind="binary", labels=("ham", "spam"), merge="vote", tie_value=1)
    assert replayed(found, votes, UNCALIBRATED, None)[1] == 5, "a tie is won"
    lost = DecisionSettings(kind="binary", labels=("ham", "spam"), merge="vote", tie_value=0)
    assert replayed(found, lost, UNCALIBRATED, None)[1] == 6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("margin", [None, Margin(0.2, "spread", 2, 0.9, 0.9, 1, 0, 1, 1)])
def test_logits_that_are_not_finite_stop_only_their_document(value, margin):
    decision = DecisionSettings(kind="multilabel", labels=("a", "b"))
    good = some_documents(1, decision)
    _, alone_D = replayed(good, decision, UNCALIBRATED, margin)
    logits_WL = good.logits_WL.copy()
    logits_WL[good.offsets[3], 1] = value
    found = WindowLogits(logits_WL, good.offsets, good.targets)
    reading = Reading(found.offsets, decision, UNCALIBRATED, margin)
    while len(index_W := reading.next_windows()):
        reading.add(index_W, logits_WL[index_W])
    assert reading.counts_W[good.offsets[3]]
    others = np.arange(len(alone_D)) != 3
    np.testing.assert_array_equal(reading.read_D[others], alone_D[others])


@given(st.integers(1, 200))
def test_spread_is_a_permutation(num):
    places = _spread(num)
    assert sorted(places.tolist()) == list(range(num))
    assert places[0] == 0
    if num > 2:
        assert places[1] == num - 1
        assert abs(places[2] - (num - 1) / 2) <= 0.5


def emails_like(rng, num_documents):
    """Window scores of documents whose windows differ."""
    counts_D = rng.integers(1, 20, num_documents)
    tone_D = np.repeat(rng.normal(0, 3, num_documents), counts_D)
    margin_W = tone_D + rng.normal(0, 2, counts_D.sum())
    logits_WL = np.stack([np.zeros_like(margin_W), margin_W], axis=1).astype(np.float32)
    return WindowLogits(logits_WL, np.concatenate([[0], np.cumsum(counts_D)]), np.zeros(num_documents))


def test_fitted_margins_keep_their_promise():
    rng = np.random.default_rng(0)
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.5,))
    world = emails_like(rng, 20_000)
    full = _labels(world, decision, UNCALIBRATED)
    broken, share, confidence, draws = 0, 0.95, 0.9, 25
    shares_by_margin = {}
    for _ in range(draws):
        fitted = fit_margin(emails_like(rng, 300), decision, UNCALIBRATED, share=share, confidence=confidence)
        key = (fitted.margin, fitted.order, fitted.first)
        if key not in shares_by_margin:
            labels, _ = replayed(world, decision, UNCALIBRATED, fitted)
            shares_by_margin[key] = (labels == full).mean()
        broken += shares_by_margin[key] < share
        assert fitted.windows_read < fitted.windows
    assert broken / draws <= 1 - confidence + 0.06  # three standard deviations are 0.12
    assert len(shares_by_margin) > 1


def test_what_cannot_be_promised_is_refused():
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.5,))
    rng = np.random.default_rng(1)
    with pytest.raises(DataError, match=r"200 documents are too few .* at least 299 are needed"):
        fit_margin(emails_like(rng, 200), decision, UNCALIBRATED, share=0.99, confidence=0.95)
    with pytest.raises(SettingsError, match="both must be at least"):
        fit_margin(emails_like(rng, 200), decision, UNCALIBRATED, share=99, confidence=0.95)
    with pytest.raises(SettingsError, match="kind regression has none"):
        check_early_exit("exact", DecisionSettings(kind="regression"), None)
    with pytest.raises(SettingsError, match=r"tune MODEL --data VALID --early-exit"):
        check_early_exit("certified", decision, None)
    check_early_exit("off", DecisionSettings(kind="regression"), None)
