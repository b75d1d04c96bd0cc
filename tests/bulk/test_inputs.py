"""Inputs of bulk jobs, as many writers make them. No row may be lost, and no column costs a row its score."""

import base64
import gzip
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

import pipelines
from pipelines import cli
from pipelines.bulk.score import score_here as score
from pipelines.errors import DataError
from tests.jobs import FLOAT32, read_scored, score_job


def by_row(table):
    return {(row["source_file"].rsplit("/", 1)[1], row["source_row"]): row for row in table.to_pylist()}


@pytest.fixture
def bad_folder(tmp_path, emails):
    """Good rows and every kind of bad input."""
    folder = tmp_path / "in"
    (folder / "lang=en").mkdir(parents=True)
    texts = [text[:300] for text in emails["text"].to_pylist()[:40]]
    ids = list(range(10))
    pq.write_table(pa.table({"id": ids, "text": texts[:10]}), folder / "good.parquet", row_group_size=4)
    pq.write_table(pa.table({"id": ids, "text": texts[10:20]}), folder / "pages.parquet", compression=None)
    content = bytearray((folder / "pages.parquet").read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    (folder / "pages.parquet").write_bytes(content)
    (folder / "cut.parquet").write_bytes((folder / "good.parquet").read_bytes()[:-30])
    (folder / "noise.parquet").write_bytes(b"PAR1 this is none")
    pq.write_table(pa.table({"id": ids[:2], "body": ["a", "b"]}), folder / "notext.parquet")
    pq.write_table(pa.table({"id": ids[:2], "text": [1, 2]}), folder / "numbers.parquet")
    pq.write_table(
        pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}), folder / "zero.parquet"
    )
    odd = ["", "\x00\x07 control", "\u202e turned", None, "plain", "word " * 20_000]
    invalid = pa.array([text and text.encode() for text in odd] + [b"\xed\xa0\x80 surrogate"], pa.binary())
    table = pa.table({"id": range(7), "text": invalid.view(pa.string()), "more": [1.5] * 7})
    pq.write_table(table, folder / "lang=en" / "odd.parquet")
    for name, kind in (("large", pa.large_string()), ("dictionary", pa.dictionary(pa.int32(), pa.string()))):
        pq.write_table(pa.table({"id": ids[:3], "text": pa.array(texts[20:23]).cast(kind)}), folder / f"{name}.parquet")
    pq.write_table(pa.table({"id": ids[:2], "text": pa.array(texts[:2], pa.string_view())}), folder / "view.parquet")
    pq.write_table(pa.table({"id": ids[:2], "text": pa.nulls(2)}), folder / "nulls.parquet")
    return folder


def test_no_row_of_bad_input_is_lost(spam_folder, bad_folder, tmp_path, log_lines):
    summary = score(score_job(spam_folder, bad_folder, tmp_path / "out"))
    rows = by_row(read_scored(tmp_path / "out"))
    assert summary.rows_in == summary.rows_out == len(rows) == 10 + 10 + 2 + 2 + 7 + 3 + 3 + 2 + 2
    assert {url.rsplit("/", 1)[1] for url in summary.files_in_error} == {"cut.parquet", "noise.parquet"}
    errors = {key: row["error"] for key, row in rows.items() if row["error"] is not None}
    assert len(errors) == summary.rows_in_error == 10 + 2 + 2 + 2 + 2
    assert all("pages.parquet cannot be read" in errors["pages.parquet", row] for row in range(10))
    assert "has no column 'text'" in errors["notext.parquet", 0]
    assert "has a column 'text' of type int64, not string" in errors["numbers.parquet", 1]
    assert errors["odd.parquet", 3] == errors["nulls.parquet", 1] == "the text is null"
    assert errors["odd.parquet", 6].startswith("the text is not valid UTF-8")
    assert rows["odd.parquet", 5]["num_windows"] > 100
    assert rows["odd.parquet", 0]["lang"] == "en"
    assert rows["good.parquet", 0]["lang"] is None
    assert sum(summary.errors.values()) == summary.rows_in_error
    assert any("all rows of 2 of 9 files will have errors" in line for line in log_lines)
    assert {"pages", "notext", "numbers"} == {
        kind for kind in ("pages", "notext", "numbers") if any(kind in message for message in summary.errors)
    }


