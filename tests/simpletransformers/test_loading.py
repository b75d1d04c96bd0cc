"""What a facade refuses when it opens a model: code in folders, damaged weights, keywords, values of a wrong type."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from pipelines.classification import ClassificationArgs, ClassificationModel
from pipelines.errors import ModelFolderError, SettingsError
from pipelines.model.weights import describe
from pipelines.simpletransformers.convert import convert
from tests.simpletransformers.facades import open_model, train_frame
from tests.simpletransformers.golden import freeze_simpletransformers as golden

pytestmark = pytest.mark.filterwarnings("ignore:without effect here")
SHORT = {"max_seq_length": 32}


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden model without model_args.json."""
    path = tmp_path / "model"
    shutil.copytree(golden.HERE / "binary", path, ignore=shutil.ignore_patterns("model_args.json"))
    return path


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("model_type", ["bert", "of_the_folder"])
def test_code_in_a_folder_never_runs(folder, tmp_path, model_type):
    marker = tmp_path / "it_ran"
    (folder / "code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import BertConfig as C, BertForSequenceClassification as M, BertTokenizerFast as T\n"
        "class C(C):\n    model_type = 'of_the_folder'\n"
    )
    classes = {
        "AutoConfig": "code.C",
        "AutoModelForSequenceClassification": "code.M",
        "AutoTokenizer": ["code.T", None],
    }
    change_config(folder, auto_map=classes, model_type=model_type)
    for action in (
        lambda: ClassificationModel("auto", str(folder), args=SHORT, use_cuda=False),
        lambda: ClassificationModel(
            "auto", str(folder), args={**SHORT, "config": {"trust_remote_code": False}}, use_cuda=False
        ),
        lambda: describe(str(folder)),
        lambda: convert(str(folder), str(tmp_path / "new"), "binary"),
    ):
        if model_type == "bert":
            action()
        else:
            with pytest.raises(ModelFolderError):
                action()
        assert not marker.exists()
    for options in ({"trust_remote_code": True}, {"args": {"config": {"trust_remote_code": True}}}):
        with pytest.raises(SettingsError, match="remote code never runs"):
            ClassificationModel("auto", str(folder), use_cuda=False, **options)


def test_damaged_weights_are_named(folder):
    weights = (folder / "model.safetensors").read_bytes()
    for content in (b"", b"nothing", weights[:100], weights[: len(weights) // 2]):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelFolderError, match=r"cannot be used: .* check that config\.json belongs to them"):
            ClassificationModel("bert", str(folder), use_cuda=False)
    (folder / "model.safetensors").write_bytes(weights)
    found = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in found.items() if "layer.0" not in name}, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"lacks .* weights of its body"):
        ClassificationModel("bert", str(folder), use_cuda=False)


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_damaged_files_are_named(folder, tmp_path, content):
    (folder / "model_args.json").write_text(content)
    for action in (
        lambda: convert(str(folder), str(tmp_path / "new")),
        lambda: ClassificationModel("bert", str(folder), use_cuda=False),
    ):
        with pytest.raises(ModelFolderError, match=r"model_args\.json is not"):
            action()
    (folder / "model_args.json").unlink()
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        ClassificationModel("bert", str(folder), use_cuda=False)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"dtype": "bfloat16"}, "dtype='bfloat16' is refused: weights are loaded in float32"),
     ({"config": {}}, "config={} is refused"), ({"use_safetensors": False}, "pipelines convert OLD NEW"),
     ({"weights_only": False}, "pipelines convert OLD NEW")],
)  # fmt: skip
def test_fixed_keywords_are_refused(keywords, message):
    with pytest.raises(SettingsError, match=message):
        ClassificationModel("bert", str(golden.HERE / "binary"), use_cuda=False, **keywords)


def test_harmless_keywords_are_taken():
    harmless = {"dtype": "auto", "use_safetensors": True, "weights_only": True, "output_loading_info": False}
    ClassificationModel("bert", str(golden.HERE / "binary"), use_cuda=False, **harmless)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("sliding_window", "False", "True or False"), ("silent", "yes", "True or False"), ("silent", 2, "True or False"),
     ("labels_list", "ham,spam", "a list"), ("labels_list", {"ham", "spam"}, "a list"),
     ("labels_map", ["ham", "spam"], "a mapping")],
)  # fmt: skip
def test_values_of_a_wrong_type(name, value, kind):
    for action in (lambda: ClassificationArgs(**{name: value}), lambda: open_model("binary", **{name: value})):
        with pytest.raises(SettingsError, match=f"argument {name}=.* must be {kind}"):
            action()


def test_args_are_an_object():
    model = open_model("binary")
    with pytest.raises(SettingsError, match=r"args must be an Args object, not dict; .* model\.args\.name = value"):
        model.args = {"silent": True}


def test_every_weight_is_compared_with_its_copy():
    """Rows that change places keep every sum of weights."""
    model = open_model("binary", dtype="bfloat16")
    text = golden.read_texts()[:4]
    before = model.predict(text)[1]
    for parameter in model.model.classifier.parameters():
        parameter.data.copy_(parameter.data.flip(0))
    for left, right in zip(model.predict(text)[1], before, strict=True):
        assert (abs(left[..., ::-1] - right) < 1e-5).all()


def test_metrics_may_return_tensors(tmp_path):
    import torch

    model = open_model("binary", evaluate_during_training=True, output_dir=str(tmp_path / "out"))
    frame = train_frame("binary")
    _, progress = model.train_model(
        frame, eval_df=frame, share=lambda true, found: torch.tensor(true == found).float().mean()
    )
    assert isinstance(progress["share"][0], float)
    assert model.eval_model(frame, half=lambda *_: torch.tensor(0.5))[0]["half"] == 0.5
