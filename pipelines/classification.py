"""The import path of Simple Transformers' classification models; the code is in `pipelines.simpletransformers`."""

from pipelines.simpletransformers.arguments import ClassificationArgs, MultiLabelClassificationArgs
from pipelines.simpletransformers.models import ClassificationModel, MultiLabelClassificationModel
from pipelines.simpletransformers.outputs import InputExample

__all__ = [
    "ClassificationArgs",
    "ClassificationModel",
    "InputExample",
    "MultiLabelClassificationArgs",
    "MultiLabelClassificationModel",
]