def test_other_columns_never_cost_a_row_its_score(spam_folder, tmp_path, emails):
    """As pandas writes a column of ids: integers in one file, floats where one is missing."""
    (tmp_path / "in").mkdir()
    big = 2**60 + 1
    texts = emails["text"].to_pylist()
    pq.write_table(pa.table({"text": texts[:3], "user": pa.array([1, big, 3])}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"text": texts[3:5], "user": pa.array([4.0, None])}), tmp_path / "in" / "b.parquet")
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    rows = read_scored(tmp_path / "out").to_pylist()
    assert [row["error"] for row in rows] == [None] * 5
    assert [row["user"] for row in rows] == [1, None, 3, 4, None]
    assert dict(summary.values_lost) == {"user": 1}
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "cli"), "--replicas", "0"]
    assert cli.main(["score", str(spam_folder.path), *arguments]) == 3


def test_column_that_cannot_be_read_costs_no_score(spam_folder, tmp_path, emails):
    (tmp_path / "in").mkdir()
    table = emails.slice(0, 6).append_column("noise", pa.array(range(6)))
    path = tmp_path / "in" / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(0).column(3)
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    rows = read_scored(tmp_path / "out").to_pylist()
    assert [row["error"] for row in rows] == [None] * 6
    assert dict(summary.values_lost) == {"noise": 6}
    assert [row["id"] for row in rows] == table["id"].to_pylist()


def test_texts_in_binary_and_list_columns(spam_folder, tmp_path, emails):
    """The bytes of a binary column are UTF-8, and the strings of a list are joined by newlines."""
    (tmp_path / "in").mkdir()
    texts = emails["text"].to_pylist()[:4]
    columns = {
        "string": pa.array(texts),
        "binary": pa.array([text.encode() for text in texts]),
        "large": pa.array([text.encode() for text in texts], pa.large_binary()),
        "list": pa.array([text.split("\n") for text in texts]),
        "views": pa.array([text.split("\n") for text in texts], pa.list_(pa.string_view())),
        "categories": pa.array([text.split("\n") for text in texts], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        "pairs": pa.array([text.split("\n", 1) for text in texts], pa.list_(pa.string(), 2)),
        "bytes": pa.array([text.encode().split(b"\n") for text in texts], pa.large_list(pa.binary())),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"id": range(4), "text": column}), tmp_path / "in" / f"{name}.parquet")
    bad = pa.array([b"fine", b"\xff\xfe", None], pa.binary())
    pq.write_table(pa.table({"id": range(3), "text": bad}), tmp_path / "in" / "odd.parquet")
    lists = pa.array([[b"a", None, b"b"], None, [], [b"fine", b"\xff"]], pa.list_(pa.binary()))
    strings = pa.ListArray.from_arrays(lists.offsets, lists.values.view(pa.string()), mask=lists.is_null())
    pq.write_table(pa.table({"id": range(4), "text": strings}), tmp_path / "in" / "odd_lists.parquet")
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    rows = by_row(read_scored(tmp_path / "out"))
    for name in columns:
        for row in range(4):
            assert rows[f"{name}.parquet", row]["scores"] == pytest.approx(
                rows["string.parquet", row]["scores"], abs=1e-5
            )
    assert rows["odd.parquet", 0]["error"] is None
    assert rows["odd.parquet", 1]["error"].startswith("the text is not valid UTF-8")
    assert rows["odd.parquet", 2]["error"] == rows["odd_lists.parquet", 1]["error"] == "the text is null"
    assert rows["odd_lists.parquet", 0]["error"] is None
    assert rows["odd_lists.parquet", 3]["error"].startswith("the text is not valid UTF-8")
    assert dict(summary.values_lost) == {}


def test_text_in_a_struct(spam_folder, tmp_path, emails):
    (tmp_path / "in").mkdir()
    texts = emails["text"].to_pylist()[:3]
    meta = pa.array([{"text": texts[0], "by": "x"}, None, {"text": texts[2], "by": "y"}])
    pq.write_table(pa.table({"id": [1, 2, 3], "meta": meta}), tmp_path / "in" / "a.parquet", row_group_size=2)
    pq.write_table(pa.table({"id": [4]}), tmp_path / "in" / "b.parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", text_column="meta.text")
    assert score(job).rows_in_error == 2
    rows = read_scored(tmp_path / "out").to_pylist()
    assert [row["error"] is None for row in rows] == [True, False, True, False]
    assert [row["meta"] for row in rows] == [*meta.to_pylist(), None], "carried as it is"
    pq.write_table(pa.table({"text": texts}), tmp_path / "plain.parquet")
    score(score_job(spam_folder, tmp_path / "plain.parquet", tmp_path / "other"))
    plain = read_scored(tmp_path / "other").to_pylist()
    assert [rows[0]["scores"], rows[2]["scores"]] == [plain[0]["scores"], plain[2]["scores"]]
    table = pq.read_table(tmp_path / "in" / "a.parquet")
    in_memory = pipelines.score(spam_folder.path, table, text_column="meta.text", dtype="float32", device="cpu")
    assert in_memory["scores"].to_pylist()[0] == pytest.approx(plain[0]["scores"], abs=1e-6)
    labelled = table.append_column("label", pa.array(["ham", "spam", "ham"]))
    settings = {"text_column": "meta.text", "dtype": "float32", "device": "cpu"}
    pq.write_table(labelled, tmp_path / "labelled.parquet")
    for data in (labelled, tmp_path / "labelled.parquet"):
        assert pipelines.evaluate(spam_folder.path, data, **settings).rows_in_error == 1
    with pytest.raises(DataError, match=r"has no column 'meta\.body'"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "third", text_column="meta.body"))


