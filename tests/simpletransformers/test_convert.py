import json
import os
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipelines import cli
from pipelines.errors import ModelFolderError, OutputError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.settings import ComputeSettings
from pipelines.simpletransformers.convert import convert
from pipelines.simpletransformers.models import ClassificationModel, MultiLabelClassificationModel
from tests.simpletransformers.golden import freeze_simpletransformers as golden

FLOAT32 = ComputeSettings(dtype="float32", device="cpu")


def pickled(source, folder, keep=("model_args.json",)):
    """The golden folder of a kind in the old pickle format of Simple Transformers."""
    folder.mkdir()
    for file in (golden.HERE / source).iterdir():
        if file.suffix != ".safetensors" and (file.name != "model_args.json" or file.name in keep):
            (folder / file.name).write_bytes(file.read_bytes())
    module = AutoModelForSequenceClassification.from_pretrained(golden.HERE / source)
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.filterwarnings("ignore:without effect here")
@pytest.mark.parametrize("kind", golden.CASES)
def test_pickled_folder_is_converted(kind, tmp_path):
    old = pickled(kind, tmp_path / "old")
    facade = MultiLabelClassificationModel if kind == "multilabel" else ClassificationModel
    with pytest.raises(ModelFolderError, match=f"pytorch_model.bin.* pipelines convert {old} NEW"):
        facade("auto", str(old), use_cuda=False)
    assert cli.main(["convert", str(old), str(tmp_path / "new"), "--json"]) == 0
    texts = golden.read_texts()
    theirs = facade("auto", str(golden.HERE / kind), use_cuda=False).predict(texts)
    ours = facade("auto", str(tmp_path / "new"), use_cuda=False)
    assert ours.args.window_plan == "simpletransformers"
    found = ours.predict(texts)
    assert np.array_equal(np.asarray(found[0]), np.asarray(theirs[0]))
    for left, right in zip(found[1], theirs[1], strict=True):
        np.testing.assert_array_equal(left, right)
    core = Scorer.load(str(tmp_path / "new"), compute=FLOAT32).predict(texts).to_pylist()
    if kind == "regression":
        np.testing.assert_allclose([row["predicted_value"] for row in core], theirs[0], atol=1e-5)
    elif kind != "multilabel":
        assert [int(row["predicted_label"]) for row in core] == list(theirs[0])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/pipelines-was-here",)


def test_malicious_pickle_does_not_run(tmp_path):
    old = pickled("binary", tmp_path / "old")
    (old / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Hostile()}, protocol=2))
    with pytest.raises(ModelFolderError, match=r"cannot be read|contains objects other than tensors"):
        convert(str(old), str(tmp_path / "new"))
    torch.save({"weight": Hostile()}, old / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="is refused: it contains objects other than tensors"):
        convert(str(old), str(tmp_path / "new"))
    assert not os.path.exists("/tmp/pipelines-was-here")
    assert [path.name for path in tmp_path.iterdir()] == ["old"], "no output folder is left"


def test_convert_needs_kind_of_plain_classifier(tmp_path):
    old = pickled("multiclass", tmp_path / "old", keep=())
    config = json.loads((old / "config.json").read_text())
    config.pop("problem_type", None)
    (old / "config.json").write_text(json.dumps({**config, "id2label": {0: "a", 1: "b", 2: "c"}}))
    with pytest.raises(SettingsError, match="does not say what its labels mean; add --kind multiclass or multilabel"):
        convert(str(old), str(tmp_path / "new"))
    with pytest.raises(SettingsError, match="--kind several is not one of: binary, multiclass"):
        convert(str(old), str(tmp_path / "new"), "several")
    folder = convert(str(old), str(tmp_path / "new"), "multilabel")
    assert (folder.decision.kind, folder.decision.labels) == ("multilabel", ("a", "b", "c"))
    assert folder.windows.window_plan == "exact"
    with pytest.raises(OutputError, match="not empty"):
        convert(str(old), str(tmp_path / "new"), "multilabel")
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        convert(str(tmp_path), str(tmp_path / "other"))


@pytest.mark.parametrize("new", ["/proc/new", "/etc/hostname/new"])
def test_folder_that_cannot_be_written_is_said(new, capsys):
    assert cli.main(["convert", str(golden.HERE / "binary"), new]) == 2
    assert f"{new} cannot be written" in capsys.readouterr().err
