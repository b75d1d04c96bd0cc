"""Measure the requests per second of several servers with the same classifier, machine and client.

    python benchmarks/serve_vs_servers.py MODEL [--dtype float32] [--seconds 10] [--servers fastapi,local,haproxy]
    python benchmarks/serve_vs_servers.py MODEL --int8 FOLDER --servers local-int8,haproxy-int8
    python3 -m venv inf && inf/bin/pip install torch==2.13.0 "infinity-emb[server,torch]==0.0.78"
    python benchmarks/serve_vs_servers.py MODEL --infinity inf/bin/infinity_emb --servers infinity,haproxy

- fastapi: FastAPI with a Hugging Face pipeline and a thread per request, as in tutorials.
- batch: Ray Serve with @serve.batch around the same pipeline, as in Ray's documentation; two replicas.
- infinity: Infinity's /classify, which does its own batching, in one process with all threads.
- local: `pipelines serve --local`, one process with all threads, without Ray.
- ours, haproxy: `pipelines serve`, two replicas with one thread each, behind Ray's proxy and behind HAProxy.
- one: one replica with two threads, behind HAProxy.

`pipelines serve` chooses its engine: OpenVINO where it is installed. With -int8 behind the name, the model is that of
--int8 (a folder of `pipelines quantize`). ready_s is the time from the start to the first answer; mb is the memory of
all processes of the server after the run (proportional set size).

Texts have 66 tokens (all servers do the same work) or 2,200 tokens. The other servers cut the long texts at 512 tokens.
`pipelines serve` reads them completely. The loop is closed: each client sends its next request as soon as it has an
answer. The client runs on the same cores as the server.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time

import aiohttp
import numpy as np
import psutil

FASTAPI = """
import sys, torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline
model, port, dtype = sys.argv[1:]
classify = pipeline("text-classification", model=model, dtype=getattr(torch, dtype), truncation=True, max_length=512)
app = FastAPI()
class Body(BaseModel):
    inputs: list[str]
@app.post("/v1/predict")
def predict(body: Body):
    return classify(body.inputs)
uvicorn.run(app, port=int(port), log_level="warning")
"""
BATCH = """
import ray, sys, time, torch
from ray import serve
from starlette.requests import Request
from transformers import pipeline
model, port, dtype = sys.argv[1:]
@serve.deployment(num_replicas=2, max_ongoing_requests=100)
class Classifier:
    def __init__(self):
        torch.set_num_threads(1)
        self.classify = pipeline("text-classification", model=model, dtype=getattr(torch, dtype),
                                 truncation=True, max_length=512)
        self.classify("warm up")
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def answer(self, texts):
        return self.classify(texts, batch_size=len(texts))
    async def __call__(self, request: Request):
        return await self.answer((await request.json())["inputs"][0])
ray.init("local", include_dashboard=False)
serve.start(http_options={"port": int(port)})
serve.run(Classifier.bind(), route_prefix="/v1/predict")
time.sleep(10_000)
"""
WORDS = "we meet at noon near the office and bring the papers that were sent to you on monday by the lawyer of"


def command_of(server, model, port, dtype, infinity):
    """Return the command that starts a server."""
    if server == "infinity":
        options = {"model-id": model, "served-model-name": "it", "engine": "torch", "device": "cpu", "dtype": dtype}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return [infinity, "v2", *words, "--no-bettertransformer", "--host", "127.0.0.1", "--port", str(port)]
    if server in ("fastapi", "batch"):
        return [sys.executable, "-c", FASTAPI if server == "fastapi" else BATCH, model, str(port), dtype]
    if server == "local":
        return [sys.executable, "-m", "pipelines", "serve", model, "--local", "--port", str(port)] + (
            ["--set", f"dtype={dtype}"] if dtype else []
        )
    proxy = "python" if server == "ours" else "haproxy"
    replicas, threads = (1, 2) if server == "one" else (2, 1)
    settings = [f"num_replicas={replicas}", f"num_threads={threads}", f"proxy={proxy}", "allow_without_key=true"]
    settings += [f"dtype={dtype}"] if dtype else []
    command = [sys.executable, "-m", "pipelines", "serve", model, "--port", str(port)]
    return [*command, *(word for setting in settings for word in ("--set", setting))]


async def ask(url, bodies, clients, seconds):
    """Send requests for the given time, each with the next body, and return the latency of each answer in ms."""
    latencies, texts = [], itertools.cycle(bodies)
    async with aiohttp.ClientSession() as session:
        end = time.perf_counter() + seconds

        async def client():
            while (began := time.perf_counter()) < end:
                async with session.post(url, data=next(texts), headers={"content-type": "application/json"}) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()
                latencies.append(1000 * (time.perf_counter() - began))

        await asyncio.gather(*(client() for _ in range(clients)))
    return latencies


def bodies_of(server, num_tokens):
    """Return request bodies with different texts of the same number of tokens. A server may remember equal ones."""
    rng, words_of_text, bodies = random.Random(0), WORDS.split(), []
    for _ in range(2000):
        words = [word for _ in range(num_tokens // 22) for word in rng.sample(words_of_text, len(words_of_text))]
        text = " ".join(words)
        content = {"model": "it", "input": [text]} if server == "infinity" else {"inputs": [text]}
        bodies.append(json.dumps(content).encode())
    return bodies


def wait_for(url, bodies, process):
    """Wait until the server answers."""
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            asyncio.run(ask(url, bodies, 1, 0.1))
        except (aiohttp.ClientError, AssertionError):
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(url)


def main():
    """Print one line of JSON per server, text length and number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--servers", default="fastapi,batch,ours,haproxy")
    parser.add_argument("--int8", help="folder of pipelines quantize, for servers whose names end in -int8")
    parser.add_argument("--infinity", help="Infinity's command, in its own virtual environment")
    options = parser.parse_args()
    for server in options.servers.split(","):
        is_int8 = server.endswith("-int8")
        model, dtype = (options.int8, "") if is_int8 else (options.model, options.dtype)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        url = f"http://127.0.0.1:{port}/" + ("classify" if server == "infinity" else "v1/predict")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        command = command_of(server.removesuffix("-int8"), model, port, dtype, options.infinity)
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, **quiet)
        common = {"server": server, "dtype": dtype or "int8"}
        try:
            wait_for(url, bodies_of(server, 66), process)
            common["ready_s"] = round(time.perf_counter() - began, 1)
            for tokens in (66, 2200):
                bodies = bodies_of(server, tokens)
                for clients in (1, 8, 32):
                    asyncio.run(ask(url, bodies, clients, options.seconds / 5))
                    found = asyncio.run(ask(url, bodies, clients, options.seconds))
                    p50, p99 = (round(value, 1) for value in np.percentile(found, [50, 99]))
                    rate = round(len(found) / options.seconds, 1)
                    result = {"tokens": tokens, "clients": clients, "per_s": rate, "p50_ms": p50, "p99_ms": p99}
                    print(json.dumps({**common, **result, "mb": memory(process.pid)}), flush=True)
        finally:
            process.terminate()
            process.wait(timeout=120)
            time.sleep(3)


def memory(pid):
    """Return the megabytes of a process and its descendants. Shared pages are counted once."""
    parent = psutil.Process(pid)
    every = [parent, *parent.children(recursive=True)]
    return round(sum(process.memory_full_info().pss for process in every) / 1e6)


if __name__ == "__main__":
    main()
