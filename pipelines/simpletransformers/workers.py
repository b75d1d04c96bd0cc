"""Training of a facade in Ray Train workers. Each worker opens the model from a folder that all of them can read."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from pipelines.model.weights import load_module
from pipelines.on_ray.train import run_on_workers
from pipelines.simpletransformers.arguments import BY_NAME, ClassificationArgs, MultiLabelClassificationArgs
from pipelines.simpletransformers.engine import Engine, ModelSource
from pipelines.simpletransformers.loading import device_of
from pipelines.simpletransformers.saving import replace_files
from pipelines.simpletransformers.training import FacadeRun, fit_documents
from pipelines.training.checkpoints import STATE_FILE
from pipelines.training.corpus import LabelledDocuments
from pipelines.training.loop import TENSORS_FILE
from pipelines.training.state import TrainState


@dataclass(frozen=True)
class _WorkerJob:
    """The model and the run of a worker."""

    folder: str
    """Shared folder: the model is in `start`, and rank 0 writes the trained model to `trained`."""
    model_type: str
    is_multilabel: bool
    args: Mapping[str, Any]
    run: FacadeRun


def fit_on_workers(engine: Engine, run: FacadeRun) -> TrainState:
    """Train in args.num_workers workers, and load the trained weights into the engine's model."""
    args = engine.args
    if not args.no_save:
        Path(run.output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=None if args.no_save else run.output, prefix=".workers-") as shared:
        start = Path(shared, "start")
        replace_files(start, engine.write)
        if run.checkpoint is not None:
            for name in (STATE_FILE, TENSORS_FILE):
                shutil.copy(run.checkpoint / name, start)
        job = _WorkerJob(
            os.path.abspath(shared),
            engine.model_type,
            engine.is_multilabel,
            {**_of_workers(args), **_absolute_folders(args), "overwrite_output_dir": True, "num_workers": 0},
            replace(run, output=os.path.abspath(run.output), checkpoint=None).without_data(),
        )
        state: TrainState = run_on_workers(_fit, job, [run.train, run.valid], num_workers=args.num_workers)
        trained, found = load_module(f"{shared}/trained", engine.config)
        found.check_all("what the workers have trained")
        engine.model.module.load_state_dict(trained.state_dict())
    if not args.no_save:
        replace_files(Path(run.output), engine.write)
    return state


def _fit(job: _WorkerJob, train: LabelledDocuments, valid: LabelledDocuments | None) -> TrainState:
    """Open the model and train it in a worker. Rank 0 writes the trained model to the shared folder."""
    has_gpu = torch.cuda.is_available()
    device = device_of(has_gpu, torch.cuda.current_device() if has_gpu else -1)
    start = Path(job.folder, "start")
    args_class = MultiLabelClassificationArgs if job.is_multilabel else ClassificationArgs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about inert arguments: the driver has already warned
        args = args_class(**job.args)
        engine = Engine(args, ModelSource(job.model_type, str(start), is_multilabel=job.is_multilabel), device=device)
    checkpoint = start if (start / STATE_FILE).is_file() else None
    state = fit_documents(engine, replace(job.run, train=train, valid=valid, checkpoint=checkpoint))
    if ray.train.get_context().get_world_rank() == 0:
        replace_files(Path(job.folder, "trained"), engine.write)
    return state


def _of_workers(args: ClassificationArgs) -> dict[str, Any]:
    """Return the arguments of the workers. The tokenizer in their folder lowercases already if it should."""
    return {name: value for name, value in args.everything().items() if name != "do_lower_case"}


def _absolute_folders(args: ClassificationArgs) -> dict[str, str]:
    """Return the arguments that name folders, as absolute paths, because workers have another working folder."""
    given = {name: getattr(args, name) for name in ("best_model_dir", "tensorboard_dir")}
    return {name: os.path.abspath(path) for name, path in given.items() if path and path != BY_NAME[name].default}
