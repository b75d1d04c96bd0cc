"""Measure the requests per second of several servers with the same classifier, machine and client.

    python benchmarks/serve_vs_servers.py MODEL [--dtype float32] [--seconds 10] [--servers ours,haproxy,one]
    python3 -m venv inf && inf/bin/pip install torch==2.13.0 "infinity-emb[server,torch]==0.0.78"
    python benchmarks/serve_vs_servers.py MODEL --infinity inf/bin/infinity_emb --servers infinity,haproxy

- fastapi: FastAPI with a Hugging Face pipeline and a thread per request, as in tutorials.
- batch: Ray Serve with @serve.batch around the same pipeline, as in Ray's documentation; two replicas.
- infinity: Infinity's /classify, which does its own batching, in one process with all threads.
- ours, haproxy: `pipelines serve`, two replicas with one thread each, behind Ray's proxy and behind HAProxy.
- one: one replica with two threads, behind HAProxy.

Texts have 66 tokens (all servers do the same work) or 2,200 tokens. The other servers cut the long texts at 512 tokens.
`pipelines serve` reads them completely. The loop is closed: each client sends its next request as soon as it has an
answer. The client runs on the same cores as the server.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time

import aiohttp
import numpy as np

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
WORDS = "we meet at noon near the office and bring the papers that were sent to you on monday by the lawyer of "


def command_of(server, model, port, dtype, infinity):
    """Return the command that starts a server."""
    if server == "infinity":
        options = {"model-id": model, "served-model-name": "it", "engine": "torch", "device": "cpu", "dtype": dtype}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return [infinity, "v2", *words, "--no-bettertransformer", "--host", "127.0.0.1", "--port", str(port)]
    if server in ("fastapi", "batch"):
        return [sys.executable, "-c", FASTAPI if server == "fastapi" else BATCH, model, str(port), dtype]
    proxy = "python" if server == "ours" else "haproxy"
    replicas, threads = (1, 2) if server == "one" else (2, 1)
    settings = (f"dtype={dtype}", f"num_replicas={replicas}", f"num_threads={threads}", f"proxy={proxy}",
                "allow_without_key=true")  # fmt: skip
    command = [sys.executable, "-m", "pipelines", "serve", model, "--port", str(port)]
    return [*command, *(word for setting in settings for word in ("--set", setting))]


async def ask(url, body, clients, seconds):
    """Send requests for the given time and return the latency of each answer in ms."""
    latencies = []
    async with aiohttp.ClientSession() as session:
        end = time.perf_counter() + seconds

        async def client():
            while (began := time.perf_counter()) < end:
                async with session.post(url, data=body, headers={"content-type": "application/json"}) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()
                latencies.append(1000 * (time.perf_counter() - began))

        await asyncio.gather(*(client() for _ in range(clients)))
    return latencies


def body_of(server, text):
    """Return the request body for a server."""
    return json.dumps({"model": "it", "input": [text]} if server == "infinity" else {"inputs": [text]}).encode()


def wait_for(url, body, process):
    """Wait until the server answers."""
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            asyncio.run(ask(url, body, 1, 0.1))
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
    parser.add_argument("--infinity", help="Infinity's command, in its own virtual environment")
    options = parser.parse_args()
    texts = {66: WORDS * 3, 2200: WORDS * 100}
    for server in options.servers.split(","):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        url = f"http://127.0.0.1:{port}/" + ("classify" if server == "infinity" else "v1/predict")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        command = command_of(server, options.model, port, options.dtype, options.infinity)
        process = subprocess.Popen(command, env=environment, **quiet)
        try:
            wait_for(url, body_of(server, "ready?"), process)
            for tokens, text in texts.items():
                for clients in (1, 8, 32):
                    asyncio.run(ask(url, body_of(server, text), clients, options.seconds / 5))
                    found = asyncio.run(ask(url, body_of(server, text), clients, options.seconds))
                    p50, p99 = np.percentile(found, [50, 99])
                    print(json.dumps({"server": server, "dtype": options.dtype, "tokens": tokens, "clients": clients,
                                      "per_s": round(len(found) / options.seconds, 1), "p50_ms": round(p50, 1),
                                      "p99_ms": round(p99, 1)}), flush=True)  # fmt: skip
        finally:
            process.terminate()
            process.wait(timeout=120)
            time.sleep(3)


if __name__ == "__main__":
    main()
