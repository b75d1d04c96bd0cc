"""Helpers for short training runs on tiny models."""

import itertools
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest

from pipelines.decisions.labels import encode_labels
from pipelines.settings import ComputeSettings, DecisionSettings, WindowSettings
from pipelines.training.corpus import Corpus, LabelledDocuments, UnitLengths
from pipelines.training.fit import fit, prepare_folder
from pipelines.training.run import RunSpec
from pipelines.training.steps import Stepper
from pipelines.training_settings import TrainSettings
from tests import tiny

BINARY = DecisionSettings(kind="binary", labels=("ham", "spam"))


MULTICLASS = DecisionSettings(kind="multiclass", labels=("a", "b", "c"))


MULTILABEL = DecisionSettings(kind="multilabel", labels=("a", "b", "c"))


FLOAT32 = ComputeSettings(dtype="float32", device="cpu")


def make_job(tmp_path, emails, decision=BINARY, *, epochs=2, family="bert", compute=FLOAT32, **settings):
    """A run that starts from a random model, and its training and validation documents."""
    base = tmp_path / "base"
    if not base.exists():
        tiny.classifier(family, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        initializer_range=0.1).save_pretrained(base)  # fmt: skip
        tiny.save_tokenizer(base, emails["text"].to_pylist()[:40])
    train = TrainSettings(**{"epochs": epochs, "batch_size": 8, "learning_rate": 3e-3, "train_dtype": "float32",
                             **settings})  # fmt: skip
    job = RunSpec(str(base), str(tmp_path / "out"), WindowSettings(max_length=32), decision, train, compute)
    tokenizer = prepare_folder(job)

    def documents(start, stop):
        texts = [text[:400] for text in emails["text"].slice(start, stop - start).to_pylist()]
        table = pa.table({"text": texts, "label": emails["label"].slice(start, stop - start)})
        target = encode_labels(table.column("label"), BINARY)
        if decision.kind == "multilabel":
            target = np.stack([target, 1 - target, np.ones_like(target)], axis=1).astype(np.float32)
        elif decision.kind == "multiclass":
            target = target + 1
        elif decision.kind == "regression":
            target = target.astype(np.float32) * 3
        return LabelledDocuments(tokenizer.documents(table, "text"), target)

    return job, documents(0, 60), documents(60, 100)


def run(job, train, valid=None):
    return fit(job, Corpus.of(train), None if valid is None else Corpus.of(valid))


def in_units(data, ends):
    """A corpus of the same documents, split into units at `ends`."""
    pieces = [data.documents.take(np.arange(*span)) for span in itertools.pairwise([0, *ends, len(data.documents)])]
    lengths = [UnitLengths.of(piece) for piece in pieces]
    return Corpus(list(map(len, pieces)), data.targets, lengths.__getitem__, pieces.__getitem__, fingerprint="")


KINDS = {
    "binary": BINARY,
    "multiclass": MULTICLASS,
    "multilabel": MULTILABEL,
    "regression": DecisionSettings(kind="regression"),
}


@contextmanager
def stopped_at(step):
    """Training is interrupted before a step, as by Ctrl-C."""
    original = Stepper.__call__

    def stop(self, data, number):
        if number == step:
            raise KeyboardInterrupt
        return original(self, data, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
