import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import ModelFolderError, SettingsError
from pipelines.text import pieces, tokenization
from pipelines.text.template import template_of
from pipelines.text.tokenization import (
    Template,
    Tokenizer,
    Tokens,
    assemble,
    concat_documents,
    cut_documents,
    offsets_of,
)
from pipelines.text.windows import WindowPlan
from tests.tiny import rust_tokenizer


@pytest.fixture(scope="module")
def rust(emails):
    return rust_tokenizer(emails["text"].to_pylist()[:40])


@pytest.fixture
def folder(rust, tmp_path):
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    return tmp_path


def test_stored_truncation_and_padding_are_ignored(rust, folder, emails):
    rust.enable_truncation(128)
    rust.enable_padding(length=128)
    rust.save(str(folder / "tokenizer.json"))
    rust.no_truncation()
    rust.no_padding()
    text = max(emails["text"].to_pylist(), key=len)
    tokens = Tokenizer.load(folder).encode([text, "short"])
    whole = rust.encode(text, add_special_tokens=False).ids
    assert tokens.num_tokens_D.tolist() == [len(whole), len(rust.encode("short", add_special_tokens=False).ids)]
    assert tokens.ids[: len(whole)].tolist() == whole
    assert len(whole) > 1000


def test_long_texts_are_read_in_pieces_and_no_further_than_needed(folder, emails, monkeypatch):
    text = "\n".join(emails["text"].to_pylist()[:30])
    tokenizer = Tokenizer.load(folder)
    whole = tokenizer.encode(["short", text, "short", text, text])
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 5000)
    monkeypatch.setattr(pieces, "SHARED_CHARACTERS", 500)
    parts = tokenizer.encode(["short", text, "short", text, text])
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.offsets, parts.offsets)
    np.testing.assert_array_equal(tokenizer.character_spans(text)[:, 0], sorted(tokenizer.character_spans(text)[:, 0]))
    few = tokenizer.with_most_tokens(100)
    (first,) = few.encode([text]).num_tokens_D
    assert 100 <= first < 0.5 * whole.num_tokens_D[1]
    np.testing.assert_array_equal(few.encode([text]).ids, parts.take(np.array([1])).ids[:first])
    table = pa.table({"a": [text], "b": [text]})
    assert few.documents(table, "a", "b").num_tokens_D[0] == 2 * whole.num_tokens_D[1], "pairs are read as a whole"


def test_split_encode_calls_give_same_tokens(folder, emails, monkeypatch):
    texts = emails["text"].to_pylist()[:60]
    tokenizer = Tokenizer.load(folder)
    whole = tokenizer.encode(texts)
    monkeypatch.setattr(tokenization, "CHARACTERS_PER_CALL", 5000)
    parts = tokenizer.encode(texts)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.offsets, parts.offsets)
    assert len(tokenizer.encode([])) == 0


def test_template_is_read_from_tokenizer(folder):
    template = Tokenizer.load(folder).template
    assert template == Template((2,), (3,), (0, 0, 0), (2,), (3,), (3,), (0, 0, 0, 1, 1), 0, False)
    assert (template.num_special_tokens(pair=False), template.num_special_tokens(pair=True)) == (2, 3)


def test_roberta_template_has_two_separators(emails, tmp_path):
    rust_tokenizer(emails["text"].to_pylist()[:5], roberta=True).save(str(tmp_path / "tokenizer.json"))
    template = Tokenizer.load(tmp_path).template
    assert template.pair_middle == (3, 3)
    assert template.num_special_tokens(pair=True) == 4


@pytest.mark.parametrize("pair", [False, True])
def test_single_window_matches_tokenizer(rust, folder, pair):
    tokenizer = Tokenizer.load(folder)
    first, second = ["free money", "", "meeting at noon"], ["now", "tomorrow it is", ""]
    pair_tokens = tokenizer.encode(second) if pair else None
    cut = cut_documents(tokenizer.encode(first), WindowPlan(64, 62, 50), tokenizer.template, pair_tokens)
    rows = assemble(cut, tokenizer.template, np.array([2, 0, 1]))
    for place, document in enumerate([2, 0, 1]):
        expected = rust.encode(first[document], second[document]) if pair else rust.encode(first[document])
        own = slice(rows.offsets[place], rows.offsets[place + 1])
        assert rows.ids[own].tolist() == expected.ids
        assert rows.type_ids[own].tolist() == expected.type_ids
    np.testing.assert_array_equal(rows.length_W, cut.length_W[[2, 0, 1]])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(6, 40))
