"""Freeze what Simple Transformers 0.70.8 answers, in a virtual environment of its own:

    python3 -m venv st && st/bin/pip install torch==2.13.0 && st/bin/pip install simpletransformers==0.70.8
    st/bin/python tests/model/golden/freeze_simpletransformers.py

Makes tiny seeded models, has Simple Transformers save them here (`KIND/`, with its model_args.json), and writes its
predictions, raw outputs and metrics on 50 emails to answers.json. Every call runs in a process of its own: with its
multiprocessing on a second call hangs, and without it several labels crash.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

HERE = Path(__file__).parent
EMAILS = HERE.parent.parent.parent / "docs" / "demo" / "emails" / "test"
NUM_LABELS = {"binary": 2, "multiclass": 3, "regression": 1, "multilabel": 3, "roberta": 2}
ON = {"sliding_window": True}
CASES = {
    "binary": {
        "plain": {},
        "windows": ON,
        "int_stride": {**ON, "stride": 12},
        "tie_0": {**ON, "tie_value": 0},
    },
    "multiclass": {"plain": {}, "windows": ON, "tie_0": {**ON, "tie_value": 0}, "tie_2": {**ON, "tie_value": 2}},
    "regression": {"plain": {}, "windows": ON},
    "multilabel": {
        "plain": {},
        "zero": {"threshold": 0.0},
        "list": {"threshold": [0.3, 0.5, 0.7]},
    },
    "roberta": {"plain": {}, "windows": ON},
}
LOSSES = {
    "multiclass": {**ON, "train_batch_size": 8, "learning_rate": 1e-3},
    "multilabel": {"train_batch_size": 8, "learning_rate": 1e-3, "num_train_epochs": 2},
}
"""Runs whose first ten losses are kept; without dropout, so that nothing but the order of the samples is random."""
WEIGHTS = {"multiclass": {"weight": [0.5, 1.0, 2.0]}, "multilabel": {"pos_weight": [1.0, 2.0, 4.0]}}


def read_texts() -> list[str]:
    """50 emails, some shorter and some longer than a window."""
    import pandas as pd

    texts = pd.read_parquet(EMAILS)["text"].tolist()[:50]
    return [text[: 40 + 25 * number] for number, text in enumerate(texts)]


def read_labels(kind: str) -> list:
    """Labels that follow a fixed pattern, so that metrics have something to count."""
    if kind == "multilabel":
        return [[int(row % 2 == 0), int(row % 3 == 0), int(row % 5 == 0)] for row in range(50)]
    if kind == "regression":
        return [row / 10 for row in range(50)]
    return [row % NUM_LABELS[kind] for row in range(50)]


def arguments(kind: str, case: dict) -> dict:
    """Their arguments of one case."""
    workers = kind == "multilabel"
    return {
        "max_seq_length": 32,
        "use_multiprocessing": workers,
        "use_multiprocessing_for_evaluation": workers,
        "process_count": 1,
        "no_cache": True,
        "silent": True,
        "fp16": False,
        "regression": kind == "regression",
        **case,
    }


def open_model(kind: str, path: str, case: dict, **weights):
    """Their model of a kind."""
    from simpletransformers.classification import ClassificationModel, MultiLabelClassificationModel

    model = MultiLabelClassificationModel if kind == "multilabel" else ClassificationModel
    family = "roberta" if kind == "roberta" else "bert"
    return model(family, path, num_labels=NUM_LABELS[kind], args=arguments(kind, case), use_cuda=False, **weights)


def make_folder(kind: str) -> None:
    """A tiny random BERT under their own saving."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    base = Path(tempfile.mkdtemp())
    if kind == "roberta":
        save_byte_tokenizer(base)
    elif kind == "binary":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer.train_from_iterator(read_texts(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        tokenizer.save(str(base / "tokenizer.json"))
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    else:  # one tokenizer for all
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(HERE / "binary" / name, base / name)
    torch.manual_seed(NUM_LABELS[kind] + 10 * (kind == "multilabel"))
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    values = {"max_position_embeddings": 64, "num_labels": NUM_LABELS[kind], "initializer_range": 0.4, **size}
    if kind == "roberta":
        marks = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        module = RobertaForSequenceClassification(RobertaConfig(vocab_size=400, **marks, **values)).eval()
    else:
        module = BertForSequenceClassification(BertConfig(vocab_size=400, **values)).eval()
    with torch.no_grad():  # centre the logits, so that every label is predicted and some votes are tied
        rust = Tokenizer.from_file(str(base / "tokenizer.json"))
        rust.enable_truncation(32)
        logits = [module(torch.tensor([encoding.ids])).logits[0] for encoding in rust.encode_batch(read_texts())]
        head = module.classifier.out_proj if kind == "roberta" else module.classifier
        head.bias -= torch.stack(logits).mean(dim=0)
    module.save_pretrained(base)
    model = open_model(kind, str(base), {})
    model.save_model(str(HERE / kind), model=model.model)
    (HERE / kind / "training_args.bin").unlink()


def save_byte_tokenizer(base: Path) -> None:
    """RoBERTa's kind: byte-level, where a space before a word is part of its token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(read_texts(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(base / "tokenizer.json"))
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    config = {"tokenizer_class": "RobertaTokenizer", **{f"{name}_token": token for name, token in names.items()}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))


def answer(kind: str, case: dict) -> dict:
    """Their predictions and raw outputs of one case."""
    predictions, outputs = open_model(kind, str(HERE / kind), case).predict(read_texts())
    as_list = [plain(value) for value in predictions]
    return {"predictions": as_list, "outputs": [plain(value) for value in outputs]}


def plain(value):
    """An array as lists, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def losses(kind: str, case: dict) -> dict:
    """The order in which they drew samples, and the losses of their first ten steps."""
    import pandas as pd
    import torch

    frame = pd.DataFrame({"text": read_texts(), "labels": read_labels(kind)})
    model = open_model(kind, str(HERE / kind), {**case, **no_dropout()}, **WEIGHTS[kind])
    order, found = [], []
    draw, calculate = torch.utils.data.RandomSampler.__iter__, model._calculate_loss

    def drawn(sampler):
        for index in draw(sampler):
            order.append(index)
            yield index

    def calculated(*args, **kwargs):
        outputs = calculate(*args, **kwargs)
        found.append(outputs[0].item())
        return outputs

    torch.utils.data.RandomSampler.__iter__ = drawn
    model._calculate_loss = calculated
    torch.manual_seed(0)
    model.train_model(frame)
    return {"order": order, "losses": found[:10]}


def no_dropout() -> dict:
    """Arguments of a run that draws nothing but samples, and saves nothing."""
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {"config": config, "no_save": True, "overwrite_output_dir": True}


def metrics(kind: str) -> dict:
    """Their metrics without windows."""
    import pandas as pd

    frame = pd.DataFrame({"text": read_texts(), "labels": read_labels(kind)})
    result, _, wrong = open_model(kind, str(HERE / kind), {}).eval_model(frame)
    return {"result": {name: float(value) for name, value in result.items()}, "wrong": [item.guid for item in wrong]}


def main() -> None:
    """Without arguments, everything; with them, one step in this process."""
    logging.disable(logging.WARNING)
    if len(sys.argv) > 2:
        step, kind, case = sys.argv[1:4]
        if step == "make":
            make_folder(kind)
            return
        if step == "losses":
            done = losses(kind, json.loads(case))
        else:
            done = metrics(kind) if step == "metrics" else answer(kind, json.loads(case))
        print("ANSWER" + json.dumps(done))
        return
    file = HERE / "answers.json"
    kept = sys.argv[1:] == ["--new"]  # freeze only what is not there yet
    answers = json.loads(file.read_text()) if kept else {}
    for kind in LOSSES:
        if kept and "training" not in answers[kind]:
            answers[kind]["training"] = run("losses", kind, json.dumps(LOSSES[kind]))
    for kind, cases in CASES.items():
        if kept and kind in answers:
            continue
        shutil.rmtree(HERE / kind, ignore_errors=True)
        run("make", kind, "")
        answers[kind] = {name: run("answer", kind, json.dumps(case)) for name, case in cases.items()}
        answers[kind]["metrics"] = run("metrics", kind, "")
        if kind in LOSSES:
            answers[kind]["training"] = run("losses", kind, json.dumps(LOSSES[kind]))
    file.write_text(json.dumps(answers))


def run(*step: str) -> dict:
    """One step in a process of its own, in a folder that takes what it leaves behind."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, *step], capture_output=True, text=True, cwd=folder, timeout=180, check=False
        )
    if done.returncode:
        sys.exit(f"{step}: {done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    return json.loads(lines[-1].removeprefix("ANSWER")) if lines else {}


if __name__ == "__main__":
    main()
