from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.decisions.labels import activate, decide, encode_labels, find_labels, odd_labels, resolve_thresholds
from pipelines.errors import DataError, SettingsError
from pipelines.settings import Calibration, DecisionSettings
from pipelines.text.windows import count_votes, merge_windows

BINARY = DecisionSettings(kind="binary", labels=("ham", "spam"), merge="vote")
MULTILABEL = DecisionSettings(kind="multilabel", labels=("a", "b", "c"))


def vote(window_labels, *, num_labels=2, tie_value=1):
    decision = DecisionSettings(
        kind="binary" if num_labels == 2 else "multiclass",
        labels=tuple("abc"[:num_labels]),
        merge="vote",
        tie_value=tie_value,
    )
    values_WL = np.eye(num_labels, dtype=np.float32)[window_labels]
    offsets = np.array([0, len(window_labels)])
    votes = count_votes(values_WL, offsets)
    return int(decide(merge_windows(values_WL, offsets, "mean"), decision, votes).label_D[0])


@pytest.mark.parametrize(
    ("window_labels", "num_labels", "tie_value", "expected"),
    [
        ([1, 1, 0], 2, 0, 1),
        ([0, 1], 2, 1, 1),
        ([0, 1], 2, 0, 0),
        ([2, 0], 3, 1, 1),
        ([2], 3, 1, 2),
    ],
)
def test_votes_and_ties(window_labels, num_labels, tie_value, expected):
    assert vote(window_labels, num_labels=num_labels, tie_value=tie_value) == expected


def test_vote_and_mean_can_differ():
    logits_WL = np.array([[9, -9], [0.1, 0.2], [0.1, 0.2]], dtype=np.float32)
    offsets = np.array([0, 3])
    scores_DL = merge_windows(activate(logits_WL, "binary"), offsets, "mean")
    votes_DL = count_votes(logits_WL, offsets)
    assert decide(scores_DL, BINARY, votes_DL).label_D.tolist() == [1]
    mean = DecisionSettings(kind="binary", labels=("ham", "spam"), merge="mean")
    assert decide(scores_DL, mean).label_D.tolist() == [0]
    assert decide(activate(np.zeros((1, 2)), "binary"), mean).label_D.tolist() == [0]


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [(0.5, [[1, 0, 1], [0, 1, 1]]), ((0.5, 0.7, 0.9), [[1, 0, 1], [0, 1, 0]]), (0, [[1, 1, 1], [1, 1, 1]])],
)
def test_multilabel_thresholds(thresholds, expected):
    scores_DL = np.array([[0.5, 0.49999, 0.9], [0.2, 0.7, 0.5]], dtype=np.float32)
    decision = resolve_thresholds(thresholds, MULTILABEL)
    assert decide(scores_DL, decision).positive_DL.astype(int).tolist() == expected


def test_thresholds_by_name():
    decision = resolve_thresholds({"b": 0.9}, resolve_thresholds((0.1, 0.2, 0.3), MULTILABEL))
    assert decision.thresholds == (0.1, 0.9, 0.3)
    with pytest.raises(SettingsError, match="names 'z'; allowed labels: a, b, c"):
        resolve_thresholds({"z": 0.9}, MULTILABEL)
    with pytest.raises(SettingsError, match="thresholds has 2 values; kind multilabel with these labels needs 3"):
        resolve_thresholds((0.1, 0.2), MULTILABEL)
    with pytest.raises(SettingsError, match=r"thresholds=1\.5 must be at least 0 and at most 1"):
        resolve_thresholds(1.5, MULTILABEL)


def test_binary_threshold_replaces_vote():
    decision = resolve_thresholds({"spam": 0.3}, BINARY)
    scores_DL = np.array([[0.65, 0.35], [0.75, 0.25]], dtype=np.float32)
    decided = decide(scores_DL, decision)
    assert decided.label_D.tolist() == [1, 0]
    np.testing.assert_allclose(decided.score_D, [0.35, 0.75])


