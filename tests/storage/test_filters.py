"""Row filters."""

from datetime import datetime, time
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import SettingsError
from pipelines.storage.filters import check_filter, kept_rows, parse_filter

DAY, OTHER_DAY = datetime(2026, 1, 31), datetime(2026, 2, 1)
TABLE = pa.table({"lang": ["en", "de", None, "en"], "n": [1, 2, 3, None], "ok": [True, False, True, None]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lang == 'en'", [0, 3]),
        ("lang != 'en'", [1]),
        ("n >= 2 and lang == 'de'", [1]),
        ("n > 2 or lang in ['de', 'fr']", [1, 2]),
        ("not (n < 3)", [2]),
        ("lang is null", [2]),
        ("n is not null and ok", [0, 2]),
        ("n == -1", []),
    ],
)
def test_filter_expressions(text, expected):
    kept = kept_rows(TABLE, text).to_pylist()
    assert [row for row, ok in enumerate(kept) if ok] == expected


@pytest.mark.parametrize(
    "text",
    ["", "1 == 1", "lang ==", "__import__('os')", "lang.x == 1", "len(lang) > 1", "n + 1 > 2", "lang is 'en'",
     "1 in [2] and n == 1", "null is null and n == 1", "1 == 1 and n == 2", "n == -'a'", "n == -lang", "-n == 1",
     "n in [ok]", "n in [1, 'a']", "n == null", "n == -true", "n == 99999999999999999999", "lang in 'en'", "n in []",
     "n < 2 < 3", "n == 1j", "(" * 300 + "n" + ")" * 300, "\0"],
)  # fmt: skip
def test_code_in_filters_is_refused(text):
    with pytest.raises(SettingsError, match="--filter"):
        parse_filter(text)


@pytest.mark.parametrize("text", ["n == 'a'", "lang > 3", "lang", "not lang", "n and ok", "ok == 'true'"])
def test_filter_must_fit_the_columns(text):
    with pytest.raises(SettingsError, match=r"--filter .* does not fit the types of the columns .* is "):
        check_filter(text, TABLE.schema)