def test_pair_truncation_matches_tokenizer(first, second, max_length):
    rust = rust_tokenizer_of_letters()
    tokens, pair = (Tokens(np.full(n, 10, np.int32), np.array([0, n])) for n in (first, second))
    template = template_of(rust)
    cut = cut_documents(tokens, WindowPlan(max_length, max_length - 2, 1, sliding=False), template, pair)
    rust.enable_truncation(max_length, strategy="longest_first")
    expected = rust.encode(" ".join("a" * first), " ".join("a" * second))
    rust.no_truncation()
    assert cut.length_W.tolist() == [len(expected.ids)]
    assert cut.first_kept_D.tolist() == [expected.sequence_ids.count(0)]
    assert cut.windows.truncated_D.tolist() == [first + second + 3 > max_length]


def rust_tokenizer_of_letters(cache={}):  # noqa: B006  built once
    if not cache:
        cache["tokenizer"] = rust_tokenizer(["a"] * 10)
    return cache["tokenizer"]


@given(st.integers(0, 60), st.integers(0, 200), st.integers(8, 50))
def test_pair_windows_keep_all_second_tokens(first, second, max_length):
    tokens = Tokens(np.arange(first, dtype=np.int32), np.array([0, first]))
    pair = Tokens(np.arange(1000, 1000 + second, dtype=np.int32), np.array([0, second]))
    template = Template((2,), (3,), (0, 0, 0), (2,), (3,), (3,))
    cut = cut_documents(tokens, WindowPlan(max_length, max_length - 2, max(1, max_length // 2)), template, pair)
    rows = assemble(cut, template, np.arange(len(cut.length_W)))
    assert (rows.length_W <= max_length).all()
    assert set(range(1000, 1000 + second)) <= set(rows.ids.tolist())
    kept = int(cut.first_kept_D[0])
    assert kept >= min(first, (max_length - 3) // 2)
    assert cut.windows.truncated_D[0] == (kept < first)


def test_pair_without_room_is_refused():
    tokens = Tokens(np.zeros(3, np.int32), np.array([0, 3]))
    with pytest.raises(SettingsError, match="no room for a pair"):
        cut_documents(tokens, WindowPlan(4, 2, 1), Template((2,), (3,), (0, 0, 0), (2,), (3,), (3,)), tokens)


@given(st.lists(st.integers(0, 9), max_size=8), st.data())
def test_tokens_arrow_round_trip_and_take(lengths, data):
    lengths = np.array(lengths, dtype=np.int64)
    tokens = Tokens(np.arange(lengths.sum(), dtype=np.int32), offsets_of(lengths))
    column = tokens.to_arrow()
    for back in (Tokens.from_arrow(column), Tokens.from_arrow(pa.chunked_array([column]))):
        np.testing.assert_array_equal(back.ids, tokens.ids)
        np.testing.assert_array_equal(back.offsets, tokens.offsets)
    start = data.draw(st.integers(0, len(lengths)))
    part = Tokens.from_arrow(column.slice(start))
    taken = tokens.take(np.arange(start, len(lengths)))
    np.testing.assert_array_equal(part.ids, taken.ids)
    np.testing.assert_array_equal(part.offsets, taken.offsets)


def test_bad_texts_become_row_errors(folder):
    tokenizer = Tokenizer.load(folder)
    broken = pa.array([b"fine", b"\xed\xa0\x80 half", None], pa.binary()).view(pa.string())
    documents = tokenizer.documents(pa.table({"text": broken}), "text")
    assert documents.errors[0] is None
    assert documents.errors[1].startswith("the text is not valid UTF-8 (byte 0")
    assert documents.errors[2] == "the text is null"
    assert documents.num_tokens_D.tolist()[1:] == [0, 0]
    pairs = tokenizer.documents(pa.table({"a": ["x", "y"], "b": ["x", None]}), "a", "b")
    assert pairs.errors == [None, "the text is null"]
    together = concat_documents([documents, documents.take(np.array([0]))])
    assert together.errors == [*documents.errors, None]


def test_character_spans_count_code_points(folder):
    text = "💰💰 a b"
    spans = Tokenizer.load(folder).character_spans(text)
    assert spans.tolist()[-2:] == [[3, 4], [5, 6]]


def test_missing_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
