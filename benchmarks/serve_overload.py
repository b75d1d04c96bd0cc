"""Measure a server under overload: the requests that it answers in time, those that it refuses, and its recovery.

    python benchmarks/serve_overload.py MODEL [--seconds 60] [--proxy haproxy]

First, the script measures the rate that one replica sustains (16 clients, closed loop). Then requests arrive at random
times (open loop, Poisson), at 3 times that rate with texts of 66 tokens, and at 10 times with texts of 2,200 tokens.
The bound is the longest wait that the queue limit allows: the limit in tokens plus one batch, divided by the tokens
answered per second.
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
import numpy as np
import psutil
from serve_vs_servers import ask, bodies_of, wait_for

QUEUED_TOKENS, BATCH_TOKENS = 50_000, 4096
WINDOW_TOKENS = {66: 68, 2200: 2722}
"""Tokens in the windows of 256 of one text, with overlaps and special tokens. The queue counts these tokens."""


async def flood(url, bodies, rate, seconds):
    """Send requests at a fixed mean rate, whether earlier requests are answered or not.

    Return (status, milliseconds) of each request, and the seconds until the last was answered.
    """
    found, texts = [], itertools.cycle(bodies)
    waits = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one():
            began = time.perf_counter()
            try:
                async with session.post(url, data=next(texts), headers={"content-type": "application/json"}) as answer:
                    await answer.read()
                    found.append((answer.status, 1000 * (time.perf_counter() - began)))
            except aiohttp.ClientError:
                found.append((0, 1000 * (time.perf_counter() - began)))

        began, due, tasks = time.perf_counter(), 0.0, []
        for wait in waits:
            due += wait
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(*tasks)
    return found, time.perf_counter() - began


def memory_mb(root):
    """Return the megabytes of the replicas among the descendants of a process."""
    members = psutil.Process(root).children(recursive=True)
    return sum(m.memory_full_info().uss for m in members if "ServeReplica" in " ".join(m.cmdline())) >> 20


def measure(url, process, tokens, factor, seconds):
    """Run one overload phase and print a line of JSON."""
    bodies = bodies_of("ours", tokens)
    asyncio.run(ask(url, bodies, 16, 3))
    sustained = len(asyncio.run(ask(url, bodies, 16, 8))) / 8
    before = memory_mb(process.pid)
    found, elapsed = asyncio.run(flood(url, bodies, factor * sustained, seconds))
    after, began = memory_mb(process.pid), time.perf_counter()
    asyncio.run(ask(url, bodies, 1, 0.01))
    recovered = time.perf_counter() - began
    statuses = {status: [ms for code, ms in found if code == status] for status in {code for code, _ in found}}
    good, refused = statuses.get(200, [0.0]), statuses.get(429, [0.0])
    answered = len(good) / elapsed
    bound = 1000 * (QUEUED_TOKENS + BATCH_TOKENS) / (answered * WINDOW_TOKENS[tokens])
    line = {
        "tokens": tokens,
        "sustained_per_s": round(sustained, 1),
        "offered_per_s": round(factor * sustained, 1),
        "answered_per_s": round(answered, 1),
        "p50_ms": round(np.median(good)),
        "p99_ms": round(np.percentile(good, 99)),
        "bound_ms": round(bound),
        "refused": len(refused),
        "refused_p50_ms": round(np.median(refused), 1),
        "refused_p99_ms": round(np.percentile(refused, 99), 1),
        "other": {status: len(times) for status, times in statuses.items() if status not in (200, 429)},
        "replica_mb": [before, after],
        "recovered_s": round(recovered, 2),
    }
    print(json.dumps(line), flush=True)


def main():
    """Print a line for short texts and one for long texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--proxy", default="python", choices=["python", "haproxy"])
    options = parser.parse_args()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "pipelines", "serve", options.model, "--port", str(port)]
    for setting in (f"max_queued_tokens={QUEUED_TOKENS}", f"batch_tokens={BATCH_TOKENS}", "num_threads=1",
                    f"proxy={options.proxy}", "allow_without_key=true"):  # fmt: skip
        command += ["--set", setting]
    environment = {key: value for key, value in os.environ.items() if not re.match("RAY_", key)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1/predict"
    try:
        wait_for(url, bodies_of("ours", 66), process)
        measure(url, process, 66, 3, options.seconds)
        measure(url, process, 2200, 10, options.seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


if __name__ == "__main__":
    main()
