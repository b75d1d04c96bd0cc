"""OpenVINO: logits are those of PyTorch, conversions are cached, and models that it cannot run stay with PyTorch."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from pipelines.errors import ModelFolderError, SettingsError
from pipelines.model import loading, openvino_files
from pipelines.model.openvino_files import CannotConvertError, convert, converted, details_of
from pipelines.model.openvino_model import OpenVinoModel, openvino
from pipelines.model.probes import probe_rows
from pipelines.model.scorer import Scorer
from pipelines.model.weights import set_pad_token
from pipelines.model.window_model import WindowModel
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings
from pipelines.text.pretrained import load_tokenizer
from pipelines.text.tokenization import assemble
from tests.model.families import tiny_classifier
from tests.model.rows import TEMPLATE, ragged
from tests.model.test_sweep import logits_alone

pytest.importorskip("openvino", reason="in the openvino extra")
PADDED = ComputeSettings(dtype="float32", device="cpu", packing="off")
OPENVINO = ComputeSettings(engine="openvino", dtype="float32")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the families' own code


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ray-text-classification" / "openvino"


def padded_model(family, **changes):
    module = tiny_classifier(family, **changes)
    set_pad_token(module.config, 0)
    return WindowModel(module, TEMPLATE, PADDED)


@pytest.mark.parametrize(
    "family", ["bert", "deberta-v2", "distilbert", "modernbert", "mpnet", "roberta", "xlnet", "llama"]
)
def test_logits_are_those_of_single_windows(family):
    model = padded_model(family)
    graph, details, cut = convert(model), details_of(model), ragged()
    rows = assemble(cut, TEMPLATE, np.arange(len(cut.length_W)))
    expected = logits_alone(model.module, rows)
    found = OpenVinoModel.compile(graph, details, TEMPLATE, PADDED).logits(cut)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    narrow = OpenVinoModel.compile(graph, details, TEMPLATE, ComputeSettings(dtype="bfloat16")).logits(cut)
    assert np.abs(narrow - expected).max() < 0.15 * np.ptp(expected)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("modernbert", {"num_hidden_layers": 4, "local_attention": 16, "global_attn_every_n_layers": 3}),
        ("mistral", {"num_hidden_layers": 3, "sliding_window": 16, "max_position_embeddings": 512}),
    ],
)
def test_padding_beyond_a_sliding_window_changes_nothing(family, changes):
    """A token of the padding that sees no token at all must not spread to the others."""
    model = padded_model(family, **changes)
    rows = probe_rows(model, (3, 100, 30))
    found = OpenVinoModel.compile(convert(model), details_of(model), TEMPLATE, PADDED)
    alone = np.concatenate([model.run(rows.take(np.array([place]))) for place in range(3)])
    np.testing.assert_allclose(found.run(rows), alone, atol=1e-4 * max(1, np.abs(alone).max()))


def test_longrope_reads_short_windows_as_short_ones_beside_long_ones():
    """transformers chooses the frequencies of a batch by its longest row, and OpenVINO keeps those of one length."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": 64}  # fmt: skip
    positions = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32}
    model = padded_model("phi3", rope_parameters=rope, **positions, **heads)
    rows = probe_rows(model, (5, 200, 60, 30, 100))
    alone = np.concatenate([model.run(rows.take(np.array([place]))) for place in range(5)])
    np.testing.assert_allclose(model.run(rows), alone, atol=1e-5)
    with pytest.raises(CannotConvertError, match="windows of more than 64 tokens in another way"):
        convert(model, longest=512)


def test_long_windows_are_compared_whatever_the_positions(monkeypatch):
    compared = []

    def noted(model, lengths=(7, 7, 4)):
        compared.extend(lengths)
        return probe_rows(model, lengths)

    monkeypatch.setattr("pipelines.model.probes.probe_rows", noted)
    convert(padded_model("bert", max_position_embeddings=300))
    assert max(compared) == 298, "all 300 positions, with two special tokens"


