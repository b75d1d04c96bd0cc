"""JSON Lines and CSV files: rows, types, errors and ranges of rows, compared with Python's own parsers."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError
from pipelines.storage import text_files
from pipelines.storage.footers import read_footers
from pipelines.storage.listing import list_files
from pipelines.storage.rows import read_units, together
from pipelines.storage.shards import split_into_units
from pipelines.storage.text_files import format_of, read_whole, scan

FILES = LocalFileSystem()
COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
VALUES = {
    "text": st.text(max_size=20).filter(lambda text: not any("\ud800" <= mark <= "\udfff" for mark in text)),
    "number": st.none() | st.integers(-(2**53), 2**53),
    "share": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.none() | st.booleans(),
    "tags": st.none() | st.lists(st.sampled_from("abc"), max_size=3),
    "meta": st.none() | st.fixed_dictionaries({"a": st.none() | st.integers(0, 9)}),
}
PLAIN = VALUES["text"].filter(lambda text: "\r" not in text)
"""Texts that Python's writer of CSV puts into quotes where they need them."""
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def read(path, **options):
    return read_whole(FILES, str(path), format_of(path.name), **options)


@QUICK
@given(st.lists(st.fixed_dictionaries(VALUES), max_size=12), st.sampled_from(list(COMPRESS)), st.integers(1, 200))
def test_json_lines_round_trip(tmp_path, monkeypatch, rows, suffix, group_bytes):
    """Whatever the compression, and wherever groups and units begin."""
    monkeypatch.setattr(text_files, "GROUP_BYTES", group_bytes)
    file = tmp_path / f"a.jsonl{suffix}"
    lines = [json.dumps(row, ensure_ascii=bool(number % 2)) for number, row in enumerate(rows)]
    file.write_bytes(COMPRESS[suffix]("\n\n".join(lines).encode()))
    (found,) = read_footers(str(file), ["text"])
    assert found.num_rows == len(rows)
    schema = together([found])
    back = []
    units = split_into_units([found], unit_bytes=group_bytes // 2 + 1)
    for part in read_units(str(file), units, schema, text_columns=["text"] if rows else []):
        assert part.errors == [None] * len(part.table)
        assert not part.values_lost
        back += part.table.drop_columns(["source_file", "source_row"]).to_pylist()
    assert back == [{name: row[name] for name in schema.names} for row in rows]


@QUICK
@given(
    st.lists(
        st.tuples(
            VALUES["text"].filter(lambda text: "\r" not in text), VALUES["number"], VALUES["share"], VALUES["flag"]
        ),
        max_size=12,
    ),
    st.sampled_from(list(COMPRESS)),
    st.sampled_from([("csv", ","), ("csv", ";"), ("tsv", "\t")]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_csv_round_trip(tmp_path, rows, suffix, kind, end):
    name, delimiter = kind
    file = tmp_path / f"a.{name}{suffix}"
    content = io.StringIO()
    writer = csv.writer(content, delimiter=delimiter, lineterminator=end)
    writer.writerows([("text", "number", "share", "flag"), *rows])
    file.write_bytes(COMPRESS[suffix](content.getvalue().encode()))
    found = read(file, texts=["text"])
    assert found.errors == [None] * len(rows)
    empty = ["" if all(row[place] is None for row in rows) else None for place in range(4)]  # a column of strings
    expected = [tuple(empty[place] if value is None else value for place, value in enumerate(row)) for row in rows]
    assert [tuple(row.values()) for row in found.table.to_pylist()] == expected


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20", ""], "int64"), (["1", "2.5"], "double"), (["1e5", "-0.1"], "double"), (["007", "1"], "string"),
        (["true", "False", ""], "bool"), (["1", "true"], "string"), (["", ""], "string"), (["2020-01-01"], "string"),
        (["1234567890123456789012"], "string"), ([".5"], "string"), (["1_000"], "string"), (["nan"], "string"),
        (["9223372036854775807", "-9223372036854775808"], "int64"), (["9223372036854775808"], "string"),
        (["1278721345678901235", "1.5"], "string"), (["1e400"], "string"), (["1.10", "0.10000000000000001"], "double"),
        (["9007199254740993", "0.5"], "string"), (["9007199254740992", "0.5"], "double"),
    ],
)  # fmt: skip
def test_types_of_csv(tmp_path, values, kind):
    file = tmp_path / "a.csv"
    file.write_text("x,y\n" + "".join(f"{value},z\n" for value in values))
    found = read(file)
    assert str(found.table.schema.field("x").type) == kind
    if kind == "string":
        assert found.table["x"].to_pylist() == values


@pytest.mark.parametrize(
    ("values", "kind", "read_back"),
    [
        ([1, 2.5], "double", [1.0, 2.5]), ([1, "a", None, [1]], "string", ["1", "a", None, "[1]"]),
        ([True, 1], "string", ["true", "1"]), ([2**70], "string", [str(2**70)]), ([None], "string", [None]),
        ([{"a": 1}, {"b": "x"}], "struct<a: int64, b: string>", [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
        ([[], [1]], "list<item: int64>", [[], [1]]), ([[], None], "list<item: string>", [[], None]),
        (["2020-01-01T00:00:00Z"], "string", ["2020-01-01T00:00:00Z"]), ([{"a": 1}, {"a": "x"}], "string", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("far", [False, True])
def test_types_of_json(tmp_path, monkeypatch, values, kind, read_back, far):
    """The rows may be seen at once or one by one."""
    monkeypatch.setattr(text_files, "ROWS_AT_ONCE", 1 if far else 100)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    found = read(file)
    assert str(found.table.schema.field("x").type).replace("element", "item") == kind
    assert found.table["x"].to_pylist() == (read_back or [json.dumps(value) for value in values])


def test_bad_rows_have_errors(tmp_path):
    lines = [
        b'{"text": "fine", "n": 1}',
        b"{",
        b"7",
        b'{"text": 5, "n": 2}',
        b'{"text": "\xff"}',
        b"",
        b'{"text": "\\ud800", "n": 3}',
        b'{"text": null}',
        b"[" * 30_000,
        b'{"n": 4, "text": "last"}',
    ]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    (found,) = read_footers(str(file), ["text"])
    (rows,) = read_units(str(file), split_into_units([found]), together([found]), text_columns=["text"])
    assert [(error or "").partition(" (")[0] for error in rows.errors] == [
        "", "the line is not valid JSON", "the line is valid JSON, but not an object", "the text is not a string",
        "the line is not valid UTF-8", "", "", "the line is not valid JSON", "",
    ]  # fmt: skip
    assert rows.table["n"].to_pylist() == [1, None, None, 2, None, 3, None, None, 4]
    assert rows.table["source_row"].to_pylist() == list(range(9)), "empty lines are no rows"
    file = tmp_path / "a.csv"
    file.write_bytes(b'text,n\nfine,1\nshort\n"x"y,2\na,b,c\n"two\nlines",3\n\n\xff\xe9,4\n')
    found = read(file, texts=["text"])
    assert [(error or "").partition(" (")[0] for error in found.errors] == [
        "", "the row has another number of fields than the header", "the row is not valid CSV",
        "the row has another number of fields than the header", "", "",
    ]  # fmt: skip
    assert found.table["n"].to_pylist() == [1, None, None, None, 3, 4]
    assert found.table["text"].cast(pa.binary())[5].as_py() == b"\xff\xe9"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}]', "it is a JSON array; write one object in each line"),
        ("a.json", b'{\n  "text": "a"\n}', "none of its 3 rows is valid; of the first, the line is not valid JSON"),
        ("a.jsonl", "{}".encode("utf-16"), "it is in UTF-16; convert it to UTF-8"),
        ("a.csv", b'text\n"open\nand\nmore', "a quote that opens in line 2 is never closed"),
        ("a.csv.gz", gzip.compress(b"text\n" + b"a\n" * 5000, mtime=0)[:-9], "its compression is damaged"),
        ("a.csv.gz", gzip.compress(b"text\na\n", mtime=0)[:-4] + b"1234", "its compression is damaged"),
        ("a.jsonl.zst", pa.Codec("zstd").compress(b'{"text": 1}\n' * 99, asbytes=True)[:-4],
         "its compression is damaged"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("pipelines.storage.locations.FIRST_PAUSE_SECONDS", 0)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is not a readable .* file: {message}"):
        read_footers(str(tmp_path), ["text"])


def test_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MOST_ROW_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * 100 + '"}\n')
    with pytest.raises(ValueError, match="line 2 has more than 100 bytes"):
        scan(FILES, str(tmp_path / "a.jsonl"), "json")


def test_marks_at_the_start(tmp_path):
    (tmp_path / "a.csv").write_text("﻿text,n\nhällo,1\n")
    (tmp_path / "a.jsonl").write_text('﻿{"text": "hällo", "n": 1}\n')
    for name in ("a.csv", "a.jsonl"):
        assert read(tmp_path / name).table.to_pylist() == [{"text": "hällo", "n": 1}]


def test_headers(tmp_path):
    (tmp_path / "a.tsv").write_text("text, or title\tn\nx\t1\n")
    assert read(tmp_path / "a.tsv").table.to_pylist() == [{"text, or title": "x", "n": 1}]
    (tmp_path / "a.csv").write_text(",text\n0,a\n")
    assert read(tmp_path / "a.csv").table.column_names == ["unnamed_0", "text"]
    (tmp_path / "b.csv").write_text("text,n\n")
    assert read(tmp_path / "b.csv").table.num_rows == 0
    (tmp_path / "c.csv").write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match="several columns named 'text'"):
        read(tmp_path / "c.csv")


def test_which_files_of_a_folder_are_read(tmp_path, log_lines):
    def names(glob=""):
        return [path.rsplit("/", 1)[1] for path in list_files(f"{tmp_path}/{glob}")]

    (tmp_path / "info.json").write_text("{}")
    assert names() == ["info.json"]
    for name in ("a.jsonl", "b.ndjson.gz", "c.CSV", "d.tsv.zst"):
        (tmp_path / name).write_text("text\n")
    assert names() == ["a.jsonl", "b.ndjson.gz", "c.CSV", "d.tsv.zst"]
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    assert names() == ["e.parquet"]
    assert any(line.startswith("5 JSON Lines or CSV files beside Parquet files are skipped") for line in log_lines)
    assert names("*.jsonl") == ["a.jsonl"]


SHARDS = {
    "nulls": (['{"text": "a", "n": null}', '{"text": "b", "n": 1}'], "int64", [None, 1]),
    "only nulls": (['{"text": "a", "n": null}', '{"text": "b"}'], "string", [None, None]),
    "mixed": (['{"text": "a", "n": 1.5}', '{"text": "b", "n": "x"}'], "string", ["1.5", "x"]),
    "lists": (['{"text": "a", "n": []}', '{"text": "b", "n": [1]}'], "list<item: int64>", [[], [1]]),
    "empty objects": (
        ['{"text": "a", "n": {}}', '{"text": "b", "n": {"x": 1}}'],
        "struct<x: int64>",
        [{"x": None}, {"x": 1}],
    ),
    "empty everywhere": (['{"text": "a", "n": {"m": {}}}', '{"text": "b"}'], "struct<m: string>", [{"m": "{}"}, None]),
    "csv": (["text,n\na,\n", "text,n\nb,7\n"], "int64", [None, 7]),
    "csv mixed": (["text,n\na,1.50\n", "text,n\nb,x\n"], "string", ["1.50", "x"]),
    "csv and json": (["text,n\na,2\n", '{"text": "b", "n": "x"}'], "string", ["2", "x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_types_of_several_files(tmp_path, name):
    """A shard may have no value of a column, or values of another type."""
    contents, kind, expected = SHARDS[name]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}{'.csv' if content.startswith('text') else '.jsonl'}").write_text(content)
    files = read_footers(str(tmp_path), ["text"])
    schema = together(files)
    assert str(schema.field("n").type).replace("element", "item") == kind
    rows = list(read_units(str(tmp_path), split_into_units(files), schema, text_columns=["text"]))
    assert [value for part in rows for value in part.table["n"].to_pylist()] == expected
    assert not any(part.values_lost for part in rows)
    pq.write_table(pa.concat_tables([part.table for part in rows]), tmp_path / "written.parquet")


def test_lines_that_python_refuses_cost_only_themselves(tmp_path):
    lines = ['{"text": "a", "n": 1}', '{"text": "b", "n": ' + "9" * 5000 + "}", '{"text": "c", "\\ud800": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    assert found.errors == [
        None,
        "the line has a number with too many digits",
        "a name in the line is not valid Unicode",
    ]
    assert found.table.column_names == ["text", "n"]


@pytest.mark.usefixtures("flaky_s3")
@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_in_an_object_store(suffix):
    import s3fs

    store = s3fs.S3FileSystem()
    store.makedirs("texts", exist_ok=True)
    store.pipe_file(f"texts/{suffix}/a.jsonl{suffix}", COMPRESS[suffix](b'{"text": "a"}\n{"text": "b"}\n' * 500))
    store.pipe_file(f"texts/{suffix}/b.csv{suffix}", COMPRESS[suffix](b'text,n\n"a\nb",1\n' * 1))
    location = f"s3://texts/{suffix}"
    files = read_footers(location, ["text"])
    rows = list(read_units(location, split_into_units(files, unit_bytes=3000), together(files), text_columns=["text"]))
    assert sum(len(part.table) for part in rows) == 1001
    assert not any(error for part in rows for error in part.errors)


def test_stray_quotes_in_tab_separated_files_are_characters(tmp_path):
    file = tmp_path / "a.tsv"
    lines = ['1\tplain one\tham', '2\t"Go away\tspam', '3\tthree\tham', '4\tfour\tspam', '5\t"Stop it\tham',
             '6\tsix\tham', '7\t"in quotes"\tham', '8\t"two', 'lines"\tham',
             '9\tsay ""\tspam', '10\t"last']  # fmt: skip
    file.write_text("\n".join(["id\ttext\tlabel", *lines]) + "\n")
    found = read(file, texts=["text"])
    assert found.table["id"].to_pylist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, None]
    assert [error is None for error in found.errors] == [True] * 9 + [False], "10 has two fields"
    assert found.table["label"].to_pylist()[:9] == ["ham", "spam", "ham", "spam", "ham", "ham", "ham", "ham", "spam"]


def test_quotes_escaped_by_backslashes(tmp_path):
    """As Spark writes CSV by default."""
    file = tmp_path / "a.csv"
    file.write_text(
        'id,text\n1,"say \\"hi\\" now"\n2,"size 5\\""\n3,"other text"\n4,"a ""b"""\n5,"x"y\n6,six\n7,"a\n\\"b\\" c"\n'
    )
    found = read(file, texts=["text"])
    assert found.table["id"].to_pylist() == [1, 2, 3, 4, None, 6, 7]
    assert [error is None for error in found.errors] == [True, True, True, True, False, True, True]
    assert found.table["text"].to_pylist()[-1] == 'a\n"b" c'


def test_carried_values_that_are_not_unicode_are_lost_and_counted(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes("text,note\nhello,été\nbye,fine\n".encode("latin-1"))
    found = read(file, texts=["text"])
    found.table.validate(full=True)
    assert found.table["note"].to_pylist() == [None, "fine"]
    assert found.values_lost == {"note": 1}
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"text": "a", "x": "\\ud800", "deep": {"y": ["\\udfff"]}}\n{"text": "b", "x": "fine", "deep": null}\n'
    )
    found = read(file, texts=["text"])
    found.table.validate(full=True)
    assert found.table["x"].to_pylist() == [None, "fine"]
    assert found.values_lost == {"x": 1}
    assert found.table["deep"].to_pylist() == ['{"y": ["\\udfff"]}', None], "as JSON, with its escape"
