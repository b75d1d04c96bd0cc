"""Run a server until it receives a signal to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import nullcontext, suppress

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from pipelines.errors import JobError
from pipelines.on_ray.cluster import connected, root_cause
from pipelines.on_ray.nodes import check_nodes
from pipelines.on_ray.serve.app import application
from pipelines.on_ray.serve.proxy import check_proxy
from pipelines.serving.auth import check_exposure
from pipelines.serving.job import ServeJob, check_job
from pipelines.serving.ports import own_port
from pipelines.serving.settings import ServeSettings

APPLICATION = "pipelines"
logger = logging.getLogger(__name__)


def run_server(job: ServeJob, *, address: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests finish.

    Raises a UsageError before anything starts if the model folder or a setting does not fit.
    """
    check_exposure(job.serve)
    check_proxy(job.serve.proxy)
    check_job(job)
    stop = threading.Event()
    is_here = not (address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())
    with own_port(job.serve.host, job.serve.port) if is_here else nullcontext(), connected(address):
        check_nodes(model=job.model)
        is_deployed = False
        try:
            where = start_proxies(job.serve)
            if APPLICATION in serve.status().applications:
                logger.warning("this server replaces the one that runs on this cluster already")
            made = application(job)
            is_deployed = True
            serve.run(made, name=APPLICATION, route_prefix="/")
            for number in (signal.SIGINT, signal.SIGTERM):  # set after Ray has set its own handlers
                signal.signal(number, lambda *_: stop.set())
            logger.info("ready on %s (a page to try it, POST /v1/predict, docs at /docs)", where)
            stop.wait()
            logger.info("stopping: running requests finish first")
        except (ray.exceptions.RayError, RuntimeError) as error:
            why = (_why_replicas_failed() if is_deployed else "") or root_cause(error)
            raise JobError(f"the server cannot run on {job.serve.host}:{job.serve.port}: {why}") from error
        finally:
            if is_deployed:  # otherwise a server that was there before keeps running
                with suppress(RayServeException):  # if it never started
                    serve.delete(APPLICATION)


def _why_replicas_failed() -> str:
    """Return the error of a replica that did not start. Ray's own exception does not contain it."""
    with suppress(RayServeException, KeyError):
        for deployment in serve.status().applications[APPLICATION].deployments.values():
            return str(root_cause(RuntimeError(deployment.message)))
    return ""


def start_proxies(settings: ServeSettings) -> str:
    """Start Ray Serve, and return its address in words. If the cluster already has a Serve, that one is used."""
    if serve.status().proxies:
        return f"the address of the Serve that already runs on this cluster, not on {settings.host}:{settings.port}"
    serve.start(
        http_options={"host": settings.host, "port": settings.port},
        logging_config=LoggingConfig(encoding="JSON"),  # a request's id cannot imitate other fields of a line
    )
    return f"http://{settings.host}:{settings.port}"
