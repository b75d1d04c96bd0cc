"""Fine-tuning in Ray Train workers, fed by Ray Data.

Ray Data reads and tokenizes the files in parallel, once. The token ids stay in Ray's object store, which spills to
disk if memory is full. Every worker runs the same loop as a single process, on its share of each step.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import JobError, PipelinesError
from pipelines.on_ray.arrivals import arriving_corpora
from pipelines.on_ray.cluster import check_resources, connected, root_cause, uses_gpus
from pipelines.on_ray.datasets import TOKENIZE_CPUS
from pipelines.on_ray.nodes import check_nodes
from pipelines.on_ray.telemetry import Gauges, LogRelay, interruptions, relay_logs, relayed_logs, waits_logged
from pipelines.storage.locations import shown
from pipelines.training.corpus import Corpus
from pipelines.training.fit import fit
from pipelines.training.job import (
    ENDS,
    CheckedTrainJob,
    TrainJob,
    end_handlers,
    opened_run,
    restore_handlers,
    say_interrupted,
    train_here,
)
from pipelines.training.ranks import rank, world_size
from pipelines.training.run import RunSpec, TrainSummary

RELAY_SECONDS = 5.0
"""How long Ctrl-C waits for the actor that tells the workers."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerTask:
    """The task of every worker: function(argument, *data)."""

    function: Callable[..., Any]
    argument: Any
    data: Sequence[Any]
    """References in Ray's object store."""
    can_end_early: bool = False
    """Whether the function also takes is_interrupted, and then raises KeyboardInterrupt on every rank."""


@dataclass(frozen=True)
class WorkerGroup:
    """Number, device and failure handling of the workers."""

    fewest: int
    most: int
    device: str = "auto"
    max_failures: int = 0
    """How often lost workers are replaced. The task then begins again on all workers."""
    resize_seconds: float = 60.0


def train(job: TrainJob, *, address: str | None = None) -> TrainSummary:
    """Fine-tune on labelled files and write the model folder: on Ray, or in this process if num_workers is 0.

    Args:
        job: The job.
        address: Ray cluster to use. Default: RAY_ADDRESS, else a local Ray is started.

    Raises:
        UsageError: Data, labels, weights, windows, model or output do not fit. No work was done.
        JobError: The run was stopped. The same job resumes it.
    """
    if job.is_local:
        return train_here(job)
    with opened_run(job) as checked, connected(address):
        files = {"input": checked.first_file}
        if Path(checked.pretrained.base).is_dir():
            files["pretrained weights"] = str(Path(checked.pretrained.base, "config.json"))
        splits = checked.splits()
        check_nodes(files=files, output=checked.spec.output)
        return _fit_on_workers(checked, splits)


def run_on_workers(function: Callable[..., Any], argument: Any, data: Sequence[Any], *, num_workers: int) -> Any:
    """Run function(argument, *data) on workers of RAY_ADDRESS or a local Ray. Return the result of rank 0."""
    with connected():
        task = WorkerTask(function, argument, [ray.put(one) for one in data])
        return _run(task, WorkerGroup(num_workers, num_workers))


def _fit_on_workers(checked: CheckedTrainJob, splits: Any) -> TrainSummary:
    """Train while Ray Data tokenizes, or after it if the cluster has too few CPUs for both."""
    spec, paths = checked.spec, checked.job.paths
    fewest, most = paths.worker_range
    group = WorkerGroup(fewest, most, spec.compute.device, spec.train.max_failures, paths.resize_seconds)
    has_room, num_cpus = _room_beside(group)
    with arriving_corpora(splits, num_cpus=num_cpus) as (corpora, all_arrived):
        if not has_room:
            all_arrived.result()
        data = [ray.put(corpora.get(name)) for name in ("train", "valid")]
        summary: TrainSummary = _run(WorkerTask(_fit, spec, data, can_end_early=True), group)
    return summary


def _fit(spec: RunSpec, train: Corpus, valid: Corpus | None, *, is_interrupted: Callable[[], bool]) -> TrainSummary:
    """Runs in every worker."""
    if rank() == 0:
        logger.info("training on %d workers", world_size())
    gauges = Gauges("train", {"model": shown(spec.output)})
    return fit(spec, train, valid, is_preempted=_is_preempted, is_interrupted=is_interrupted, on_metrics=gauges)


def _is_preempted() -> bool:
    return ray.train.get_preemption_info() is not None


