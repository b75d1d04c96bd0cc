import decimal
import os
import shutil
import zipfile
from datetime import date, datetime

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError, ModelFolderError, OutputError
from pipelines.model_files import local_folder
from pipelines.storage import footers, locations, shards
from pipelines.storage.columns import type_at
from pipelines.storage.listing import list_files
from pipelines.storage.rows import read_tables, read_units, together


def write(path, rows, *, group=10, start=0):
    table = pa.table({"id": range(start, start + rows), "text": [f"text {i}" * 5 for i in range(start, start + rows)]})
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "in"
    (folder / "year=2026").mkdir(parents=True)
    write(folder / "b.parquet", 25)
    write(folder / "a.parquet", 7, start=100)
    write(folder / "year=2026" / "c.parquet", 1, start=200)
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}), folder / "d.parquet")
    (folder / "_SUCCESS").write_text("")
    write(folder / "_hidden.parquet", 5)
    return folder


@settings(max_examples=30, deadline=None)
@given(unit_bytes=st.integers(1, 5000), limit=st.none() | st.integers(1, 40))
def test_every_row_in_exactly_one_unit(tmp_path_factory, unit_bytes, limit):
    folder = tmp_path_factory.getbasetemp() / "units"
    if not folder.exists():
        folder.mkdir()
        write(folder / "a.parquet", 7, start=100)
        write(folder / "b.parquet", 25)
    files = footers.read_footers(str(folder), ["text"])
    units = shards.split_into_units(files, unit_bytes=unit_bytes, limit=limit)
    rows = list(read_tables(str(folder), units, together(files, ["id"])))
    ids = [value for table in rows for value in table.column("id").to_pylist()]
    assert ids == [*range(100, 107), *range(25)][:limit]
    assert [unit.number for unit in units] == list(range(len(units)))
    assert len({unit.output_name for unit in units}) == len(units)
    assert all(len(table) == unit.num_rows > 0 for table, unit in zip(rows, units, strict=True))
    for table in rows:
        for row in table.to_pylist():
            assert row["source_row"] == (row["id"] - 100 if row["source_file"].endswith("a.parquet") else row["id"])


def test_folders_globs_and_files_are_inputs(data):
    names = [file.rsplit("/", 1)[1] for file in list_files(str(data))]
    assert names == ["a.parquet", "b.parquet", "d.parquet", "c.parquet"]
    assert len(list_files(f"{data}/*.parquet")) == 3
    assert len(list_files(f"{data}/a.parquet")) == 1


def test_fsspec_input_and_output(data):
    memory = fsspec.filesystem("memory")
    memory.put(str(data), "/in", recursive=True)
    files = footers.read_footers("memory://in", ["text"])
    assert sum(file.num_rows for file in files) == 33
    assert files[0].url == "memory:///in/a.parquet"
    locations.commit_table("memory://out", "x.parquet", pa.table({"a": [1]}))
    with memory.open("/out/x.parquet") as file:
        assert pq.read_table(file).to_pydict() == {"a": [1]}


def test_brackets_in_names_and_folder_globs(data):
    (data / "b.parquet").rename(data / "r[1].parquet")
    assert len(list_files(f"{data}/r[1].parquet")) == 1
    for folder in ("days[1]", "days1"):
        (data / folder).mkdir()
        write(data / folder / f"{folder}.parquet", 1)
    assert [file.rsplit("/", 1)[1] for file in list_files(f"{data}/days[1]")] == ["days[1].parquet"]
    assert [file.rsplit("/", 1)[1] for file in list_files(f"{data}/year=*")] == ["c.parquet"]


def test_globs_skip_what_is_not_data(tmp_path):
    for name in ("_temporary/0", ".staging", "2026", "2027/_tmp", "_tail"):
        (tmp_path / "_mail" / name).mkdir(parents=True)
        write(tmp_path / "_mail" / name / "x.parquet", 1, group=1)

    def found(pattern):
        return [path.rsplit("_mail/", 1)[1] for path in list_files(f"{tmp_path}/_mail/{pattern}")]

    assert found("") == found("*") == found("**/*.parquet") == found("2*") == ["2026/x.parquet"]
    assert found("_temporary") == ["_temporary/0/x.parquet"], "a folder that is named is data"
    assert found("_t*") == ["_tail/x.parquet", "_temporary/0/x.parquet"]
    write(tmp_path / "_mail" / "_tail" / "_y.parquet", 1, group=1)
    assert found("_t*") == found("_t*/**/*.parquet") == ["_tail/x.parquet", "_temporary/0/x.parquet"]
    assert found("_t*/_*.parquet") == ["_tail/_y.parquet"]


