"""Everything that is worth measuring on a GPU, in ten minutes. On a CPU, --small shows that it runs.

    python benchmarks/gpu.py                                   # a GPU with about 20 GB
    python benchmarks/gpu.py --small --skip bulk training      # two minutes on two CPU cores

One line of JSON each:

- matrix: the rate of one large product of matrices in bf16, which is the best that a forward pass can reach.
- forward: the shapes of BERT-base and ModernBERT-base with random weights, as `Scorer` runs them, and compiled by
  torch.compile (with the seconds that this takes). share is the share of the matrix rate; attention counts.
- fp8: the linear layers of these shapes in bf16, and in fp8 with weights scaled by row and activations scaled while it
  runs, compiled. A model cannot gain more than ratio_of_model: what is not a linear layer stays as it is.
- bulk, training: the end-to-end comparisons of benchmarks/bulk_vs_recipe.py and benchmarks/train_vs_trainers.py.
- tests: tests/gpu, with a training step over NCCL.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from forward import TEMPLATE, best_rate, make_windows
from random_model import WEIGHTS, make_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig

from pipelines.model.window_model import WindowModel
from pipelines.settings import ComputeSettings

HERE = Path(__file__).parent
FP8 = torch.float8_e4m3fn
SHAPES = {
    "bert-base": lambda size: BertConfig(num_labels=2, **size),
    "modernbert-base": lambda size: ModernBertConfig(num_labels=2, reference_compile=False, **size),
}
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}


def show(name, **values):
    """Print a line of JSON."""
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"measured": name, **rounded}), flush=True)


def seconds_of(run, device, repeats=10):
    """Return the least seconds of a call, after three calls that select kernels."""
    found = []
    for number in range(3 + repeats):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            found.append(time.perf_counter() - started)
    return min(found)


def matrix_rate(device, *, size):
    """Return the multiplications and additions per second of a square product in bf16."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, device)


def linear_layers(module):
    """Return the (inputs, outputs) of every linear layer of the body."""
    return [(one.in_features, one.out_features) for name, one in module.named_modules()
            if isinstance(one, nn.Linear) and "layers." in name.replace("layer.", "layers.")]  # fmt: skip


def forward(name, config, cut, device, options, matrix):
    """Measure the forward pass, and return the share of its operations that are in linear layers."""
    compute = ComputeSettings(device=device.type, dtype="bfloat16", engine="torch", batch_tokens=options.batch_tokens)
    num_tokens = int(cut.length_W.sum())
    for way in ("eager", "compiled"):
        module = AutoModelForSequenceClassification.from_config(config)
        model = WindowModel(module, TEMPLATE, compute)
        operations = sum(2 * num_tokens * inputs * outputs for inputs, outputs in linear_layers(module))
        linear = operations
        hidden, layers = config.hidden_size, config.num_hidden_layers
        operations += 4 * layers * hidden * float((cut.length_W.astype(float) ** 2).sum())
        started = time.perf_counter()
        if way == "compiled":
            model.module.compile(dynamic=True, backend="eager" if options.small else "inductor")
            model.logits(cut)
        taken = time.perf_counter() - started
        rate = best_rate(lambda model=model: model.logits(cut), num_tokens, device)
        show("forward", shape=name, way=way, packed=model.is_packed, compile_s=taken if way == "compiled" else 0.0,
             tokens_per_s=round(rate), share=operations / num_tokens * rate / matrix)  # fmt: skip
    return linear / operations


def scaled(rows):
    """Return rows in fp8 and the scale of each: the largest value of a row becomes the largest number of fp8."""
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(FP8).max
    return (rows.float() / scale).to(FP8), scale


def fp8(name, module, device, options, *, linear_share):
    """Measure the linear layers in bf16 and in fp8."""
    layers, tokens = linear_layers(module), 256 if options.small else options.batch_tokens
    seconds = {"bf16": 0.0, "fp8": 0.0}
    worst = 0.0
    for inputs, outputs in sorted(set(layers)):
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
        rows = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        weight8, weight_scale = scaled(weight)

        def product(rows, weight8=weight8, weight_scale=weight_scale):
            rows8, scale = scaled(rows)
            return torch._scaled_mm(rows8, weight8.t(), scale_a=scale, scale_b=weight_scale.t(),
                                    out_dtype=torch.bfloat16)  # fmt: skip

        run = product if options.small else torch.compile(product)
        exact = nn.functional.linear(rows, weight).float()
        worst = max(worst, ((run(rows).float() - exact).norm() / exact.norm()).item())
        count = layers.count((inputs, outputs))
        seconds["bf16"] += count * seconds_of(lambda: nn.functional.linear(rows, weight), device)  # noqa: B023
        seconds["fp8"] += count * seconds_of(lambda: run(rows), device)  # noqa: B023
    ratio = seconds["bf16"] / seconds["fp8"]
    show("fp8", shape=name, tokens=tokens, ratio_of_linear_layers=ratio, error=worst,
         ratio_of_model=1 / (1 - linear_share + linear_share / ratio))  # fmt: skip


def command(name, *arguments):
    """Run another script, and print its lines, or why it failed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else done.stderr.strip().splitlines()[-5:]
    for line in lines:
        print(json.dumps({"measured": name, "line": line}), flush=True)


def main():
    """Print one line of JSON per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--skip", nargs="*", default=[], choices=["forward", "fp8", "bulk", "training", "tests"])
    parser.add_argument("--batch-tokens", type=int, default=65536)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = matrix_rate(device, size=512 if options.small else 8192)
    show("matrix", device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu", torch=torch.__version__,
         tflops=matrix / 1e12)  # fmt: skip
    cut = make_windows(64 if options.small else 4096)
    for name, config_of in SHAPES.items():
        config = config_of(SMALL if options.small else {})
        share = 0.8
        if "forward" not in options.skip:
            share = forward(name, config, cut, device, options, matrix)
        if "fp8" not in options.skip:
            module = AutoModelForSequenceClassification.from_config(config)
            fp8(name, module, device, options, linear_share=share)
    where = "cuda" if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        if "bulk" not in options.skip:
            make_model(Path(scratch, "base"))
            command("bulk", HERE / "bulk_vs_recipe.py", f"{scratch}/base", "--gpus", "--recipe-actors", 1,
                    "--repeat", 16, "--unit-bytes", 500_000)  # fmt: skip
        if "training" not in options.skip:
            command("training", HERE / "train_vs_trainers.py", WEIGHTS, sys.executable, "--skip", "simpletransformers",
                    "--batch-size", 32, "--device", where)  # fmt: skip
    if "tests" not in options.skip:
        command("tests", "-m", "pytest", "-q", HERE.parent / "tests" / "gpu")


if __name__ == "__main__":
    main()
