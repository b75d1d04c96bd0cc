"""Counts of units add up to the counts of a run. Counts and summaries convert to JSON and back."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.bulk.summary import Counts, ScoreSummary, count_table, no_counts, sum_counts, summarize
from pipelines.decisions.columns import result_columns
from pipelines.decisions.labels import decide
from pipelines.settings import DecisionSettings

BINARY = DecisionSettings(kind="binary", labels=("ham", "spam"))
NUMBERS = [f.name for f in dataclasses.fields(Counts) if f.type == "int"]
SOME = st.builds(
    Counts,
    **{name: st.integers(0, 9) for name in NUMBERS},
    errors=st.dictionaries(st.sampled_from(["null", "bad"]), st.integers(1, 9)),
    seconds=st.dictionaries(st.sampled_from(["read", "write"]), st.integers(1, 9)),
    histograms=st.just({"spam": [1] * 20}),
    positives=st.dictionaries(st.just("spam"), st.integers(1, 9)),
)


def table_of(scores_DL, errors):
    num = len(scores_DL)
    return result_columns(
        decide(scores_DL, BINARY),
        scores_DL,
        decision=BINARY,
        num_tokens_D=np.full(num, 7),
        num_windows_D=np.ones(num, np.int64),
        truncated_D=np.zeros(num, bool),
        errors=errors,
    )


def test_counts_of_slices_add_up():
    scores_DL = np.array([[0.4, 0.6], [0.9, 0.1], [0.0, 1.0]], np.float32)
    errors = [None, None, "the text is null"]
    whole = count_table(table_of(scores_DL, errors), BINARY)
    slices = [count_table(table_of(scores_DL[i : i + 1], errors[i : i + 1]), BINARY) for i in range(3)]
    assert sum_counts(BINARY, slices) == dataclasses.replace(whole, units=3)
    assert sum(whole.histograms["spam"]) == 2
    summary = summarize("out", dataclasses.replace(whole, seconds={"read": 1.234}), BINARY)
    assert summary.positive_rates == {"ham": 0.5, "spam": 0.5}
    assert (summary.rows_out, summary.rows_in_error, summary.seconds) == (3, 1, {"read": 1.23})
    assert "3 rows scored, 1 in error" in repr(summary)


@given(SOME, SOME, SOME)
def test_addition_is_associative_with_zero(a, b, c):
    assert (a + b) + c == a + (b + c)
    assert a + Counts() == Counts() + a == a
    assert (a + b).rows_in == a.rows_in + b.rows_in
    assert (a + b).errors.get("null", 0) == a.errors.get("null", 0) + b.errors.get("null", 0)


@given(SOME)
def test_counts_json_round_trip(counts):
    assert Counts.from_json(json.loads(json.dumps(counts.to_json()))) == counts
    assert Counts.from_json({"rows_in": 3, "written_by_a_newer_version": 1}) == Counts(rows_in=3)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_summary_json_round_trip(kind):
    decision = BINARY if kind == "binary" else DecisionSettings(kind="regression")
    summary = summarize("out", no_counts(decision), decision, wall_seconds=1.5)
    content = json.loads(json.dumps(summary.to_json()))
    assert ("histograms" in content) == (kind == "binary")
    assert ScoreSummary.from_json("out", content) == summary
