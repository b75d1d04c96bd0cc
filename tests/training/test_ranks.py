"""Gloo groups of 2 and 4 processes take the same steps as a single process.

These tests use no Ray. The processes are forked from one that has already imported torch and transformers.
"""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.jobs import free_port, train_job

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pipelines.training.job", "tests.training.test_ranks"])


def train_as_rank(rank, world_size, port, job, answers):
    """Runs in each process of the group. It tokenizes alone, then trains with the group."""
    import tempfile

    import torch
    import torch.distributed as dist

    from pipelines.progress import Progress, logging
    from pipelines.training.fit import fit
    from pipelines.training.job import check_job
    from pipelines.training.splits import tokenize_into_files

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    checked = check_job(job)
    for turn in range(world_size):  # in turns, because each rank writes the tokenizer
        if turn == rank:
            Path(job.paths.output).mkdir(exist_ok=True)
            splits = checked.splits()
        dist.barrier()
    with tempfile.TemporaryDirectory() as scratch:
        progress = Progress(logging.getLogger("pipelines"), "tokenized", total=1, unit="rows", is_shown=False)
        corpora = {name: tokenize_into_files(split, Path(scratch, name), progress) for name, split in splits.items()}
        dist.barrier()
        summary = fit(checked.spec, corpora["train"], corpora.get("valid"))
    answers.put((rank, summary))
    dist.destroy_process_group()


def train_in_group(job, world_size):
    """The summaries of all ranks, in rank order."""
    answers, port = CONTEXT.Queue(), free_port()
    arguments = [(rank, world_size, port, job, answers) for rank in range(world_size)]
    processes = [CONTEXT.Process(target=train_as_rank, args=some) for some in arguments]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(world_size)]


@pytest.fixture(scope="module")
def years(training_data, tmp_path_factory):
    """Regression data. The label is a year that depends on the length of the text."""
    folder = tmp_path_factory.mktemp("years")
    texts = pq.read_table(training_data / "data")["text"].to_pylist()
    labels = [1900.0 + len(text or "") / 10 for text in texts]
    for name, rows in {"train": slice(6, 46), "valid": slice(50, 52)}.items():
        pq.write_table(pa.table({"text": texts[rows], "label": labels[rows]}), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, emails):
    """A tiny random decoder."""
    folder = tmp_path_factory.mktemp("qwen3")
    tiny.save_decoder(folder, emails["text"].to_pylist()[:40])
    return folder


def cases(training_data, years, qwen3):
    """Settings by name. Each case uses features that depend on the number of ranks."""
    regression = {
        "kind": "regression", "weight": None, "epochs": 9, "window_weight": "document", "evaluate_steps": 3,
        "gradient_accumulation_steps": 2, "early_stopping_patience": 1, "learning_rate": 5e-3,
        "train": str(years / "train.parquet"), "valid": str(years / "valid.parquet"),
    }  # fmt: skip
    few = {**regression, "train": str(years / "valid.parquet"), "max_length": 128, "epochs": 1, "evaluate_steps": None}
    lora = {"lora_rank": 4, "model": str(qwen3), "weight": None}
    cases = {"weights": {"shuffle_buffer": 30}, "early stopping": regression, "fewer rows than ranks": few}
    return {**cases, "lora": lora}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "world_size"),
    [("weights", 2), ("weights", 4), ("early stopping", 2), ("fewer rows than ranks", 4), ("lora", 2), ("lora", 4)],
)
def test_ranks_match_single_process(training_data, years, qwen3, tmp_path, name, world_size):
    settings = cases(training_data, years, qwen3)[name]
    (alone,) = train_in_group(train_job(training_data, tmp_path / "alone", **settings), 1)
    ranks = train_in_group(train_job(training_data, tmp_path / "group", **settings), world_size)
    for summary in ranks:
        assert summary.workers == world_size
        assert len(summary.losses) == len(alone.losses)
        np.testing.assert_allclose(summary.losses[:15], alone.losses[:15], rtol=1e-3, atol=1e-5)
        assert summary.losses == ranks[0].losses, "all ranks report the same losses"
        assert summary.valid == ranks[0].valid
        assert summary.stopped_early == alone.stopped_early == (name == "early stopping")
        for one, other in zip(summary.evaluations, alone.evaluations, strict=True):
            defined = {key: value for key, value in other.items() if isinstance(value, float)}
            assert {key: one[key] for key in defined} == pytest.approx(defined, rel=2e-3)
    assert (ranks[0].documents, ranks[0].rows_in_error) == (alone.documents, alone.rows_in_error)
    assert (tmp_path / "group" / "pipeline.json").exists()