def test_archives_skip_what_is_not_data(data, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("_hidden.parquet", "_temporary/a.parquet", "days/a.parquet"):
            archive.write(data / "a.parquet", name)
    assert list_files(f"zip://::{tmp_path}/data.zip") == ["days/a.parquet"]


def test_missing_columns_and_hive_partitions(data):
    pq.write_table(pa.table({"id": [7], "text": ["x"], "more": [1.5]}), data / "e.parquet")
    files = footers.read_footers(str(data), ["text"])
    (unit,) = shards.split_into_units(files, unit_bytes=10**9)
    (table,) = read_tables(str(data), [unit], together(files), prefix="m_")
    assert table.column_names == ["id", "text", "more", "year", "m_source_file", "m_source_row"]
    assert table["more"].drop_null().to_pylist() == [1.5]
    assert [row["year"] for row in table.to_pylist() if "year=" in row["m_source_file"]] == [2026]
    assert table["year"].null_count == len(table) - 1 == 33


def test_row_group_is_decoded_once(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", 5000, group=5000)
    files = footers.read_footers(str(tmp_path), ["text"])
    plan = shards.split_into_units(files, unit_bytes=5_000)
    assert len(plan) > 20
    opened = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: opened.append(1) or original(*a, **k))
    tables = [rows.table for rows in read_units(str(tmp_path), plan, together(files, ["id"]))]
    assert [value for table in tables for value in table["id"].to_pylist()] == list(range(5000))
    assert len(opened) == 1


def test_plan_of_100_000_units_is_small():
    many, more = (100,) * 100, (10**9,) * 100
    files = [shards.InputFile(f"{n}.parquet", f"{n}.parquet", 1, "1", pa.schema([]), many, more) for n in range(1000)]
    plan = shards.split_into_units(files)
    assert 90_000 < len(plan) <= 110_000
    assert plan.spans.nbytes + plan.offsets.nbytes < 10 * 2**20
    assert plan[50_000].num_rows == 100


def test_output_names_are_deterministic(data):
    files = footers.read_footers(str(data), ["text"])
    again = footers.read_footers(str(data), ["text"])
    assert [u.output_name for u in shards.split_into_units(files)] == [
        u.output_name for u in shards.split_into_units(again)
    ]
    later = shards.split_into_units(files, first_number=7)
    assert later[0].output_name.startswith("part-000007-")


def test_unit_size_grows_and_is_bounded():
    assert shards._unit_bytes(10) == 64 * 2**10
    assert shards._unit_bytes(10 * 2**40) // 2**20 == 104, "10 TiB give about 100 000 units"
    assert shards._unit_bytes(2**40) == 64 * 2**20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist; give a file"),
        ("empty", r"contains no Parquet, JSON Lines or CSV files \(0 other files\)"),
        ("text", r"contains no Parquet, JSON Lines or CSV files \(1 other files\)"),
        ("broken", r"broken\.parquet is not a readable Parquet file"),
    ],
)
def test_bad_input_error_messages(tmp_path, name, message):
    for folder in ("empty", "text", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "a.txt").write_text("a,b")
    (tmp_path / "broken" / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=message):
        footers.read_footers(str(tmp_path / name), ["text"])


def test_commit_is_atomic(tmp_path, monkeypatch):
    locations.commit_bytes(str(tmp_path), "x.json", b"old")
    tries = []

    def full_disk(_):
        tries.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(locations, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(locations.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        locations.commit_bytes(str(tmp_path), "x.json", b"new and longer")
    assert len(tries) == locations.ATTEMPTS
    assert (tmp_path / "x.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_transient_errors_are_retried(monkeypatch):
    monkeypatch.setattr(locations, "FIRST_PAUSE_SECONDS", 0.001)
    fails = iter([OSError("503"), TimeoutError("slow"), None])

    def call():
        error = next(fails)
        if error is not None:
            raise error
        return "done"

    assert locations.retried(call) == "done"
    with pytest.raises(FileNotFoundError):
        locations.retried(lambda: os.stat("/nowhere/x"))


def test_shown_urls_hide_credentials():
    assert locations.shown("s3://key:secret@bucket/a/b?token=1") == "s3://bucket/a/b"
    assert locations.shown("/a/b") == "/a/b"


def test_make_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        locations.make_folder(str(tmp_path / "file"))
    locations.make_folder(str(tmp_path / "new" / "deep"))
    assert (tmp_path / "new" / "deep").is_dir()


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (list_files, DataError),
        (locations.make_folder, OutputError),
        (local_folder, ModelFolderError),
    ],
)
def test_missing_credentials_are_named(action, error, monkeypatch, tmp_path, fresh_s3):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "PROFILE", "SESSION_TOKEN"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(error, match=r"s3://mail/\w+ cannot be .*credentials; check the path, the credentials"):
        action("s3://mail/x")


def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"cannot be written: .*check the path"):
        locations.make_folder(str(tmp_path / "file" / "below"))