def _room_beside(group: WorkerGroup) -> tuple[bool, float | None]:
    """Return whether the cluster has room for workers and tokenizing together, and a CPU limit for tokenizing."""
    total = ray.cluster_resources()
    if uses_gpus(group.device):  # workers on GPUs reserve no CPUs
        return total.get("GPU", 0) >= group.fewest, None
    left = total.get("CPU", 0) - group.most
    return left >= TOKENIZE_CPUS, left if left >= TOKENIZE_CPUS else None


def _run(task: WorkerTask, group: WorkerGroup) -> Any:
    """Run the task, and return the result of rank 0. If workers are lost, they are replaced and all begin again.

    Raises:
        JobError: The workers failed.
        KeyboardInterrupt: The task was interrupted, and ended early or was aborted.
    """
    gpus = uses_gpus(group.device)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    relay = LogRelay.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    workers = str(group.fewest) if group.fewest == group.most else f"{group.fewest} to {group.most}"
    logger.info("%s workers on %s", workers, "GPUs" if gpus else "CPUs")
    needed = {"GPU" if gpus else "CPU": float(group.fewest)}
    with (
        tempfile.TemporaryDirectory(prefix="pipelines-train-") as storage,
        relayed_logs(relay),
        _kept_signals(),
    ):
        check_resources(needed)
        try:
            trainer = _Trainer(
                relay if task.can_end_early else None,
                _worker,  # Ray keeps its result, although Ray's annotation says that it has none
                train_loop_config={"task": task, "relay": relay},
                scaling_config=ScalingConfig(
                    num_workers=group.fewest if group.fewest == group.most else (group.fewest, group.most),  # type: ignore[arg-type]  # as V2 takes it
                    use_gpu=gpus,
                    elastic_resize_monitor_interval_s=group.resize_seconds,  # type: ignore[call-arg]
                ),
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                run_config=RunConfig(
                    name="train", storage_path=storage, failure_config=FailureConfig(max_failures=group.max_failures)
                ),
            )
            with waits_logged(needed):
                result = trainer.fit()
        except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
            if trainer.is_interrupted:
                logger.warning("the workers ended with: %s", root_cause(error))
                raise KeyboardInterrupt from error
            raise JobError(f"training failed: {root_cause(error)}") from error
    answer = result.return_value  # type: ignore[attr-defined]
    if isinstance(answer, (PipelinesError, KeyboardInterrupt)):
        raise answer
    return answer


class _Trainer(TorchTrainer):
    """A trainer whose workers may end the run with a checkpoint after Ctrl-C. Ray's own trainer aborts them."""

    def __init__(self, relay: Any, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_interrupted = False
        self._relay = relay

    def _register_sigint_handler(self, controller: Any) -> None:
        """Note the first signal to end if the workers run, and leave the next one to Ray. Ray calls this method."""
        before = end_handlers()
        super()._register_sigint_handler(controller)  # type: ignore[misc]
        abort: Any = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: FrameType | None) -> None:
            restore_handlers(dict.fromkeys(before, abort))
            self.is_interrupted = True
            if self._workers_end_it():
                say_interrupted(number)
            else:
                abort(number, frame)

        restore_handlers(dict.fromkeys(before, note))

    def _workers_end_it(self) -> bool:
        """Tell the workers to end the run with a checkpoint. Return whether they will."""
        if self._relay is None:
            return False
        with suppress(ray.exceptions.RayError):
            return bool(ray.get(self._relay.interrupt.remote(), timeout=RELAY_SECONDS))
        return False


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Restore the handlers of signals after the context. Ray does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in ENDS if (handler := signal.getsignal(number)) is not None}
    try:
        yield
    finally:
        restore_handlers(before)


def _worker(loop_config: dict[str, Any]) -> Any:
    """Run the task in a Ray Train worker, whose process group exists. Ray Train keeps the result of rank 0."""
    task: WorkerTask = loop_config["task"]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()))
    relay, options = loop_config["relay"], {}
    if rank() == 0:
        relay_logs(relay)
    asks = interruptions(relay) if rank() == 0 and task.can_end_early else nullcontext(lambda: False)
    try:
        with asks as is_interrupted:
            if task.can_end_early:
                options["is_interrupted"] = is_interrupted
            return task.function(task.argument, *map(ray.get, task.data), **options)
    except (PipelinesError, KeyboardInterrupt) as error:  # returned, not raised: another attempt would end likewise
        return error
