import json
import math
import shutil
import socket
from dataclasses import replace

import fsspec
import pytest

from pipelines.errors import DataError, ModelFolderError, PipelinesError
from pipelines.model.scorer import Scorer
from pipelines.model_files import hash_weights
from pipelines.model_folder import ModelFolder, read_model_folder, seal, write_pipeline_file
from pipelines.settings import Calibration, ComputeSettings, DecisionSettings, WindowSettings

FLOAT32 = ComputeSettings(dtype="float32", device="cpu")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "tokenizer.json").write_text("{}")
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.25,))
    return seal(ModelFolder(path, WindowSettings(max_length=128, stride=4), decision, Calibration(1.5), {"mcc": 0.5}))


def test_sealed_folder_round_trip(folder):
    read = read_model_folder(folder.path)
    assert read == folder
    assert read.settings_hash == folder.settings_hash
    assert read.windows.stride == 4
    assert read.decision.thresholds == (0.25,)


def test_reads_pairs_is_enforced(folder):
    for reads_pairs, refused in ((None, []), (True, [False]), (False, [True])):
        write_pipeline_file(replace(folder, reads_pairs=reads_pairs))
        found = read_model_folder(folder.path)
        assert (found.reads_pairs, found.settings_hash) == (reads_pairs, folder.settings_hash)
        for are_pairs in (True, False):
            if are_pairs in refused:
                with pytest.raises(DataError, match=r"was trained on (pairs|single texts)"):
                    found.check_texts(are_pairs=are_pairs)
            else:
                found.check_texts(are_pairs=are_pairs)


def test_url_is_fetched(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(folder.path), "/models/spam", recursive=True)
    read = read_model_folder("memory://models/spam")
    assert read.weights_hash == folder.weights_hash
    assert hash_weights(read.path) == folder.weights_hash
    write_pipeline_file(replace(folder, calibration=Calibration(2.5)))
    fsspec.filesystem("memory").put_file(str(folder.path / "pipeline.json"), "/models/spam/pipeline.json")
    assert read_model_folder("memory://models/spam").calibration.temperature == 2.5, (
        "changed files of equal size are fetched"
    )
    with pytest.raises(ModelFolderError, match="is empty or does not exist"):
        read_model_folder("memory://models/none")


def test_weights_hash_and_settings_hash(folder):
    (folder.path / "model.safetensors").write_bytes(b"other")
    other = seal(folder)
    assert other.weights_hash != folder.weights_hash
    assert other.settings_hash == folder.settings_hash


def test_killed_writer_keeps_old_settings(folder, monkeypatch):
    before = (folder.path / "pipeline.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_pipeline_file(folder)
    assert (folder.path / "pipeline.json").read_bytes() == before


def edit(path, **changes):
    content = json.loads((path / "pipeline.json").read_text())
    (path / "pipeline.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "pipeline.json").rename(path / "_run.json"), r"has no pipeline\.json.*pipelines train"),
        (lambda path: (path / "pipeline.json").rename(path / ".saving-1"), r"has no pipeline\.json.*pipelines train"),
        (lambda path: (path / "config.json").unlink(), r"has no config\.json"),
        (
            lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
            r"pickle \(pytorch_model\.bin\)",
        ),
        (lambda path: (path / "model.safetensors").unlink(), r"has no \*\.safetensors weights"),
        (lambda path: edit(path, format_version=99), "format version 99"),
        (lambda path: edit(path, windows={"max_lenght": 5}), "did you mean 'max_length'"),
        (lambda path: (path / "pipeline.json").write_text("{"), "cannot be read"),
    ],
)
def test_unfinished_and_unsafe_folders_are_refused(folder, spoil, message):
    spoil(folder.path)
    with pytest.raises(ModelFolderError, match=message):
        read_model_folder(folder.path)
    with pytest.raises(ModelFolderError, match="is not a folder"):
        read_model_folder(folder.path / "nothing")


def test_url_is_fetched_once_and_checked(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder.path), "/models/good", recursive=True)
    memory.put(str(folder.path), "/models/bad", recursive=True)
    found = read_model_folder("memory://models/good")
    monkeypatch.setattr(type(memory), "get", lambda *_, **__: pytest.fail("fetched twice"))
    assert read_model_folder("memory://models/good") == found
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with memory.open("/models/bad/model.safetensors", "wb") as file:
        file.write(b"other weights")
    with pytest.raises(ModelFolderError, match="memory://models/bad has changed since it was written"):
        read_model_folder("memory://models/bad")
    assert not [path for path in (tmp_path / "cache" / "ray-text-classification").iterdir() if ".fetch-" in path.name]