def test_files_are_found_by_content(tmp_path, log_lines):
    source = tmp_path / "a.parquet"
    write(source, 1, group=1)
    for name in ("b.pq", "c.parq", "d.PARQUET", "part-0000", "e.snappy.parquet", "f.json"):
        shutil.copy(source, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "empty").write_text("")
    (tmp_path / "_SUCCESS").write_text("")
    names = [path.rsplit("/", 1)[1] for path in list_files(str(tmp_path))]
    assert names == ["a.parquet", "b.pq", "c.parq", "d.PARQUET", "e.snappy.parquet", "f.json", "part-0000"]
    assert any(line.startswith("2 other files are skipped, such as ") for line in log_lines)
    assert [path.rsplit("/", 1)[1] for path in list_files(f"{tmp_path}/*.pq")] == ["b.pq"]
    files = footers.read_footers(f"{tmp_path}/*", ["text"], lenient=True)
    assert {file.url.rsplit("/", 1)[1] for file in files if file.error} == {"notes.txt", "empty"}, "a glob is believed"


@pytest.mark.parametrize("kind", ["_delta_log/0.json", "metadata/v1.metadata.json"])
def test_tables_of_other_formats_are_refused(tmp_path, kind):
    table = tmp_path / "in" / "table"
    (table / kind).parent.mkdir(parents=True)
    (table / kind).write_text("{}")
    (table / "day=1").mkdir()
    write(table / "b.parquet", 1, group=1)
    write(table / "day=1" / "a.parquet", 1, group=1)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one").symlink_to(table)
    (tmp_path / "links" / "two").symlink_to(table / "day=1")
    for name in ("in", "in/table", "in/table/*.parquet", "in/table/b.parquet", "in/table/day=1", "in/*/day=1",
                 "in/table/day=1/a.parquet", "in/*/*.parquet", "in/table/**", "links", "links/one",
                 "links/two"):  # fmt: skip
        with pytest.raises(DataError, match=r"is a Delta or Iceberg table"):
            list_files(str(tmp_path / name))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2024", "2025", "__HIVE_DEFAULT_PARTITION__"], [2024, 2025, None]),
        (["08", "-3"], [8, -3]),
        (["2024-01-31", "2024-02-29"], [date(2024, 1, 31), date(2024, 2, 29)]),
        (["2024-01-31", "2024-02-31"], ["2024-01-31", "2024-02-31"]),
        (["1", "a%2Fb"], ["1", "a/b"]),
        (["__HIVE_DEFAULT_PARTITION__"], [None]),
        (["9" * 19], ["9" * 19]),
    ],
)
def test_partitions_have_types(tmp_path, values, expected):
    for value in values:
        (tmp_path / f"key={value}").mkdir()
        write(tmp_path / f"key={value}" / "a.parquet", 1, group=1)
    files = footers.read_footers(str(tmp_path), ["text"])
    units = shards.split_into_units(files, unit_bytes=10**9)
    table = pa.concat_tables(read_tables(str(tmp_path), units, together(files)))
    assert sorted(table["key"].to_pylist(), key=str) == sorted(expected, key=str)


def test_old_times_keep_their_year(tmp_path):
    times = pa.array([datetime(9999, 12, 31), datetime(1, 1, 1), None], pa.timestamp("us"))
    pq.write_table(
        pa.table({"text": ["a", "b", "c"], "sent": times}), tmp_path / "a.parquet", use_deprecated_int96_timestamps=True
    )
    files = footers.read_footers(str(tmp_path), ["text"])
    (unit,) = shards.split_into_units(files)
    (table,) = read_tables(str(tmp_path), [unit], together(files))
    assert table["sent"].to_pylist() == times.to_pylist()


def test_links_are_followed_once(tmp_path, log_lines):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "in" / "a" / "x.parquet", 1, group=1)
    write(tmp_path / "elsewhere" / "y.parquet", 1, group=1)
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "z.parquet").symlink_to(tmp_path / "in" / "a" / "x.parquet")
    (tmp_path / "in" / "broken").symlink_to(tmp_path / "nowhere")
    names = [path.removeprefix(f"{tmp_path}/in/") for path in list_files(str(tmp_path / "in"))]
    assert len(names) == 2
    assert names[0] == "a/x.parquet"
    assert names[1].endswith("linked/y.parquet")
    assert any("lead to files that are read already" in line for line in log_lines)
    before = footers.read_footers(str(tmp_path / "in" / "linked"), ["text"])
    assert [file.size for file in before] == [(tmp_path / "elsewhere" / "y.parquet").stat().st_size]
    (tmp_path / "one").symlink_to(tmp_path / "elsewhere" / "y.parquet")
    (version,) = [file.version for file in footers.read_footers(f"{tmp_path}/on*", ["text"])]
    os.utime(tmp_path / "elsewhere" / "y.parquet", (1, 1))
    assert [file.version for file in footers.read_footers(f"{tmp_path}/on*", ["text"])] != [version], (
        "that of the target"
    )


