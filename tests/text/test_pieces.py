"""Long texts have the same tokens in pieces, with tokenizers of every kind."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.text import pieces
from tests.tiny import rust_tokenizer

SPECIAL = ["<unk>", "</s>"]


def byte_level(texts, **options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, show_progress=False))
    return tokenizer


def unigram(texts, scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=700, show_progress=False, unk_token="<unk>", special_tokens=SPECIAL)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def llama(texts):
    """As in Llama 2: no pre-tokenizer, so that the merges could cross words."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained.normalizer = normalizers.Sequence(marks)
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=SPECIAL)
    trained.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


KINDS = {
    "wordpiece": rust_tokenizer,
    "byte-level": byte_level,
    "byte-level without regex": lambda texts: byte_level(texts, use_regex=False),
    "unigram": lambda texts: unigram(texts, "always"),
    "unigram, first": lambda texts: unigram(texts, "first"),
    "llama": llama,
}


@pytest.fixture(scope="module")
def made(emails):
    return {name: make(emails["text"].to_pylist()[:60]) for name, make in KINDS.items()}


def whole(rust, text):
    encoding = rust.encode(text, add_special_tokens=False)
    return encoding.ids, [list(span) for span in encoding.offsets]


PARTS = st.one_of(
    st.tuples(st.just("email"), st.integers(0, 59), st.integers(1, 4)),
    st.tuples(st.sampled_from(["a", "ab ", " ", "\n", "=", "-=", "é", "e\u0301", "👩\u200d👧", "漢字", "\u00a0\t", "0",
                               "</s>", "[SEP]", "▁", "ﬁ", "x" * 90 + " ", "a\u200bb\u00ad c "]),
              st.integers(1, 3000), st.just(0)),
    st.tuples(st.text(max_size=80), st.integers(1, 9), st.just(0)),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=8))
def test_pieces_have_the_tokens_of_the_whole_text(made, emails, kind, parts):
    texts = emails["text"].to_pylist()
    text = "".join(texts[a] * b if kind == "email" else kind * a for kind, a, b in parts)[:60_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARACTERS", 2000)
        patch.setattr(pieces, "SHARED_CHARACTERS", 300)
        patch.setattr(pieces, "LONGEST_PIECE", 100)
        found = list(pieces.tokenize(made[kind], text))
        part = [token for piece in pieces.tokenize(made[kind], text, most_tokens=500) for token in piece.ids.tolist()]
    ids, spans = whole(made[kind], text)
    assert [token for piece in found for token in piece.ids.tolist()] == ids
    assert [span for piece in found for span in piece.spans.tolist()] == spans
    assert part[:500] == ids[:500]
    assert len(part) >= min(len(ids), 500)


@pytest.mark.parametrize("part", ["— ", "€ ", "👩\u200d👧", "\u00a0\t", "é", "\u00ad", "\u200b", " ", "e\u0301 "])
@pytest.mark.parametrize("kind", KINDS)
def test_places_that_are_too_low_are_noticed(made, emails, kind, part, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 2000)
    monkeypatch.setattr(pieces, "SHARED_CHARACTERS", 300)
    text = (emails["text"][3].as_py() + part * 3000)[:20_000]
    found = [token for piece in pieces.tokenize(made[kind], text) for token in piece.ids.tolist()]
    assert found == whole(made[kind], text)[0]


@pytest.mark.parametrize("text", [("x" * 199 + " ") * 3000, "x" * 500_000, " " * 500_000, "= " * 250_000])
def test_texts_without_a_seam_cost_little_more(made, text, monkeypatch):
    """Few tokens, or none, or equal ones: pieces become longer, each time twice as long."""
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 40_000)
    monkeypatch.setattr(pieces, "SHARED_CHARACTERS", 500)
    read, characters = pieces._of_range, []

    def counted(rust, whole, start, stop):
        characters.append(min(stop, len(whole)) - start)
        return read(rust, whole, start, stop)

    monkeypatch.setattr(pieces, "_of_range", counted)
    found = [token for piece in pieces.tokenize(made["wordpiece"], text) for token in piece.ids.tolist()]
    assert found == whole(made["wordpiece"], text)[0]
    assert sum(characters) < 5 * len(text)


MEASURE = """
import resource, sys
from pathlib import Path
from pipelines.text.tokenization import Tokenizer
text = Path(sys.argv[2]).read_text() * 2
tokenizer = Tokenizer.load(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(tokenizer.encode([text]).ids) > 10**6
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_of_a_long_text_is_bounded(made, emails, tmp_path):
    """4 MB of text take 850 MB if they are tokenized at once."""
    made["wordpiece"].save(str(tmp_path / "tokenizer.json"))
    text = "\n".join(emails["text"].to_pylist()) * 20
    (tmp_path / "text").write_text(text[: 2**21])
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "text")]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 200