@pytest.mark.parametrize("temperature", [0, -1, "NaN", "Infinity", "warm", None])
def test_impossible_temperature_is_refused(spam_folder, tmp_path, temperature):
    shutil.copytree(spam_folder.path, tmp_path / "model")
    file = tmp_path / "model" / "pipeline.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": temperature}))
    with pytest.raises(ModelFolderError, match=r"pipeline\.json"):
        read_model_folder(tmp_path / "model")


CHANGES = {
    "weights": lambda path: change_byte(path / "model.safetensors"),
    "config": lambda path: (path / "config.json").write_text((path / "config.json").read_text() + " "),
    "tokenizer": lambda path: (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + " "),
    "one more file": lambda path: shutil.copy(path / "model.safetensors", path / "more.safetensors"),
    "no hash": lambda path: change_json(path / "pipeline.json", weights_hash=""),
}


def change_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_refused(spam_folder, tmp_path, name):
    shutil.copytree(spam_folder.path, tmp_path / "model")
    Scorer.load(tmp_path / "model", compute=ComputeSettings(device="cpu"))
    CHANGES[name](tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"are not those of its pipeline\.json: they have changed since"):
        Scorer.load(tmp_path / "model", compute=ComputeSettings(device="cpu"))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}',
                '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {"a": 7}}'],
)  # fmt: skip
def test_index_of_shards_stays_in_the_folder(spam_folder, tmp_path, content):
    shutil.copytree(spam_folder.path, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"model\.safetensors\.index\.json"):
        read_model_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("pipeline.json", ("decision",), "x"),
        ("pipeline.json", ("windows",), []),
        ("pipeline.json", ("windows", "stride"), 1e308),
        ("pipeline.json", ("decision", "labels"), {"a": 1}),
        ("pipeline.json", ("temperature",), {}),
        ("config.json", ("hidden_size",), 0),
        ("config.json", ("num_attention_heads",), [[]]),
        ("config.json", ("dtype",), math.nan),
        ("config.json", ("vocab_size",), -1),
        ("config.json", ("max_position_embeddings",), 1),
        ("config.json", ("model_type",), None),
        ("config.json", ("pad_token_id",), 10**12),
        ("tokenizer.json", ("post_processor", "single", 0, "SpecialToken", "id"), "x"),
        ("tokenizer.json", ("model", "vocab"), []),
        ("tokenizer_config.json", ("unk_token",), {"a": 1}),
        ("tokenizer.json", ("padding",), "x"),
        ("tokenizer.json", ("post_processor", "pair"), []),
        ("tokenizer.json", ("pre_tokenizer", "type"), 1),
    ],
)
def test_folders_with_wrong_values_are_refused(spam_folder, tmp_path, name, place, value):
    def spoil(content):
        for part in place[:-1]:
            content = content[part]
        content[place[-1]] = value

    with pytest.raises(PipelinesError):
        Scorer.load(changed(spam_folder, tmp_path, name, spoil), compute=FLOAT32)


def changed(original, tmp_path, name, change):
    """A copy of a folder with a changed file, and with a hash that fits, as a folder has that its maker broke."""
    folder = tmp_path / "model"
    shutil.copytree(original.path, folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    if name != "pipeline.json":
        pipeline = json.loads((folder / "pipeline.json").read_text())
        (folder / "pipeline.json").write_text(json.dumps({**pipeline, "weights_hash": hash_weights(folder)}))
    return folder


def test_attention_of_the_config_fetches_no_code(spam_folder, tmp_path, monkeypatch):
    """transformers fetches a kernel from the Hub for a name such as this one."""
    kernel = "kernels-community/flash-attn"
    more = {"attn_implementation": kernel, "_attn_implementation": kernel}
    folder = changed(spam_folder, tmp_path, "config.json", lambda content: content.update(more))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    assert Scorer.load(folder, compute=FLOAT32).model.module.config._attn_implementation != kernel


def test_hugging_face_folders_with_wrong_values_are_refused(spam_folder, tmp_path):
    """Without pipeline.json, transformers opens the tokenizer."""
    folder = changed(spam_folder, tmp_path, "tokenizer.json", lambda content: content.update(padding="x"))
    (folder / "pipeline.json").unlink()
    with pytest.raises(ModelFolderError, match="PaddingParams"):
        Scorer.load(folder, compute=FLOAT32)


def test_a_tokenizer_that_fails_on_a_text_is_an_error_of_ours(spam_folder, tmp_path):
    def without_unknown(content):
        content["model"]["vocab"]["removed"] = content["model"]["vocab"].pop("[UNK]")
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[UNK]"]

    folder = changed(spam_folder, tmp_path, "tokenizer.json", without_unknown)
    scorer = Scorer.load(folder, compute=FLOAT32)
    with pytest.raises(ModelFolderError, match="the tokenizer cannot read a text: WordPiece error"):
        scorer.predict(["漢字"])
