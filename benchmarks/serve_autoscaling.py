"""Plot the replicas, the queue and the latency of a server while its load rises and falls.

    python benchmarks/serve_autoscaling.py MODEL [--most 2] [--low 10] [--high 60] [--output autoscaling.png]

Texts of 66 tokens arrive at random times (open loop, Poisson). The rate stays low for 30 seconds, rises for 30, stays
high for 90, falls for 30 and stays low for 60. The number of replicas is the number of their processes. The queue
length comes from the server's own /metrics, which is some seconds behind. The percentiles are over the answers of the
last ten seconds.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import aiohttp
import matplotlib
import numpy as np
import psutil
from serve_vs_servers import bodies_of, wait_for

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PHASES = [(0, 0.0), (30, 0.0), (60, 1.0), (150, 1.0), (180, 0.0), (240, 0.0)]
"""Pairs of a second and a rate at this second, where 0 is the low rate and 1 is the high rate."""


def replicas(process):
    """Return the number of replicas among the descendants of a process."""
    members = psutil.Process(process.pid).children(recursive=True)
    titles = []
    for member in members:
        try:
            titles.append(" ".join(member.cmdline()))
        except psutil.Error:
            continue
    return sum("ServeReplica" in title for title in titles)


async def follow(url, process, low, high):
    """Return rows of (second, rate, replicas, queued tokens), and (second, milliseconds, status) of every request."""
    random, rows, answers = np.random.default_rng(0), [], []
    texts, began = itertools.cycle(bodies_of("ours", 66)), time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        def now():
            return time.perf_counter() - began

        def rate():
            return low + (high - low) * float(np.interp(now(), *zip(*PHASES, strict=True)))

        async def one():
            sent = now()
            try:
                async with session.post(url, data=next(texts), headers={"content-type": "application/json"}) as answer:
                    await answer.read()
                    answers.append((sent, 1000 * (now() - sent), answer.status))
            except aiohttp.ClientError:
                answers.append((sent, 1000 * (now() - sent), 0))

        async def watch():
            while now() < PHASES[-1][0]:
                async with session.get(url.replace("/v1/predict", "/metrics")) as answer:
                    text = await answer.text()
                queued = sum(map(float, re.findall(r"^ray_pipelines_queued_tokens{.*} (\S+)$", text, re.MULTILINE)))
                rows.append((now(), rate(), await asyncio.to_thread(replicas, process), queued))
                await asyncio.sleep(2)

        watching, asked = asyncio.create_task(watch()), []
        while now() < PHASES[-1][0]:
            await asyncio.sleep(random.exponential(1 / rate()))
            asked.append(asyncio.create_task(one()))
        await asyncio.gather(watching, *asked)
    return np.array(rows), np.array(answers)


def draw(rows, answers, path):
    """Draw three plots below one another: rate and replicas, queue, latency."""
    seconds, rates, counts, queued = rows.T
    good = answers[answers[:, 2] == 200]
    ended = good[:, 0] + good[:, 1] / 1000
    recent = [good[(ended > second - 10) & (ended <= second), 1] for second in seconds]
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 6), layout="constrained")
    axes[0].plot(seconds, rates, color="tab:gray")
    axes[0].set_ylabel("requests/s")
    beside = axes[0].twinx()
    beside.step(seconds, counts, where="post", color="tab:blue")
    beside.set_ylabel("replicas", color="tab:blue")
    beside.set_ylim(0, max(counts) + 0.5)
    beside.yaxis.get_major_locator().set_params(integer=True)
    axes[1].plot(seconds, queued, color="tab:orange")
    axes[1].set_ylabel("tokens waiting")
    for share, style in ((50, ":"), (99, "-")):
        values = [np.percentile(some, share) if len(some) else np.nan for some in recent]
        axes[2].plot(seconds, values, style, color="tab:red", label=f"p{share}")
    axes[2].set_ylabel("ms, last 10 s")
    axes[2].set_yscale("log")
    axes[2].legend()
    axes[2].set_xlabel("seconds")
    figure.savefig(path, dpi=100)


def main():
    """Draw the plots and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--low", type=float, default=10)
    parser.add_argument("--high", type=float, default=60)
    parser.add_argument("--output", default="autoscaling.png")
    options = parser.parse_args()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "pipelines", "serve", options.model, "--port", str(port)]
    for setting in (f"num_replicas=1:{options.most}", "target_queued_tokens=2000", "upscale_delay_s=3",
                    "downscale_delay_s=20", "num_threads=1", "allow_without_key=true"):  # fmt: skip
        command += ["--set", setting]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1/predict"
    try:
        wait_for(url, bodies_of("ours", 66), process)
        rows, answers = asyncio.run(follow(url, process, options.low, options.high))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    draw(rows, answers, options.output)
    statuses = {int(status): int((answers[:, 2] == status).sum()) for status in np.unique(answers[:, 2])}
    changes = np.flatnonzero(np.diff(rows[:, 2]))
    print(json.dumps({"statuses": statuses, "most_queued_tokens": int(rows[:, 3].max()),
                      "replicas": [[round(float(rows[i + 1, 0])), int(rows[i + 1, 2])] for i in changes],
                      "p99_ms": round(float(np.percentile(answers[:, 1], 99)))}))  # fmt: skip


if __name__ == "__main__":
    main()
