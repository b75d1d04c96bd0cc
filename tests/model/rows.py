"""Windows of different lengths, and the model families that support packing."""

import numpy as np

from pipelines.text.template import Template
from pipelines.text.tokenization import Tokens, cut_documents, offsets_of
from pipelines.text.windows import WindowPlan

PACKED = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "modernbert"]


TEMPLATE = Template((2,), (3,))


def ragged(lengths=(0, 1, 5, 30, 200, 31, 64)):
    lengths = np.array(lengths)
    ids = np.random.default_rng(1).integers(10, 600, lengths.sum()).astype(np.int32)
    return cut_documents(Tokens(ids, offsets_of(lengths)), WindowPlan(32, 30, 20), TEMPLATE)
