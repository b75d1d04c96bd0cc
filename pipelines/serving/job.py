"""A serving job: a model folder and the server's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.decisions.early_exit import margin_of
from pipelines.decisions.labels import resolve_thresholds
from pipelines.fields import parse
from pipelines.model.loading import check_engine
from pipelines.model_files import model_location
from pipelines.model_folder import read_model_folder
from pipelines.serving.settings import ServePaths, ServeSettings
from pipelines.settings import ComputeSettings


@dataclass(frozen=True)
class ServeJob:
    """One server of one model folder."""

    model: str
    serve: ServeSettings = field(default_factory=ServeSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> ServeJob:
        """Create a job from a flat mapping of settings, as YAML, Serve's configuration or the command line has it."""
        paths, serve_settings, compute = parse(values, ServePaths, ServeSettings, ComputeSettings)
        return cls(model_location(paths.model), serve_settings, compute)


def check_job(job: ServeJob) -> None:
    """Raise a UsageError if the model folder cannot be opened, or thresholds or early exit do not fit it."""
    folder = read_model_folder(job.model)
    folder.say_int8()
    check_engine(folder, job.compute)
    margin_of(folder, resolve_thresholds(job.serve.thresholds, folder.decision), job.serve.early_exit)
