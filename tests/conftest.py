"""Fixtures for every room. Nothing here reaches a network; HF hubs are switched off before anything is imported."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread only waits
os.environ["MKL_CBWR"] = "AUTO,STRICT"  # or products differ in their last bits by where in memory their factors lie
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import hypothesis
import pyarrow.parquet as pq
import pytest

hypothesis.settings.register_profile("shared-machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("shared-machine")

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails"


@pytest.fixture(scope="session")
def emails():
    """The demo's test emails: id, text, label."""
    return pq.read_table(EMAILS / "test")