def test_links_that_lead_to_each_other_end(tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        write(tmp_path / "elsewhere" / name / f"{name}.parquet", 1, group=1)
        (tmp_path / "elsewhere" / name / "next").symlink_to(tmp_path / "elsewhere" / other)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "start").symlink_to(tmp_path / "elsewhere" / "one")
    names = [path.removeprefix(f"{tmp_path}/in/") for path in list_files(str(tmp_path / "in"))]
    assert names == ["start/next/two.parquet", "start/one.parquet"]


@pytest.mark.filterwarnings("ignore")
def test_files_are_found_by_content_in_a_store(tmp_path, flaky_s3):
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("mail")
    write(tmp_path / "a.parquet", 1, group=1)
    for name in ("part-0000", "b.parquet"):
        store.put_file(str(tmp_path / "a.parquet"), f"mail/in/{name}")
    store.pipe_file("mail/in/empty", b"")
    store.pipe_file("mail/in/notes", b"no data")
    assert list_files("s3://mail/in") == ["mail/in/b.parquet", "mail/in/part-0000"]


SHAPES = {
    "repeated texts": lambda: {"text": [f"word{row % 5} " * 500 for row in range(3000)]},
    "categories": lambda: {"text": pa.array([f"word{row % 5} " * 500 for row in range(3000)]).dictionary_encode()},
    "titles": lambda: {"text": [f"title {row} of a document" for row in range(3000)]},
    "numbers": lambda: {"text": ["a"] * 3000, **{f"n{number}": np.zeros(3000) for number in range(9)}},
    "long texts": lambda: {"text": [f"{row}" * 1000 for row in range(3000)]},
    "repeated lists": lambda: {"text": [[f"word{row % 5} " * 200] * 3 for row in range(3000)]},
    "repeated structs": lambda: {"text": ["a"] * 3000, "m": [{"a": {"b": f"{row % 5}" * 900}} for row in range(3000)]},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("read", [None, ["text"]])
def test_sizes_are_those_of_decoded_columns(tmp_path, name, read):
    """What the footer says of a column that repeats its values is a thousandth of what it takes in memory."""
    table = pa.table(SHAPES[name]())
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    (file,) = footers.read_footers(str(tmp_path), ["text"], read=read)
    if pa.types.is_dictionary(table["text"].type):
        table = table.set_column(0, "text", table["text"].cast(pa.string()))
    decoded = table.select(read or table.column_names)
    assert len(file.row_group_bytes) == 3
    assert sum(file.row_group_bytes) == pytest.approx(decoded.nbytes, rel=0.5)


@pytest.mark.parametrize("groups", [(10**8,), (3,) * 10**5, (150_000, 150_000, 1)])
def test_units_have_a_limited_number_of_rows(groups):
    """A footer may claim any number of rows in a few bytes."""
    file = shards.InputFile("a", "a", 9, "", pa.schema([]), groups, (1,) * len(groups))
    units = shards.split_into_units([file])
    rows = np.add.reduceat(units.spans[:, 4] - units.spans[:, 3], units.offsets[:-1])
    assert rows.max() <= shards.MOST_UNIT_ROWS
    assert rows.sum() == sum(groups) == units.num_rows


def test_integers_beside_decimals_keep_their_values(tmp_path):
    numbers = [pa.array([decimal.Decimal("1.25"), None], pa.decimal128(10, 2)), pa.array([7, -(2**40)], pa.int64()),
               pa.array([3, 2**50], pa.uint64())]  # fmt: skip
    for number, values in enumerate(numbers):
        pq.write_table(pa.table({"text": ["a", "b"], "x": values}), tmp_path / f"{number}.parquet")
    files = footers.read_footers(str(tmp_path), ["text"])
    found = list(read_units(str(tmp_path), shards.split_into_units(files), together(files), text_columns=["text"]))
    values = [value for rows in found for value in rows.table["x"].to_pylist()]
    assert values == [decimal.Decimal("1.25"), None, 7, -(2**40), 3, 2**50]
    assert not any(rows.values_lost for rows in found)


def test_fields_are_found_without_a_search_through_all_names():
    schema = pa.schema([(f"c{number}", pa.int64()) for number in range(20_000)])
    assert all(type_at(schema, name) == pa.int64() for name in schema.names), "quadratic: 20 s"