def test_multiclass_abstains_below():
    decision = DecisionSettings(kind="multiclass", labels=("a", "b", "c"), abstain_below=0.6)
    decided = decide(np.array([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]], dtype=np.float32), decision)
    assert decided.label_D.tolist() == [-1, 1]
    assert np.isnan(decided.score_D[0])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6), st.floats(0.1, 10))
def test_activations_are_probabilities(values, temperature):
    logits_WL = np.array(values, dtype=np.float32).reshape(2, 3)
    softmax = activate(logits_WL, "multiclass", Calibration(temperature))
    np.testing.assert_allclose(softmax.sum(axis=1), 1, rtol=1e-5)
    sigmoid = activate(logits_WL, "multilabel", Calibration(temperature))
    with np.errstate(over="ignore"):
        reference = 1 / (1 + np.exp(-logits_WL.astype(np.float64) / temperature))
    np.testing.assert_allclose(sigmoid, reference, rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(activate(logits_WL, "regression", Calibration(temperature)), logits_WL)


def column(values, kind=None):
    return pa.chunked_array([pa.array(values, kind)])


def test_labels_are_found_sorted_and_encoded():
    assert find_labels([column(["spam", "ham"]), column(["ham"])], "binary") == ("ham", "spam")
    assert find_labels([column([10, 9, 9])], "multiclass") == ("9", "10")
    assert find_labels([column([["x"], ["b", "x"], []])], "multilabel") == ("b", "x")
    assert find_labels([column([[0, 1, 1]])], "multilabel") == ("0", "1", "2")
    assert find_labels([column([1.5])], "regression") == ()
    assert encode_labels(column(["spam", "ham"]), BINARY).tolist() == [1, 0]
    assert encode_labels(column([["c", "a"], []]), MULTILABEL).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert encode_labels(column([[0, 1, 1]]), MULTILABEL).tolist() == [[0, 1, 1]]
    assert encode_labels(column(["ham"]).dictionary_encode(), BINARY).tolist() == [0]


@pytest.mark.parametrize(
    ("values", "decision", "message"),
    [
        (["eggs", "ham"], BINARY, "labels outside the label set: 'eggs'; the set is: ham, spam"),
        (["ham", None], BINARY, r"1 rows have no label \(the first is row 1\)"),
        ([0.0, float("nan")], BINARY, "not whole label ids"),
        ([1.0, float("nan")], DecisionSettings(kind="regression"), "label of row 1 is nan"),
        (["x"], DecisionSettings(kind="regression"), "has type string; kind regression takes numbers"),
        (["a"], MULTILABEL, "has type string; kind multilabel takes list<string> or a 0/1 list"),
        (["x", "a;b"], MULTILABEL, r"To split texts such as 'a;b': .*str.split\(';'\).*--label-columns A,B,C"),
        ([[{"label": "a"}]], MULTILABEL, "has type struct<label: string>; kind multilabel takes list<string>"),
        ([[["a"]]], MULTILABEL, "has type list<.*string>; kind multilabel takes list<string>"),
        ([[b"a"]], MULTILABEL, "has type binary; kind multilabel takes list<string>"),
        ([[Decimal(1)]], MULTILABEL, "has type decimal.*; kind multilabel takes list<string>"),
        ([[0, 1]], MULTILABEL, "row 0 has 2 label values; there are 3 labels"),
        ([[0, 2, 1]], MULTILABEL, "values other than 0 and 1"),
        ([["a", "z"]], MULTILABEL, "labels outside the label set: 'z'"),
    ],
)
def test_bad_label_error_messages(values, decision, message):
    with pytest.raises(DataError, match=message):
        encode_labels(column(values), decision)


def test_single_class_is_refused():
    with pytest.raises(DataError, match="the labels are all 'ham'"):
        find_labels([column(["ham", "ham"])], "binary")


def test_multilabel_columns_of_unusual_types():
    empty = pa.chunked_array([pa.array([[], []], pa.list_(pa.null()))])
    assert encode_labels(empty, MULTILABEL).tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(DataError, match="no row has a label"):
        find_labels([empty], "multilabel")
    inner = pa.array(["a", "c"]).dictionary_encode()
    coded = pa.chunked_array([pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), inner)])
    assert find_labels([coded], "multilabel") == ("a", "c")
    assert encode_labels(coded, MULTILABEL).tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(DataError, match=r"1 rows have an empty label \(the first is row 0\)"):
        find_labels([column([["a", None]])], "multilabel")


