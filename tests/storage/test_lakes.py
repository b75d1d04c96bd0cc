"""Delta and Iceberg tables as input, as their own libraries write them."""

import datetime
import json
import uuid

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import IdentityTransform
from pyiceberg.typedef import Record
from pyiceberg.types import DateType, IntegerType, NestedField, StringType

import pipelines
from pipelines.bulk.score import score_here as score
from pipelines.errors import DataError, OutputError, SettingsError
from pipelines.storage.footers import read_footers
from pipelines.storage.rows import read_units, together
from pipelines.storage.shards import split_into_units
from tests.jobs import FLOAT32, read_scored, score_job


def rows_of(location, **options):
    files = read_footers(str(location), ["text"], **options)
    schema = together(files)
    tables = [part.table for part in read_units(str(location), split_into_units(files), schema)]
    return pa.concat_tables(tables)


def test_delta_gives_live_rows_and_typed_partitions(tmp_path):
    days = [datetime.date(2026, 1, day) for day in (1, 1, 2, 3)]
    table = pa.table({"text": list("abcd"), "n": [1, 2, 3, 4], "day": days, "kind": ["a b", "07", "a=b%", None]})
    deltalake.write_deltalake(tmp_path / "t", table, partition_by=["day", "kind"])
    found = rows_of(tmp_path / "t").sort_by("n")
    assert found.select(table.column_names).to_pylist() == table.to_pylist()
    assert (found.schema.field("day").type, found.schema.field("kind").type) == (pa.date32(), pa.string())
    deltalake.DeltaTable(tmp_path / "t").delete("n = 2")
    assert sorted(rows_of(tmp_path / "t")["n"].to_pylist()) == [1, 3, 4]
    assert len(list((tmp_path / "t").rglob("*.parquet"))) >= 4, "the deleted row's file is still there"
    deltalake.write_deltalake(tmp_path / "t", table.slice(0, 1), mode="append")
    assert sorted(rows_of(tmp_path / "t")["n"].to_pylist()) == [1, 1, 3, 4]
    with pytest.raises(DataError, match=r"is a Delta or Iceberg table: .* give the folder of the Delta table alone"):
        read_footers(f"{tmp_path}/t/*/*", ["text"])


def test_delta_is_scored_at_the_version_of_the_first_start(spam_folder, tmp_path, emails):
    source = tmp_path / "in"
    deltalake.write_deltalake(source, emails.slice(0, 5))
    first = score(score_job(spam_folder, source, tmp_path / "out"))
    deltalake.write_deltalake(source, emails.slice(5, 3), mode="append")
    (lost,) = (tmp_path / "out").glob("part-*")
    lost.unlink()
    again = score(score_job(spam_folder, source, tmp_path / "out"))
    assert (first.rows_out, again.rows_out) == (5, 5)
    assert score(score_job(spam_folder, source, tmp_path / "out", append=True)).rows_out == 8
    assert sorted(read_scored(tmp_path / "out")["id"].to_pylist()) == sorted(emails["id"].to_pylist()[:8])
    deltalake.DeltaTable(source).optimize.compact()
    with pytest.raises(OutputError, match="was rewritten or deleted, and the input is a table"):
        score(score_job(spam_folder, source, tmp_path / "out", append=True))
    assert score(score_job(spam_folder, source, tmp_path / "out")).rows_out == 8, "the version of the last start"
    assert pipelines.evaluate(spam_folder.path, source, **FLOAT32).rows == 8


