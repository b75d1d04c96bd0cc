"""Results as text: values by name, and aligned tables."""

from pipelines.printing import shown, table_lines, value_lines


def test_tables_are_aligned():
    rows = [
        {"label": "spam", "rows": 1200, "f1": 0.5, "promise": None},
        {"label": "very long name", "rows": 3, "f1": None, "promise": None},
    ]
    assert list(table_lines(rows)) == [
        "label            rows      f1",
        "spam            1,200  0.5000",
        "very long name      3       -",
    ]
    assert list(table_lines([])) == []


def test_values():
    found = {"mcc": 0.123456, "none": (), "several": [1, 0.5], "by": {"a": 0.1}}
    assert list(value_lines(found)) == ["mcc: 0.1235", "none: none", "several: 1, 0.5", "by: a 0.1"]
    assert shown(None) == "None"
