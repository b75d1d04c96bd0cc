"""Training of the facades in Ray Train workers: each opens the model from a folder that all of them reach."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoModelForSequenceClassification

from pipelines.arguments import BY_NAME, ClassificationArgs
from pipelines.checkpoints import STATE_FILE
from pipelines.corpus import LabelledDocuments
from pipelines.loop import TENSORS_FILE, TrainState
from pipelines.on_ray.train import run_workers
from pipelines.pretrained import quiet_transformers

Report = Callable[[str], None]


def fit_on_workers(
    facade: Mapping[str, Any],
    args: ClassificationArgs,
    save: Callable[[str], None],
    checkpoint: Path | None,
    splits: list[LabelledDocuments | None],
    output: str,
    metrics: Mapping[str, Any],
    report: Report,
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """How the run went, and the trained weights in float32.

    facade says how a worker opens the model that save writes: class, model_type and loss weights.
    """
    if not args.no_save:
        Path(output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=None if args.no_save else output, prefix=".workers-") as shared:
        save(f"{shared}/start")
        if checkpoint is not None:
            for name in (STATE_FILE, TENSORS_FILE):
                shutil.copy(checkpoint / name, f"{shared}/start")
        config = {
            **facade,
            "args": {**args.everything(), **_absolute_folders(args)},
            "folder": os.path.abspath(shared),
            "output": os.path.abspath(output),
            "metrics": dict(metrics),
        }
        state: TrainState = run_workers(_fit, config, splits, num_workers=args.num_workers, report=report)
        with quiet_transformers():
            trained = AutoModelForSequenceClassification.from_pretrained(
                f"{shared}/trained", use_safetensors=True, dtype=torch.float32
            )
        return state, trained.state_dict()


def _fit(config: Mapping[str, Any], train: LabelledDocuments, valid: LabelledDocuments | None) -> TrainState:
    """Runs in every worker; rank 0 leaves the trained model beside the one that all opened."""
    folder, relay = config["folder"], config["relay"]
    args = config["class"]._args_class(**{**config["args"], "overwrite_output_dir": True, "num_workers": 0})
    cuda = torch.cuda.is_available()
    device = torch.cuda.current_device() if cuda else -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of inert arguments, which the driver has said
        model = config["class"](
            config["model_type"], f"{folder}/start", args=args, use_cuda=cuda, cuda_device=device, **config["weights"]
        )
    state: TrainState = model.fit_documents(
        train, valid, config["output"], config["metrics"], lambda line: relay.say.remote(line)
    )
    if ray.train.get_context().get_world_rank() == 0:
        model.save_model(f"{folder}/trained")
    return state


def _absolute_folders(args: ClassificationArgs) -> dict[str, str]:
    """Arguments that name folders, as processes with another working folder find them."""
    given = {name: getattr(args, name) for name in ("best_model_dir", "tensorboard_dir")}
    return {name: os.path.abspath(path) for name, path in given.items() if path and path != BY_NAME[name].default}