PROTOCOLS = {
    "deletionVectors": ({"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"],
                         "writerFeatures": ["deletionVectors"]}, {}),
    "column mapping": ({"minReaderVersion": 2, "minWriterVersion": 5}, {"delta.columnMapping.mode": "name"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOLS)
def test_delta_features_that_files_do_not_show_are_refused(tmp_path, name):
    protocol, configuration = PROTOCOLS[name]
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    field = {"name": "text", "type": "string", "nullable": True, "metadata": {
        "delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "text"} if configuration else {}}  # fmt: skip
    schema = json.dumps({"type": "struct", "fields": [field]})
    actions = [
        {"protocol": protocol},
        {"metaData": {"id": str(uuid.uuid4()), "format": {"provider": "parquet", "options": {}}, "schemaString": schema,
                      "partitionColumns": [], "configuration": configuration, "createdTime": 0}},
        {"add": {"path": "a.parquet", "partitionValues": {}, "modificationTime": 1, "dataChange": True,
                 "size": (tmp_path / "a.parquet").stat().st_size}},
    ]  # fmt: skip
    (tmp_path / "_delta_log").mkdir()
    (tmp_path / "_delta_log" / f"{0:020}.json").write_text("\n".join(map(json.dumps, actions)))
    with pytest.raises(DataError, match=f"is a Delta table with .*{name}, which cannot be read file by file"):
        read_footers(str(tmp_path), ["text"])


def test_damaged_and_missing_tables_are_named(tmp_path, catalog):
    (tmp_path / "_delta_log").mkdir()
    with pytest.raises(DataError, match=r"the Delta table .* cannot be opened"):
        read_footers(str(tmp_path), ["text"])
    for name, error, message in (
        ("iceberg:prod.mail.nothing", DataError, "cannot be opened: .*nothing"),
        ("iceberg:prod.mail", SettingsError, "must be iceberg:CATALOG.NAMESPACE.TABLE"),
        ("iceberg:elsewhere.a.b", DataError, r"the catalog 'elsewhere' .* define it in ~/\.pyiceberg\.yaml or in"),
    ):
        with pytest.raises(error, match=message):
            read_footers(name, ["text"])


def test_iceberg_gives_live_rows_of_a_snapshot(spam_folder, tmp_path, emails, catalog):
    catalog.create_namespace("mail")
    table = catalog.create_table("mail.raw", schema=emails.schema)
    table.append(emails.slice(0, 4))
    name = "iceberg:prod.mail.raw"
    first = score(score_job(spam_folder, name, tmp_path / "out"))
    table.append(emails.slice(4, 3))
    (lost,) = (tmp_path / "out").glob("part-*")
    lost.unlink()
    assert (first.rows_out, score(score_job(spam_folder, name, tmp_path / "out")).rows_out) == (4, 4)
    assert score(score_job(spam_folder, name, tmp_path / "out", append=True)).rows_out == 7
    table.delete(f"id = '{emails['id'][0]}'")
    found = rows_of(name)
    assert sorted(found["id"].to_pylist()) == sorted(emails["id"].to_pylist()[1:7])
    with table.update_schema() as change:
        change.delete_column("label")
    assert "label" not in rows_of(name).column_names
    with pytest.raises(OutputError, match="was rewritten or deleted, and the input is a table"):
        score(score_job(spam_folder, name, tmp_path / "out", append=True))
    with table.update_schema() as change:
        change.rename_column("text", "body")
    with pytest.raises(DataError, match=r"the column 'body' of iceberg:prod\.mail\.raw has the name 'text' in"):
        read_footers(name, ["body"])


def test_iceberg_files_without_ids_follow_the_name_mapping(tmp_path, emails, catalog):
    """Files that were added to a table, and not written by it, have no ids of columns."""
    catalog.create_namespace("mail")
    table = catalog.create_table("mail.raw", schema=emails.schema)
    pq.write_table(emails.slice(0, 4), tmp_path / "own.parquet")
    table.add_files([str(tmp_path / "own.parquet")])
    table.append(emails.slice(4, 4))  # a file with ids
    assert sorted(rows_of("iceberg:prod.mail.raw")["id"].to_pylist()) == sorted(emails["id"].to_pylist()[:8])
    with table.update_schema() as change:
        change.delete_column("label")
    with table.update_schema() as change:
        change.add_column("label", StringType())
    found, expected = (one.sort_by("id") for one in (rows_of("iceberg:prod.mail.raw"), table.scan().to_arrow()))
    assert found.select(["id", "label"]).to_pydict() == expected.select(["id", "label"]).to_pydict()
    assert found["label"].null_count == 4, "the new column has no values where the old one had an id"
    with table.update_schema() as change:
        change.rename_column("text", "body")
    with pytest.raises(DataError, match=r"the column 'body' .* has the name 'text'"):
        read_footers("iceberg:prod.mail.raw", ["body"])
    with table.transaction() as change:
        change.remove_properties("schema.name-mapping.default")
    with pytest.raises(DataError, match=r"has no ids of columns, and .* has no schema\.name-mapping\.default"):
        read_footers("iceberg:prod.mail.raw", ["body"])


def test_hudi_tables_are_refused(tmp_path):
    """Its folder has the older versions of its files, too."""
    (tmp_path / "t" / ".hoodie").mkdir(parents=True)
    (tmp_path / "t" / ".hoodie" / "hoodie.properties").write_text("hoodie.table.name=t")
    (tmp_path / "t" / "day=1").mkdir()
    for name in ("f1-0_0-1-1_20240101.parquet", "f1-0_0-2-2_20240102.parquet"):
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t" / "day=1" / name)
    for place in ("t", "t/day=1", "t/*/*.parquet", "."):
        with pytest.raises(DataError, match=r"is a Hudi table: .* write its rows to Parquet first"):
            read_footers(str(tmp_path / place), ["text"])


def test_iceberg_partitions_that_the_files_do_not_contain(tmp_path, catalog):
    """As in tables that Spark's procedures make of Hive tables."""
    schema = Schema(NestedField(1, "text", StringType()), NestedField(2, "kind", StringType()),
                    NestedField(3, "day", DateType()), NestedField(4, "n", IntegerType()))  # fmt: skip
    spec = PartitionSpec(*(PartitionField(number, 998 + number, IdentityTransform(), name)
                           for number, name in ((2, "kind"), (3, "day"), (4, "n"))))  # fmt: skip
    mapping = json.dumps([{"field-id": 1, "names": ["text"]}])
    catalog.create_namespace("n")
    properties = {"schema.name-mapping.default": mapping}
    table = catalog.create_table("n.hive", schema, partition_spec=spec, properties=properties)
    days = (datetime.date(2026, 1, 2) - datetime.date(1970, 1, 1)).days
    with table.transaction() as change, change.update_snapshot().fast_append() as update:
        for number, values in enumerate([("spam", days, 7), (None, None, None)]):
            file = tmp_path / f"{number}.parquet"
            pq.write_table(pa.table({"text": [f"text {number}"]}), file)
            update.append_data_file(DataFile.from_args(
                content=DataFileContent.DATA, file_path=f"file://{file}", file_format=FileFormat.PARQUET,
                partition=Record(*values), record_count=1, file_size_in_bytes=file.stat().st_size, column_sizes={},
                value_counts={}, null_value_counts={}, nan_value_counts={}, lower_bounds={}, upper_bounds={},
                split_offsets=None, equality_ids=None, sort_order_id=None, spec_id=0,
            ))  # fmt: skip
    found = rows_of("iceberg:prod.n.hive").sort_by("text").select(["text", "kind", "day", "n"])
    assert found.to_pylist() == [
        {"text": "text 0", "kind": "spam", "day": datetime.date(2026, 1, 2), "n": 7},
        {"text": "text 1", "kind": None, "day": None, "n": None},
    ]
    assert (found.schema.field("day").type, found.schema.field("n").type) == (pa.date32(), pa.int32())


@pytest.mark.parametrize("change", ["rename", "delete"])
def test_iceberg_fields_that_are_renamed_or_gone_are_refused(catalog, change):
    catalog.create_namespace("n")
    rows = pa.table({"text": ["a"], "m": [{"a": "x", "deep": [{"z": "secret"}]}]})
    table = catalog.create_table("n.nested", rows.schema)
    table.append(rows)
    assert rows_of("iceberg:prod.n.nested")["m"].to_pylist() == rows["m"].to_pylist()
    with table.update_schema() as update:
        if change == "rename":
            update.rename_column(("m", "a"), "b")
        else:
            update.delete_column(("m", "deep", "element", "z"))
            update.add_column(("m", "deep", "element", "y"), StringType())
    with pytest.raises(DataError, match=r"the field '[az]' of the column 'm' .* rewrite the table's data files first"):
        read_footers("iceberg:prod.n.nested", ["text"])


def test_labels_may_be_partitions(spam_folder, tmp_path, emails):
    for label in ("ham", "spam"):
        (tmp_path / f"label={label}").mkdir()
        rows = emails.filter(pc.equal(emails["label"], label)).slice(0, 5).select(["text"])
        pq.write_table(rows, tmp_path / f"label={label}" / "a.parquet")
    found = pipelines.evaluate(spam_folder.path, tmp_path, **FLOAT32)
    assert (found.rows, found.metrics["tp"] + found.metrics["fn"]) == (10, 5)