@pytest.mark.parametrize("column", [pa.int8(), pa.uint8(), pa.int32(), pa.float32()])
def test_filter_compares_numbers_of_every_type(column):
    table = pa.table({"n": pa.array([1, 2, None]).cast(column), "view": pa.array(["a", None, "b"], pa.string_view())})
    for text in ("n in [2, 3]", "n == 2", "n > 1"):
        check_filter(text, table.schema)
        assert kept_rows(table, text).to_pylist() == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "values", "text", "expected"),
    [
        (pa.uint64(), [2**63 + 5, 2, None], "x > 5", [True, False, False]),
        (pa.uint64(), [2**63 + 5, 2, None], "x in [9223372036854775813]", [True, False, False]),
        (pa.uint64(), [2**63 + 5, 2, None], "x > -1", [True, True, False]),
        (pa.int64(), [2**40, 3, None], "x > 1e9", [True, False, False]),
        (pa.int64(), [2**40, 3, None], "x < 3.5", [False, True, False]),
        (pa.int8(), [100, 3, None], "x in [3, 300]", [False, True, False]),
        (pa.int8(), [100, 3, None], "x in [2.5, 3]", [False, True, False]),
        (pa.int64(), [1, 2, None], "x not in [1]", [False, True, False]),
        (pa.int64(), [1, 2, None], "not (x in [1])", [False, True, False]),
        (pa.int64(), [1, 2, None], "x in [null, 1]", [True, False, True]),
        (pa.float32(), [0.1, 0.2, None], "x == 0.1", [True, False, False]),
        (pa.float32(), [0.1, 0.2, None], "x in [0.1]", [True, False, False]),
        (pa.float32(), [0.1, 0.2, None], "x > 0.1", [False, True, False]),
        (pa.float64(), [1e300, -1.5, None], "x < -1", [False, True, False]),
        (pa.bool_(), [True, False, None], "x == true", [True, False, False]),
        (pa.bool_(), [True, False, None], "x in [false]", [False, True, False]),
        (pa.string(), ["b", "a", None], "'a' == x", [False, True, False]),
        (pa.large_string(), ["b", "a", None], "x in ['a']", [False, True, False]),
        (pa.date32(), [DAY, OTHER_DAY, None], "x >= '2026-02-01'", [False, True, False]),
        (pa.timestamp("us"), [DAY, OTHER_DAY, None], "x < '2026-02-01'", [True, False, False]),
        (pa.timestamp("ns", "UTC"), [DAY, OTHER_DAY, None], "x < '2026-02-01T00:00:00Z'", [True, False, False]),
        (pa.decimal128(9, 2), [Decimal("1.50"), Decimal("3.00"), None], "x < 2", [True, False, False]),
        (pa.decimal128(9, 2), [Decimal("1.50"), Decimal("3.00"), None], "x in [1.5]", [True, False, False]),
        (pa.decimal128(9, 2), [Decimal("1.50"), Decimal("30.00"), None], "x in [1.25, 30]", [False, True, False]),
    ],
)
def test_values_have_the_type_of_their_column(kind, values, text, expected):
    table = pa.table({"x": pa.array(values, kind)})
    check_filter(text, table.schema)
    assert kept_rows(table, text).to_pylist() == expected


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (pa.bool_(), "x in [2]"), (pa.bool_(), "x == 1"), (pa.int64(), "x == true"), (pa.int64(), "x == '5'"),
        (pa.int64(), "x in [1, '5']"), (pa.float64(), "x == 'nan'"), (pa.date32(), "x > 2026"),
        (pa.date32(), "x > 'yesterday'"), (pa.timestamp("us", "UTC"), "x > '2026-01-01'"), (pa.binary(), "x == 'a'"),
        (pa.list_(pa.int64()), "x == 1"), (pa.decimal128(9, 2), "x == '1'"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(kind, text):
    with pytest.raises(SettingsError, match=r"--filter .* does not fit the types of the columns|different types"):
        check_filter(text, pa.schema([pa.field("x", kind)]))


@pytest.mark.parametrize(
    "text", ["x in ['en' 'de']", "x == 'a' 'b'", "not " * 3000 + "x", "x == '\\ud800'", "x AND y", "x = 1", "x <> 1"]
)
def test_filters_that_cannot_be_meant(text):
    with pytest.raises(SettingsError, match="--filter"):
        parse_filter(text)


ODD = pa.table({"sent at": [1, 2, 3], "meta.lang": ["en", "d`e", None], "class": [1, 1, 2], "true": [0, 1, 2]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`sent at` >= 2", [False, True, True]),
        ("`meta.lang` == 'd`e' and `class` < 2", [False, True, False]),
        ("`class` in [2] or `sent at` == `class`", [True, False, True]),
        ("not `meta.lang` is null", [True, True, False]),
        ("`true` == 2", [False, False, True]),
    ],
)
def test_names_in_backticks(text, expected):
    check_filter(text, ODD.schema)
    assert kept_rows(ODD, text).to_pylist() == expected
    assert set(parse_filter(text)[1]) <= set(ODD.column_names)


@pytest.mark.parametrize("text", ["`sent at == 1", "`` == 1", "`a` `b` == 1", "f(`sent at`)", "`sent at` + 1 > 2",
                                  "n == 1 # and n == 2", "column_in_backticks_0 == 1 and `x y` == 2"])  # fmt: skip
def test_wrong_backticks_are_refused(text):
    with pytest.raises(SettingsError, match="--filter") as caught:
        parse_filter(text)
    if "column_in_backticks" not in text:
        assert "column_in_backticks" not in str(caught.value)


def test_fractions_in_a_list_of_integers():
    table = pa.table({"n": [2**53, 2**53 + 1, None, 3]})
    assert kept_rows(table, f"n in [{2**53}, 2.5, 3.0]").to_pylist() == [True, False, False, True]
    assert kept_rows(table, f"n not in [{2**53}, 2.5]").to_pylist() == [False, True, False, True]
    assert kept_rows(table, "n in [2.5]").to_pylist() == [False] * 4


@pytest.mark.parametrize(
    ("kind", "values", "filters"),
    [
        (pa.timestamp("us", "UTC"), ["2026-01-02", "2026-01-03", "2026-01-04"],
         ["x >= '2026-01-03T00:00:00Z'", "x >= '2026-01-03 00:00Z'", "x >= '2026-01-03T01:00:00+01:00'"]),
        (pa.timestamp("ms", "Europe/Berlin"), ["2026-01-01T22:00:00", "2026-01-02T23:00:00", "2026-01-03T23:00:00"],
         ["x >= '2026-01-02T23:00:00Z'"]),
        (pa.timestamp("ns"), ["2026-01-02", "2026-01-03", "2026-01-04"], ["x >= '2026-01-03'"]),
        (pa.time32("s"), ["02:59:59", "03:00:00", "23:00:00"], ["x >= '03:00:00'", "x >= '03:00'"]),
        (pa.time64("us"), ["02:59:59", "03:00:00", "23:00:00"], ["x >= '03:00:00.000000'"]),
    ],
)  # fmt: skip
def test_times_are_written_as_people_write_them(kind, values, filters):
    if pa.types.is_time(kind):
        column = pa.array([time.fromisoformat(value) for value in values], kind)
    else:
        plain = pa.array(values).cast(pa.timestamp(kind.unit))
        column = plain if kind.tz is None else plain.cast(pa.timestamp(kind.unit, "UTC")).cast(kind)
    table = pa.table({"x": column})
    for text in filters:
        check_filter(text, table.schema)
        assert kept_rows(table, text).to_pylist() == [False, True, True], text


def test_what_does_not_fit_is_found_before_work():
    schema = pa.schema([("ts", pa.timestamp("us")), ("tz", pa.timestamp("us", "UTC")), ("h", pa.float16()),
                        ("d", pa.duration("s")), ("t", pa.time32("s"))])  # fmt: skip
    for text, remedy in (("ts >= '2026-01-03T00:00:00Z'", "without a zone"), ("t >= 'noon'", "such as '03:15:00'"),
                         ("tz >= '2026-01-03'", "with a zone, such as '2026-01-31T12:00:00Z'"),
                         ("d > '1'", "keep the column as numbers"), ("ts > tz", "does not fit the types")):  # fmt: skip
        with pytest.raises(SettingsError, match=remedy):
            check_filter(text, schema)
    halves = pa.table({"h": pa.array(np.array([0.5, 2.0], np.float16))})
    assert kept_rows(halves, "h > 1").to_pylist() == [False, True]
