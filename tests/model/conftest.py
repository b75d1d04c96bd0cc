import pytest

from pipelines.settings import DecisionSettings
from tests import tiny

DECISIONS = {
    "binary": DecisionSettings(kind="binary", labels=("ham", "spam")),
    "vote": DecisionSettings(kind="binary", labels=("ham", "spam"), merge="vote"),
    "multiclass": DecisionSettings(kind="multiclass", labels=("a", "b", "c"), merge="max"),
    "multilabel": DecisionSettings(kind="multilabel", labels=("a", "b", "c"), thresholds=(0.4, 0.5, 0.6)),
    "regression": DecisionSettings(kind="regression"),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory, emails):
    """One tiny model folder per kind, by name."""
    texts = emails["text"].to_pylist()[:40]
    made = {}
    for name, decision in DECISIONS.items():
        made[name] = tiny.model_folder(tmp_path_factory.mktemp(name), texts, decision)
    return made
