"""Draw the panels of a Grafana dashboard from the answers of a Prometheus: a look at the queries without Grafana.

    pipelines serve runs/demo/model --local --port 8741
    prometheus --config.file prometheus.yml     # scrapes 127.0.0.1:8741; see docs/how-to/monitoring.md
    python benchmarks/draw_dashboard.py infra/grafana/serve.json dashboard.png --minutes 10

Prints the panels whose query found nothing.
"""

import argparse
import json
import time
from datetime import datetime
from pathlib import Path

import httpx
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt


def series(prometheus, expression, minutes):
    """The series that a query gives for the last minutes."""
    now = time.time()
    window = {"query": expression, "start": now - 60 * minutes, "end": now, "step": max(1, minutes)}
    answer = httpx.get(f"{prometheus}/api/v1/query_range", params=window, timeout=30).json()
    if answer["status"] != "success":
        raise SystemExit(f"{expression}: {answer['error']}")
    return answer["data"]["result"]


def name_of(template, labels):
    """The legend of a series."""
    for key, value in labels.items():
        template = template.replace("{{" + key + "}}", value)
    return template


def main():
    """Draw the dashboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dashboard", type=Path)
    parser.add_argument("output")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    panels = json.loads(options.dashboard.read_text())["panels"]
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(15, 3.2 * rows), squeeze=False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        axis.set_title(panel["title"], fontsize=10)
        is_empty = True
        for target in panel["targets"]:
            for one in series(options.prometheus, target["expr"], options.minutes):
                times = [datetime.fromtimestamp(moment) for moment, _ in one["values"]]
                axis.plot(times, [float(value) for _, value in one["values"]],
                          label=name_of(target["legendFormat"], one["metric"]))  # fmt: skip
                is_empty = False
        if is_empty:
            print("nothing found:", panel["title"])
        else:
            axis.legend(fontsize=7, loc="upper left")
        axis.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M"))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