@pytest.mark.parametrize(
    ("values", "kind", "problem"),
    [
        (["a", "", "b"], "binary", r"1 rows have no label \(the first is row 1\)"),
        (["a", " \t", "b", None], "multiclass", r"2 rows have no label \(the first is row 1\)"),
        ([["a"], [], ["b", " "], ["", ""]], "multilabel", r"2 rows have an empty label \(the first is row 2\)"),
        ([["a"], None], "multilabel", r"1 rows have no label \(the first is row 1\)"),
    ],
)
def test_empty_cells_are_no_labels(values, kind, problem):
    column = pa.chunked_array([values])
    with pytest.raises(DataError, match=problem):
        find_labels([column], kind)
    with pytest.raises(DataError, match=problem):
        encode_labels(column, DecisionSettings(kind=kind, labels=("a", "b")))


def test_views_of_strings_are_strings():
    """Polars writes them."""
    column = pa.chunked_array([pa.array(["a", "b", "a"], pa.string_view())])
    assert find_labels([column], "binary") == ("a", "b")
    assert encode_labels(column, DecisionSettings(kind="binary", labels=("a", "b"))).tolist() == [0, 1, 0]
    lists = pa.chunked_array([pa.array([["a"], []], pa.list_(pa.string_view()))])
    assert encode_labels(lists, MULTILABEL).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_odd_labels_are_named():
    assert odd_labels(("ham", "spam", "a;b"), "binary") == []
    (alike,) = odd_labels(("Spam", "spam ", "ham"), "multiclass")
    assert "'Spam', 'spam ' differ only in case or spaces" in alike
    for absent in ("nan", "None", "<NA>", "N/A"):
        (line,) = odd_labels(("ham", absent, "spam"), "multiclass")
        assert f"label {absent!r} looks like a missing value" in line
    assert odd_labels(("Washington", "Washington, D.C."), "multiclass") == [], "a comma alone is no mark"
    (several,) = odd_labels(("link", "link;money", "money"), "multiclass")
    assert several.startswith("1 labels, such as 'link;money', look like several")


@pytest.mark.parametrize(("kind", "wrap"), [("binary", False), ("multilabel", True)])
def test_labels_that_are_not_utf8_are_refused(kind, wrap):
    """Files of some writers have Latin-1 in their strings."""
    values = pa.array([b"ham", b"\xe9t\xe9", b"spam"], pa.binary()).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), values)
    column = pa.chunked_array([lists if wrap else values])
    with pytest.raises(DataError, match="row 1: the label is not valid UTF-8; convert the file to UTF-8"):
        find_labels([column], kind)
    with pytest.raises(DataError, match="row 1: the label is not valid UTF-8"):
        encode_labels(column, DecisionSettings(kind=kind, labels=("ham", "spam")))


def test_decimals_are_numbers():
    """As databases export them."""
    column = pa.chunked_array([pa.array([Decimal("1.50"), Decimal("2.00")], pa.decimal128(4, 2))])
    assert encode_labels(column, DecisionSettings(kind="regression")).tolist() == [1.5, 2.0]
    whole = pa.chunked_array([pa.array([Decimal(0), Decimal(1)], pa.decimal128(4, 2))])
    assert find_labels([whole], "binary") == ("0", "1")
    assert encode_labels(whole, DecisionSettings(kind="binary", labels=("0", "1"))).tolist() == [0, 1]
