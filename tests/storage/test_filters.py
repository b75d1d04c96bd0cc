"""Row filters."""

import pyarrow as pa
import pytest

from pipelines.errors import SettingsError
from pipelines.storage.filters import kept_rows, parse_filter

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
def test_filters_keep_what_they_say(text, expected):
    kept = kept_rows(TABLE, parse_filter(text)[0]).to_pylist()
    assert [row for row, ok in enumerate(kept) if ok] == expected


@pytest.mark.parametrize(
    "text", ["", "1 == 1", "lang ==", "__import__('os')", "lang.x == 1", "len(lang) > 1", "n + 1 > 2", "lang is 'en'"]
)
def test_filters_are_no_code(text):
    with pytest.raises(SettingsError, match="--filter"):
        parse_filter(text)