def test_models_can_be_pickled(spam_folder):
    texts = ["free money " * 50, "see you at noon"]
    scorer = Scorer.load(spam_folder, compute=OPENVINO)
    expected = scorer.predict(texts)
    for _ in range(2):  # a model that was pickled can be pickled again
        scorer = pickle.loads(pickle.dumps(scorer))
        assert scorer.predict(texts).equals(expected)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("t5", "one padded batch"), ("gpt2", "other logits"), ("mixtral", "cannot be converted")],
)  # fmt: skip
def test_other_families_are_refused(family, reason):
    with pytest.raises(CannotConvertError, match=reason):
        convert(padded_model(family))


def test_many_threads_run_several_batches_at_once():
    model = padded_model("bert")
    cut = ragged((40,) * 30)
    compute = replace(PADDED, num_threads=8, batch_tokens=128)
    found = OpenVinoModel.compile(convert(model), details_of(model), TEMPLATE, compute)
    assert found._pool is not None
    np.testing.assert_allclose(found.logits(cut), model.logits(cut), atol=1e-5)


def test_signals_are_handled_after_models_are_freed(spam_folder):
    """OpenVINO leaves a thread with a stack for signals that is gone, if two of its Cores end in order."""
    program = (
        "import os, pipelines, signal\n"
        "from pipelines.settings import ComputeSettings\n"
        "compute = ComputeSettings(engine='openvino', dtype='float32')\n"
        f"first, second = (pipelines.Scorer.load({str(spam_folder.path)!r}, compute=compute) for _ in range(2))\n"
        "del first\n"
        "del second\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled', flush=True))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    command = [sys.executable, "-X", "faulthandler", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (run.returncode, run.stdout) == (0, "handled\n"), run.stderr


def test_scores_are_those_of_torch_for_texts_and_pairs(folders):
    for folder in folders.values():
        pairs = [("one text", "and another " * 40), ("", "x"), ("the same", "the same")]
        texts = ["a text " * 100, "", "short", None]
        torch, found = (Scorer.load(folder, compute=replace(PADDED, engine=name)) for name in ("torch", "openvino"))
        assert (torch.model.name, found.model.name) == ("torch", "openvino")
        assert "openvino in float32, padded" in repr(found)
        for rows in (pairs, texts):
            one, other = torch.predict(rows).to_pylist(), found.predict(rows).to_pylist()
            for expected, row in zip(one, other, strict=True):
                numbers = [name for name in expected if name in ("score", "scores", "predicted_value")]
                for name in numbers:
                    wanted, value = expected.pop(name), row.pop(name)
                    assert value == (None if wanted is None else pytest.approx(wanted, abs=1e-5))
                assert row == expected


def test_conversion_is_kept_and_used_without_torch(spam_folder, cache):
    assert Scorer.load(spam_folder, compute=OPENVINO).model.name == "openvino"
    (kept,) = [place for place in cache.iterdir() if place.is_dir()]
    program = (
        "import sys, pipelines\n"
        "from pipelines.settings import ComputeSettings\n"
        f"scorer = pipelines.Scorer.load({str(spam_folder.path)!r}, compute=ComputeSettings(engine='openvino'))\n"
        "print(scorer.predict(['a text'])['predicted_label'].to_pylist())\n"
        "loaded = [name for name in ('torch', 'transformers', 'ray') if name in sys.modules]\n"
        "print(loaded, sys.modules['openvino_telemetry'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout.splitlines()[1] == "[] None", run.stderr
    (kept / "openvino_model.bin").write_bytes(b"cut")
    before = kept.stat().st_ino
    assert Scorer.load(spam_folder, compute=OPENVINO).predict(["a text"])["error"].to_pylist() == [None]
    (again,) = [place for place in cache.iterdir() if place.is_dir()]
    assert again == kept
    assert again.stat().st_ino != before, "a damaged copy is converted again"


def test_refusal_is_kept_and_said_once(spam_folder, cache, monkeypatch, log_lines):
    tries = []

    def refuse(model, **_):
        tries.append(model)
        raise CannotConvertError("it has an operation that OpenVINO lacks")

    monkeypatch.setattr(openvino_files, "convert", refuse)
    monkeypatch.setattr(loading, "SMALLEST_BYTES", 0)
    for _ in range(3):
        assert Scorer.load(spam_folder).model.name == "torch"
    assert len(tries) == 1
    assert sum("lacks" in line for line in log_lines) == 1
    with pytest.raises(ModelFolderError, match="lacks; use engine=torch"):
        Scorer.load(spam_folder, compute=OPENVINO)
    assert len(tries) == 2, "who asks for it gets another try"


def test_cache_that_cannot_be_written_leaves_the_choice_to_torch(spam_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SMALLEST_BYTES", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Scorer.load(spam_folder).model.name == "torch"
    with pytest.raises(ModelFolderError, match="set XDG_CACHE_HOME"):
        Scorer.load(spam_folder, compute=OPENVINO)


def test_cache_that_is_read_only_is_used(spam_folder, cache, monkeypatch):
    Scorer.load(spam_folder, compute=OPENVINO)

    def refuse(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(openvino_files, "convert", refuse)
    assert Scorer.load(spam_folder, compute=OPENVINO).model.name == "openvino"


def test_full_disk_leaves_the_choice_to_torch(spam_folder, cache, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Exception from core: cannot write")

    monkeypatch.setattr(loading, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(openvino(), "save_model", refuse)
    assert Scorer.load(spam_folder).model.name == "torch"
    monkeypatch.undo()
    assert not list(cache.glob("*/refused.json")), "it is tried again when there is room"


def test_windows_longer_than_usual_are_compared_too(monkeypatch):
    lengths = []
    model = padded_model("modernbert")
    run = model.run
    monkeypatch.setattr(model, "run", lambda rows: (lengths.append(int(rows.length_W.max())), run(rows))[1])
    convert(model, longest=700)
    assert max(lengths) >= min(700, model.row_limit)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_tokenizer_with_more_tokens_than_the_model_is_refused(spam_folder, engine):
    """OpenVINO gives numbers, and no error, for a token that the model does not have."""
    scorer = Scorer.load(spam_folder, compute=ComputeSettings(engine=engine))
    assert scorer.model.vocabulary == 600
    with pytest.raises(ModelFolderError):
        scorer.tokenizer.check_vocabulary(scorer.tokenizer.highest_id, where="the model")


def test_cache_keeps_the_models_that_were_used_last(spam_folder, cache, monkeypatch):
    monkeypatch.setattr(openvino_files, "MOST_KEPT", 2)
    cache.mkdir(parents=True)
    for number in range(4):
        (cache / f"old{number}").mkdir()
        os.utime(cache / f"old{number}", (number, number))
    folder = read_model_folder(spam_folder.path)
    place = converted(folder, load_tokenizer(folder.path).template)
    assert {entry.name for entry in cache.iterdir() if entry.is_dir()} == {place.name, "old3"}


def test_auto_chooses_by_size_dtype_and_what_is_installed(spam_folder, monkeypatch):
    def name(**settings):
        return Scorer.load(spam_folder, compute=ComputeSettings(**settings)).model.name

    assert name() == "torch", "a tiny model is converted for longer than it runs"
    monkeypatch.setattr(loading, "SMALLEST_BYTES", 0)
    assert name() == name(device="cpu") == "openvino"
    assert name(packing="off") == name(engine="torch") == "torch"
    monkeypatch.setattr(loading, "is_installed", lambda: False)
    assert name() == "torch"
    with pytest.raises(SettingsError, match=r"not installed: pip install 'ray-text-classification\[openvino\]'"):
        name(engine="openvino")


def test_what_openvino_does_not_have_is_refused(spam_folder):
    for settings, reason in (({"device": "cuda"}, "runs on a CPU"), ({"dtype": "float16"}, "not in float16")):
        with pytest.raises(SettingsError, match=reason):
            Scorer.load(spam_folder, compute=ComputeSettings(engine="openvino", **settings))


def test_other_number_of_labels_is_refused(spam_folder, tmp_path):
    Scorer.load(spam_folder, compute=OPENVINO)
    copy = tmp_path / "copy"
    shutil.copytree(spam_folder.path, copy)
    content = json.loads((copy / "pipeline.json").read_text())
    content["decision"] = {"kind": "multiclass", "labels": ["a", "b", "c"]}
    (copy / "pipeline.json").write_text(json.dumps(content))
    with pytest.raises(ModelFolderError, match=r"2 logits .* 3 labels"):
        Scorer.load(copy, compute=OPENVINO)
