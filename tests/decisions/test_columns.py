import numpy as np
import pyarrow as pa
import pytest

from pipelines.decisions.columns import check_output_columns, output_fields, result_columns
from pipelines.decisions.labels import decide
from pipelines.errors import DataError
from pipelines.settings import DecisionSettings
from pipelines.storage.columns import check_text_column, read_texts

KINDS = {
    "binary": DecisionSettings(kind="binary", labels=("ham", "spam")),
    "multiclass": DecisionSettings(kind="multiclass", labels=("a", "b", "c"), abstain_below=0.5),
    "multilabel": DecisionSettings(kind="multilabel", labels=("a", "b", "c")),
    "regression": DecisionSettings(kind="regression"),
}


def results(decision, scores_DL, errors, prefix=""):
    num = len(scores_DL)
    return result_columns(
        decide(scores_DL, decision),
        scores_DL,
        decision=decision,
        num_tokens_D=np.full(num, 7),
        num_windows_D=np.ones(num, np.int64),
        truncated_D=np.zeros(num, bool),
        errors=errors,
        prefix=prefix,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_columns_match_schema_and_are_null_on_error(kind):
    decision = KINDS[kind]
    scores_DL = np.full((3, decision.num_labels), 0.75, np.float32)
    table = results(decision, scores_DL, [None, "the text is null", None], prefix="m_")
    assert table.schema.equals(pa.schema(output_fields(decision, prefix="m_")[2:]))
    bad = table.to_pylist()[1]
    assert bad["m_error"] == "the text is null"
    assert bad["m_scores"] is None
    assert bad["m_score"] is None
    assert bad[table.column_names[0]] is None
    table.validate(full=True)


def test_decision_column_values():
    scores_DL = np.array([[0.4, 0.6], [0.9, 0.1]], np.float32)
    rows = results(KINDS["binary"], scores_DL, [None, None]).to_pylist()
    assert [row["predicted_label"] for row in rows] == ["spam", "ham"]
    np.testing.assert_allclose([row["score"] for row in rows], [0.6, 0.9])
    scores_DL = np.array([[0.4, 0.3, 0.3], [0.1, 0.8, 0.1]], np.float32)
    rows = results(KINDS["multiclass"], scores_DL, [None, None]).to_pylist()
    assert [row["predicted_label"] for row in rows] == [None, "b"]
    assert rows[0]["score"] is None
    rows = results(KINDS["multilabel"], scores_DL + 0.25, [None, None]).to_pylist()
    assert [row["predicted_labels"] for row in rows] == [["a", "b", "c"], ["b"]]
    empty = results(KINDS["multilabel"], np.zeros((0, 3), np.float32), [])
    assert len(empty) == 0


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_arrow_string_types(kind):
    column = pa.chunked_array([pa.array(["a", None], pa.string()).cast(kind) if "dict" not in str(kind) else
                               pa.array(["a", None]).dictionary_encode()])  # fmt: skip
    check_text_column(pa.schema({"text": column.type}), "text", where="f")
    texts = read_texts(column)
    assert texts.texts == ["a", ""]
    assert texts.errors == [None, "the text is null"]


def test_column_error_messages():
    schema = pa.schema({"body": pa.string(), "id": pa.int64(), "score": pa.float32()})
    with pytest.raises(DataError, match=r"f\.parquet has no column 'text'; it has: body, id, score"):
        check_text_column(schema, "text", where="f.parquet")
    with pytest.raises(DataError, match=r"f\.parquet has a column 'id' of type int64, not string"):
        check_text_column(schema, "id", where="f.parquet")
    with pytest.raises(
        DataError, match=r"input column 'score' has the same name as an output column.*--keep 'id'.*--prefix"
    ):
        check_output_columns(schema.names, ["id", "score"], ["score", "error"], prefix="")
    with pytest.raises(DataError, match="--keep names 'nope'"):
        check_output_columns(schema.names, ["nope"], ["score"], prefix="")
