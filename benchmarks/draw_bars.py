"""Draw bars from the lines of JSON that a benchmark has printed.

python benchmarks/serve_vs_servers.py MODEL ... > serve.jsonl
python benchmarks/draw_bars.py serve.jsonl bars.png --name server --value per_s --where tokens=66 --where clients=32
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main():
    """Draw a bar for each line that fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("output")
    parser.add_argument("--name", required=True, help="what names a bar")
    parser.add_argument("--value", required=True, help="its length")
    parser.add_argument("--where", action="append", default=[], metavar="NAME=VALUE", help="which lines")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.lines.read_text().splitlines() if line.startswith("{")]
    for condition in options.where:
        name, _, value = condition.partition("=")
        rows = [row for row in rows if str(row.get(name)) == value]
    rows = [row for row in rows if options.name in row and options.value in row]
    names, values = [str(row[options.name]) for row in rows], [row[options.value] for row in rows]
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2))
    bars = axis.barh(names[::-1], values[::-1], color="#2563eb")
    axis.bar_label(bars, padding=3)
    axis.set_xlabel(options.value)
    axis.set_title(options.title or f"{options.value} by {options.name}", fontsize=10)
    axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(options.output, dpi=90)


if __name__ == "__main__":
    main()
