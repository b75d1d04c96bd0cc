"""A short run of the simulation. `make simulate SEEDS=0:100000` is a long one."""

import pytest

from tests.simulation.histories import broken_promise
from tests.simulation.planted import FAULTS, ROOT

GROUP = 50


@pytest.mark.parametrize("first", range(0, 300, GROUP))
def test_histories_keep_all_promises(first):
    for seed in range(first, first + GROUP):
        problem, _ = broken_promise(seed)
        if problem is not None:
            raise AssertionError(f"replay it: python -m tests.simulation --seeds {seed} --trace") from problem


def test_a_seed_replays_exactly():
    first, again = broken_promise(7, trace=True)[1], broken_promise(7, trace=True)[1]
    assert first
    assert [line.split("/")[0] for line in first] == [line.split("/")[0] for line in again]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fit_the_code(fault):
    file, old, new = FAULTS[fault]
    assert (ROOT / file).read_text().count(old) == 1
    assert old != new
