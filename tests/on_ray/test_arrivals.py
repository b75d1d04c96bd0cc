"""Corpora tokenized by Ray Data. They equal local corpora and can be used before all units have arrived."""

import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipelines.errors import JobError
from pipelines.on_ray.arrivals import arriving_corpora
from pipelines.on_ray.telemetry import waits_logged
from pipelines.progress import Progress, logging
from pipelines.text.stage import TokenizeStage
from pipelines.training.job import opened_run
from pipelines.training.splits import tokenize_into_files
from tests.jobs import train_job

pytestmark = pytest.mark.usefixtures("local_ray")


def splits_of(training_data, output, **settings):
    with opened_run(train_job(training_data, output, shuffle_buffer=30, **settings)) as checked:
        return checked.splits()


def ids_of(corpus):
    return [corpus.load(unit).documents.tokens.ids.tolist() for unit in range(corpus.num_units)]


@pytest.mark.parametrize("is_pair", [False, True])
def test_ray_data_corpus_matches_local_corpus(training_data, tmp_path, emails, is_pair):
    settings = {}
    if is_pair:
        texts = [text[:200] for text in emails["text"].to_pylist()[:24]]
        table = pa.table({"text": ["is it spam?"] * 24, "mail": texts, "label": emails["label"].slice(0, 24)})
        pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=8)
        settings = {"train": str(tmp_path / "pairs.parquet"), "valid": None, "text_pair_column": "mail"}
    splits = splits_of(training_data, tmp_path / "out", **settings)
    progress = Progress(logging.getLogger("pipelines"), "tokenized", total=1, unit="rows", is_shown=False)
    here = {name: tokenize_into_files(split, tmp_path / name, progress) for name, split in splits.items()}
    with arriving_corpora(splits, num_cpus=None) as (corpora, done):
        assert corpora.keys() == here.keys()
        for name, corpus in corpora.items():
            assert ids_of(corpus) == ids_of(here[name])
            assert corpus.fingerprint == here[name].fingerprint
            assert corpus.has_pairs == is_pair
            assert (len(corpus), corpus.num_errors) == (len(here[name]), here[name].num_errors)
            np.testing.assert_array_equal(corpus.targets, here[name].targets)
        done.result(timeout=60)


class Late(TokenizeStage):
    """Makes all units except the first few wait for a file."""

    def __call__(self, units, attempts=None):
        from pathlib import Path

        gate = Path(self.tokenizer_folder)
        for unit, table in zip(units, super().__call__(units, attempts), strict=True):
            if len(list(gate.glob("begun-*"))) > 5:
                while not (gate / "open").exists():
                    time.sleep(0.05)
                if (gate / "bad").exists():
                    raise ValueError("this unit is bad")
            (gate / f"begun-{len(self.text_columns)}-{unit.number}").touch()
            yield table


def late(split):
    stage = split.stage
    made = Late(stage.location, stage.text_columns, stage.schema, stage.tokenizer_folder)
    return replace(split, stage=made)


@pytest.mark.parametrize("is_bad", [False, True])
def test_first_units_usable_before_all_arrive(training_data, tmp_path, is_bad):
    output = tmp_path / "out"
    split = late(splits_of(training_data, output)["train"])
    # One CPU for tokenizing: with all of them, the tasks that wait for the file would leave none to measure units.
    with arriving_corpora({"train": split}, num_cpus=1) as (corpora, done):
        corpus = corpora["train"]
        assert len(corpus.load(split.order[0]).documents)
        assert not done.done()
        if is_bad:
            (output / "bad").touch()
        (output / "open").touch()
        if is_bad:
            with pytest.raises(JobError, match=r"^tokenizing failed: .*this unit is bad$"):
                len(corpus)
            with pytest.raises(JobError, match="this unit is bad"):
                done.result(timeout=60)
        else:
            assert len(corpus) == 59
            done.result(timeout=60)


@ray.remote(num_cpus=0)
class Holder:
    def ready(self):
        return True


def test_waiting_for_busy_cluster_is_logged(local_ray, training_data, tmp_path, monkeypatch, log_lines):
    monkeypatch.setattr("pipelines.on_ray.telemetry.WAIT_SECONDS", 0.3)
    monkeypatch.setattr("pipelines.on_ray.arrivals.WAIT_SECONDS", 0.3)
    cpus = local_ray.cluster_resources()["CPU"]
    holder = Holder.options(num_cpus=cpus).remote()
    local_ray.get(holder.ready.remote())
    with waits_logged({"CPU": cpus + 1}):
        wait_for(log_lines, f"still waiting for {cpus + 1:g} CPU, of which the cluster has {cpus:g} and 0 free")
    with arriving_corpora(splits_of(training_data, tmp_path / "out"), num_cpus=None) as (corpora, _):
        wait_for(log_lines, f"no unit is tokenized yet; the cluster has {cpus:g} CPU, of which 0 are free")
        local_ray.kill(holder)
        found = []
        thread = threading.Thread(target=lambda: found.append(len(corpora["train"])), daemon=True)
        thread.start()
        thread.join(60)
        assert found == [59]


def wait_for(lines, text):
    deadline = time.monotonic() + 60
    while not any(text in line for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
