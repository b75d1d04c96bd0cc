"""Import time of the package, and the modules that it loads."""

import subprocess
import sys

import pytest

import pipelines

HEAVY = ("torch", "ray", "transformers", "sklearn")
WITHOUT_TORCH = [
    "pipelines.config_file",
    "pipelines.model_folder",
    "pipelines.storage.rows",
    "pipelines.text.stage",
    "pipelines.decisions.columns",
    "pipelines.bulk.job",
    "pipelines.bulk.score",
    "pipelines.bulk.relabel",
    "pipelines.bulk.drift",
    "pipelines.training.corpus",
    "pipelines.training.splits",
    "pipelines.simpletransformers.arguments",
    "pipelines.simpletransformers.translate",
    "pipelines.simpletransformers.inputs",
    "pipelines.simpletransformers.outputs",
    "pipelines.serving.batcher",
    "pipelines.api",
    "pipelines.cli",
]


def loaded_by(code):
    """The output of a new process, and the heavy packages that it loaded."""
    code = f"{code}\nimport sys; print('LOADED', *(name for name in {HEAVY} if name in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    printed, _, loaded = shown.rpartition("LOADED")
    return printed, loaded.split()


def test_import_time_and_no_heavy_modules():
    code = "import time; started = time.perf_counter(); import pipelines; print(time.perf_counter() - started)"
    seconds, loaded = loaded_by(code)
    assert float(seconds) < 0.2
    assert loaded == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_modules_without_torch_and_ray(module):
    assert loaded_by(f"import {module}")[1] == []


@pytest.mark.parametrize("module", ["pipelines.on_ray.arrivals", "pipelines.on_ray.datasets"])
def test_tokenize_workers_load_no_torch(module):
    assert loaded_by(f"import {module}")[1] == ["ray"]


def test_help_loads_no_heavy_modules():
    shown, loaded = loaded_by("from pipelines.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass")
    assert loaded == []
    assert "--learning-rate" in shown


def test_public_names():
    assert pipelines.__all__ == [
        "Scorer",
        "convert",
        "evaluate",
        "evaluate_scored",
        "quantize",
        "score",
        "train",
        "tune",
    ]
    for name in pipelines.__all__:
        assert callable(getattr(pipelines, name)), name
        assert "Example:" in getattr(pipelines, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'scorer'; it has: Scorer"):
        _ = pipelines.scorer


def test_drop_in_public_names():
    import pipelines.classification as drop_in

    assert {"ClassificationModel", "MultiLabelClassificationModel", "ClassificationArgs"} < set(drop_in.__all__)
