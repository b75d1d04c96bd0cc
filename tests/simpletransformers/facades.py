"""Helpers that open facades on the golden models."""

import pandas as pd

from pipelines.classification import ClassificationModel, MultiLabelClassificationModel
from tests.simpletransformers.golden import freeze_simpletransformers as golden


def open_model(kind, path=None, weights=None, **case):
    facade = MultiLabelClassificationModel if kind == "multilabel" else ClassificationModel
    family = "roberta" if kind == "roberta" else "bert"
    arguments = golden.arguments(kind, case)
    return facade(family, str(path or golden.HERE / kind), num_labels=golden.NUM_LABELS[kind], args=arguments,
                  use_cuda=False, **(weights or {}))  # fmt: skip


def train_frame(kind, rows=24):
    return pd.DataFrame({"text": golden.read_texts()[:rows], "labels": golden.read_labels(kind)[:rows]})
