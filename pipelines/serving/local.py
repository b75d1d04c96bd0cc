"""Run a server in one process, without Ray: one model on one machine.

It starts in about the time that the model takes, and answers the same routes in the same way as on Ray Serve. Ray Serve
is for several replicas, autoscaling, several machines, and upgrades without a lost request.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import uvicorn

from pipelines.errors import SettingsError
from pipelines.serving.api import build_api
from pipelines.serving.auth import check_exposure
from pipelines.serving.connections import Connection
from pipelines.serving.job import ServeJob, check_job
from pipelines.serving.metrics import LocalSeries, ServerMetrics
from pipelines.serving.ports import own_port
from pipelines.serving.predictor import Predictor
from pipelines.serving.settings import ServeSettings

FOR_RAY = ("num_replicas", "target_queued_tokens", "upscale_delay_s", "downscale_delay_s", "proxy", "gpus_per_replica")
"""Settings that have a meaning only on Ray Serve."""
POLL_SECONDS = 0.02
logger = logging.getLogger(__name__)


def run_local(job: ServeJob) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests finish.

    Raises:
        UsageError: The model folder or a setting does not fit, or the port is in use. Nothing was started.
    """
    check_exposure(job.serve)
    usual = {field.name: field.default for field in fields(ServeSettings)}
    for name in FOR_RAY:
        if getattr(job.serve, name) != usual[name]:
            raise SettingsError(f"{name}={getattr(job.serve, name)} is for Ray Serve; leave it or --local out")
    check_job(job)
    with own_port(job.serve.host, job.serve.port), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(job))


class _Server(uvicorn.Server):
    """A server that only stops at a signal. uvicorn's own also sends itself the signal again, which kills it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM stop the server; the second one does not wait for running requests."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes uvloop's event loop if it is installed (it comes with Ray Serve, not on Windows)."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(job: ServeJob) -> None:
    predictor = await Predictor.open(
        job, lambda scorer: ServerMetrics(LocalSeries(), scorer.decision.labels, scorer.model.batch_tokens)
    )
    config = uvicorn.Config(
        build_api(predictor, is_alone=True),
        http=Connection,
        ws="none",
        host=job.serve.host,
        port=job.serve.port,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _Server(config)
    try:
        serving = asyncio.ensure_future(server.serve())
        while not (server.started or serving.done()):
            await asyncio.sleep(POLL_SECONDS)
        if server.started:
            where = f"http://{job.serve.host}:{_port_of(server, job.serve.port)}"
            logger.info("ready on %s (a page to try it, POST /v1/predict, docs at /docs)", where)
        await serving
        logger.info("stopped: running requests have finished")
    finally:
        await predictor.close()


def _port_of(server: uvicorn.Server, wanted: int) -> int:
    """Return the port, which the system has chosen if port 0 was wanted."""
    sockets: list[socket.socket] = [one for listener in server.servers for one in listener.sockets]
    return int(sockets[0].getsockname()[1]) if sockets else wanted
