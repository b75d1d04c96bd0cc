"""The Ray Serve deployment: each replica holds a `Predictor` and the HTTP application in front of it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from pipelines.fields import parse_range
from pipelines.model.scorer import DocumentScores
from pipelines.on_ray.cluster import uses_gpus
from pipelines.on_ray.serve.autoscaling import BUSY, QUEUED, autoscaling_of
from pipelines.on_ray.serve.metrics import RaySeries
from pipelines.serving.api import build_api
from pipelines.serving.auth import check_exposure
from pipelines.serving.job import ServeJob, check_job
from pipelines.serving.metrics import ServerMetrics
from pipelines.serving.middleware import MOST_REQUESTS
from pipelines.serving.predictor import Predictor
from pipelines.text.tokenization import Documents


@serve.deployment(name="predictor")
@serve.ingress()
class PredictorReplica:
    """A replica of the server."""

    async def __init__(self, job: ServeJob) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._predictor = await Predictor.open(
            job, lambda scorer: ServerMetrics(RaySeries(), scorer.decision.labels, scorer.model.batch_tokens)
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the HTTP application of this replica. Ray Serve calls this once."""
        return build_api(self._predictor, replica=serve.get_replica_context().replica_id.unique_id)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Use other thresholds. Ray Serve calls this with `user_config` at the start and when it changes."""
        self._predictor.reconfigure(user_config)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metrics that the autoscaling policy reads."""
        queued_tokens, busy = self._predictor.load()
        return {QUEUED: queued_tokens, BUSY: busy}

    async def score_documents(self, documents: Documents) -> DocumentScores:
        """Score tokenized documents of a bulk job on the same cluster."""
        return await self._predictor.score_documents(documents)

    async def check_health(self) -> None:
        """Raise an error if the replica does not work. Ray Serve then replaces it."""
        if not self._predictor.is_alive:
            raise RuntimeError("the batcher stopped")


def build(args: dict[str, Any]) -> Application:
    """Build the application from the args in a Serve configuration file: `model`, and serve and compute settings."""
    job = ServeJob.parse(args)
    if job.serve.proxy == "haproxy":
        check_exposure(job.serve)
    return application(job)


def application(job: ServeJob) -> Application:
    """Build the Serve application of a job. Raises a UsageError if the job does not fit its model folder."""
    check_job(job)
    num_gpus = job.serve.gpus_per_replica
    if num_gpus is None:
        num_gpus = 1.0 if uses_gpus(job.compute.device) else 0.0
    autoscaling = autoscaling_of(job.serve)
    fewest, _ = parse_range("num_replicas", job.serve.num_replicas)
    app: Application = PredictorReplica.options(  # type: ignore[attr-defined]
        **({"num_replicas": fewest} if autoscaling is None else {"autoscaling_config": autoscaling}),
        user_config={"thresholds": job.serve.thresholds},
        logging_config=LoggingConfig(encoding="JSON"),
        max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        health_check_period_s=5,
    ).bind(job)
    return app
