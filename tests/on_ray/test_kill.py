"""A job whose processes are killed at random is restarted until it finishes. Its output equals an undisturbed run.

The environment variables KILLS and SEED set the number of kills and the random seed. `make soak` uses 100 kills.
"""

import json
import os
import random
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest

from tests.jobs import read_scored, start_command, write_shards

pytestmark = pytest.mark.ray
KILLS, SEED = int(os.environ.get("KILLS", "3")), int(os.environ.get("SEED", "0"))
MOST_RUNS = 10 * KILLS + 10
OTHERS = {
    "IDLE",
    "DashboardAgent",
    "RuntimeEnvAgent",
    "_StatsActor",
    "_AutoscalingCoordinatorActor",
    "ActorLocationTracker",
}
"""Ray processes that do not run the job."""


@pytest.fixture
def source(tmp_path, emails):
    return write_shards(tmp_path / "in", emails, shards=4, row_group_size=30)


def start(folder, source, output):
    return start_command("score", folder, "--input", source, "--output", output, "--json",
                         "--replicas", 1, "--set", "dtype=float32",
                         "--set", "unit_bytes=8000", "--set", "num_threads=1")  # fmt: skip


def kill_something(process, rng, wait):
    """SIGKILL the driver or one of its workers after `wait` seconds. Return the name of the victim."""
    time.sleep(wait)
    if process.poll() is not None:
        return None
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [
        child
        for child in family
        if (title := title_of(child)).startswith("ray::") and not OTHERS & set(title.split("::"))
    ]
    victim = psutil.Process(process.pid) if not workers or rng.random() < 0.5 else rng.choice(workers)
    title = title_of(victim)
    victim.kill()
    if victim.pid == process.pid:  # Ray's processes exit with their driver
        process.wait()
        psutil.wait_procs(family, timeout=30)
        for left in family:
            if left.is_running():
                left.kill()
        return "driver"
    return title


def title_of(process):
    try:
        return " ".join(process.cmdline()).strip()  # Ray pads the titles that it sets
    except psutil.Error:
        return ""


@pytest.mark.slow
@pytest.mark.timeout(max(600, 120 * KILLS))
def test_randomly_killed_job_matches_undisturbed(spam_folder, source, tmp_path):
    rng = random.Random(SEED)
    started = time.monotonic()
    undisturbed = start(spam_folder.path, source, tmp_path / "whole")
    out, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, err
    took = time.monotonic() - started
    hit, done, runs = [], None, 0
    while done is None:
        runs += 1
        assert runs < MOST_RUNS, hit
        process = start(spam_folder.path, source, tmp_path / "killed")
        victim = kill_something(process, rng, rng.uniform(0.4, 1.0) * took) if len(hit) < KILLS else None
        hit += [victim] if victim else []
        if victim != "driver":
            out, err = process.communicate(timeout=300)
            if process.returncode == 0:
                assert out.startswith("{"), out[:2000]
                done = json.loads(out)
            else:
                assert "Traceback" not in err, err[-3000:]
        if done and len(hit) < KILLS:  # finished before enough kills: delete some output and run again
            done = None
            for path in (tmp_path / "killed").iterdir():
                if rng.random() < 0.7:
                    path.unlink() if not path.name.startswith(("_manifest", "_inputs")) else None
    whole, killed = read_scored(tmp_path / "whole"), read_scored(tmp_path / "killed")
    assert killed.drop_columns(["scores", "score"]).equals(whole.drop_columns(["scores", "score"]))
    for left, right in zip(killed["scores"].to_pylist(), whole["scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    first = json.loads((tmp_path / "whole" / "_summary.json").read_text())
    for name in ("rows_in", "rows_out", "rows_in_error", "units", "tokens", "windows", "histograms"):
        assert done[name] == first[name], name
    assert not list((tmp_path / "killed").glob(".part-*"))
    print(f"{len(hit)} kills in {runs} runs: {dict(Counter(hit).most_common())}", file=sys.stderr)