def encrypt(path, table, columns):
    """Write a file with a readable footer and some encrypted columns."""

    class Keys(encryption.KmsClient):
        def wrap_key(self, key, master):
            return base64.b64encode(key)

        def unwrap_key(self, wrapped, master):
            return base64.b64decode(wrapped)

    factory = encryption.CryptoFactory(lambda _config: Keys())
    config = encryption.EncryptionConfiguration(footer_key="f", column_keys={"c": columns}, plaintext_footer=True)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("keep", [None, ["label"]])
def test_encrypted_columns_cost_only_themselves(spam_folder, tmp_path, emails, keep):
    """pyarrow aborts the process if it is asked for the size of such a column."""
    (tmp_path / "in").mkdir()
    encrypt(tmp_path / "in" / "a.parquet", emails.slice(0, 3), ["label"])
    encrypt(tmp_path / "in" / "b.parquet", emails.slice(3, 3), ["text"])
    pq.write_table(emails.slice(6, 3), tmp_path / "in" / "c.parquet")
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", keep=keep))
    rows = read_scored(tmp_path / "out").to_pylist()
    assert [row["error"] is None for row in rows] == [True] * 3 + [False] * 3 + [True] * 3
    assert [row["label"] for row in rows[:3]] == [None] * 3
    assert summary.values_lost["label"] == 3
    with pytest.raises(DataError):
        pipelines.evaluate(spam_folder.path, tmp_path / "in" / "a.parquet", device="cpu")


@pytest.mark.parametrize("keep", [None, ["id"]])
def test_two_text_columns_of_one_name(spam_folder, tmp_path, keep):
    table = pa.table([[1, 2], ["a", "b"], ["c", "d"]], names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="several columns named 'text'"):
        score(score_job(spam_folder, tmp_path / "a.parquet", tmp_path / "out", keep=keep))


WRITERS = {
    "mail.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "mail.json.gz": lambda rows: gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()),
    "mail.csv": lambda rows: pd.DataFrame(rows).to_csv(index=False).encode(),
    "mail.tsv.zst": lambda rows: pa.Codec("zstd").compress(
        pd.DataFrame(rows).to_csv(index=False, sep="\t").encode(), asbytes=True
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_json_lines_and_csv_score_as_parquet(spam_folder, tmp_path, emails, name):
    """The same rows, types and counts; a killed run is resumed; every other command reads them too."""
    rows = [{**row, "year": 2000 + number} for number, row in enumerate(emails.slice(0, 16).to_pylist())]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mail.parquet")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(WRITERS[name](rows))
    more = {"filter": "year >= 2005 and label != 'x'", "unit_bytes": 9000}
    expected = score(score_job(spam_folder, tmp_path / "mail.parquet", tmp_path / "parquet", **more))
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", **more))
    assert (summary.rows_in, summary.rows_out, summary.rows_filtered) == (16, 11, 5)
    assert summary.units > 3
    tables = [read_scored(tmp_path / folder).drop_columns(["source_file"]) for folder in ("parquet", "out")]
    tables = [table.sort_by("source_row").combine_chunks() for table in tables]
    assert tables[0].schema == tables[1].schema
    for column in ("id", "year", "predicted_label", "source_row", "num_tokens", "error"):
        assert tables[0][column].equals(tables[1][column])
    lost = sorted((tmp_path / "out").glob("part-*"))[1:3]
    for file in lost:
        file.unlink()
    again = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", **more))
    assert again.rows_out == 11
    assert all(file.exists() for file in lost)
    found = [pipelines.evaluate(spam_folder.path, path, **FLOAT32).metrics for path in
             (tmp_path / "mail.parquet", tmp_path / "in" / name)]  # fmt: skip
    assert found[0] == found[1]
    assert expected.histograms == summary.histograms
