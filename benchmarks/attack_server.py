"""Send a server what strangers send: random requests to every route, and texts that are refused only after work.

    python benchmarks/attack_server.py http://127.0.0.1:8000               # 20,000 random requests, by status
    python benchmarks/attack_server.py http://127.0.0.1:8000 --large 8     # 8 clients with 3.8 MB each, and small ones

Prints JSON. The answer to a random request may be anything but a 5xx other than 503 and 504.
"""

import argparse
import collections
import json
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

ROUTES = [
    *(("POST", path) for path in ("/v1/predict", "/predict", "/models/NAME", "/classify", "/v1/classify",
                                  "/v1/moderations", "/v2/models/NAME/infer", "/", "/invocations", "/vertex",
                                  "/v1/models/NAME:predict")),
    *(("GET", path) for path in ("/v2", "/v2/models/NAME", "/v2/health/ready", "/v2/models/NAME/ready", "/health",
                                 "/info", "/metrics", "/docs", "/openapi.json", "/", "/nothing")),
]  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
FIELDS = ("inputs", "input", "text", "parameters", "thresholds", "windows", "model", "id", "top_k", "truncate", "data",
          "name", "shape", "datatype", "outputs", "text_pair", "raw_scores", "instances")  # fmt: skip
HEADERS = ("content-type", "content-length", "content-encoding", "x-request-id", "x-request-timeout-seconds", "accept",
           "authorization", "inference-header-content-length", "host", "cookie", "transfer-encoding",
           "x-forwarded-for")  # fmt: skip


def value(dice, depth=0):
    """Any JSON value, often one that looks right."""
    return dice.choice([
        lambda: "a short text", lambda: "", lambda: "\ud800", lambda: "\x00\u202e é 日本 💰" * dice.randint(1, 9),
        lambda: dice.choice([0, -1, 1, 2**63, 1e308, float("nan"), float("inf"), 0.5]), lambda: None, lambda: True,
        lambda: ["a", "b"], lambda: [["a", "b"]], lambda: [["a"], ["b"]], lambda: [], lambda: {},
        lambda: {"text": "a", "text_pair": "b"},
        lambda: [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}],
        lambda: [{"name": "text", "shape": [dice.choice([1, -1, 2**40])], "datatype": dice.choice(["BYTES", "FP32"]),
                  "data": value(dice, depth + 1)}],
        lambda: [value(dice, depth + 1) for _ in range(dice.randint(0, 4))] if depth < 4 else 0,
        lambda: {dice.choice(FIELDS): value(dice, depth + 1) for _ in range(dice.randint(0, 4))} if depth < 4 else 0,
    ])()  # fmt: skip


def body(dice):
    """Bytes of a body: JSON, damaged JSON, deep JSON, or anything."""
    content = {dice.choice(FIELDS): value(dice) for _ in range(dice.randint(0, 4))}
    encoded = json.dumps(content if dice.random() < 0.9 else value(dice)).encode()
    kind = dice.random()
    if kind < 0.8:
        return encoded
    if kind < 0.9:
        place = dice.randrange(len(encoded) + 1)
        return encoded[:place] + dice.randbytes(dice.randint(0, 5)) + encoded[place + 1 :]
    return dice.choice([b"", b"[" * 5_000, b'{"inputs":' * 900, dice.randbytes(200), b"\xff\xfe" + encoded, b"null"])


def random_request(dice, url, name):
    """Return the arguments of an httpx request."""
    method, path = dice.choice(ROUTES)
    method = method if dice.random() < 0.85 else dice.choice(METHODS)
    path = path.replace("NAME", dice.choice([name, name, name, "other", "%00", "a/b", "é"]))
    headers = {"content-type": "application/json"}
    for _ in range(dice.choice([0, 0, 1, 2])):
        text = dice.choice(
            [b"1", b"-1", b"nan", b"\xff\xfe", "é".encode(), b"a" * 3000, b"gzip", b"application/json", b""]
        )
        header = dice.choice(HEADERS)
        if header not in ("content-length", "transfer-encoding", "host"):
            headers[header] = text
    content = body(dice) if method not in ("GET", "HEAD") else None
    return {"method": method, "url": f"{url}{path}", "headers": headers, "content": content}


def fuzz(url, count, seed, name):
    """Count the statuses of random requests, and show the ones that may not be."""
    statuses, bad = collections.Counter(), []

    def send(number):
        request = random_request(random.Random(f"{seed}-{number}"), url, name)
        try:
            answer = client.request(**request)
        except (httpx.InvalidURL, httpx.LocalProtocolError, ValueError):
            return "not sent", None
        except httpx.TransportError as error:
            return type(error).__name__, None
        return answer.status_code, (number, request["method"], request["url"], answer.text[:200])

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:
        for status, shown in pool.map(send, range(count)):
            statuses[str(status)] += 1
            if isinstance(status, int) and status >= 500 and status not in (503, 504):
                bad.append(shown)
    return {"requests": count, "statuses": dict(sorted(statuses.items())), "errors": len(bad), "first": bad[:5]}


def large(url, clients, megabytes, seconds):
    """Let some clients send large texts all the time, and measure how long small requests take meanwhile."""
    text = "word " * int(megabytes * 2**20 / 5)
    stop, statuses, times = threading.Event(), collections.Counter(), {"before": [], "beside": [], "after": []}

    def send_large():
        with httpx.Client(timeout=600) as client:
            while not stop.is_set():
                statuses[str(client.post(f"{url}/v1/predict", json={"inputs": [text]}).status_code)] += 1

    def send_small(phase, until):
        with httpx.Client(timeout=600) as client:
            while time.monotonic() < until:
                started = time.monotonic()
                client.post(f"{url}/v1/predict", json={"inputs": ["a short text"]}).raise_for_status()
                times[phase].append(time.monotonic() - started)
                time.sleep(0.05)

    send_small("before", time.monotonic() + 5)
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(send_large)
        send_small("beside", time.monotonic() + seconds)
        stop.set()
    send_small("after", time.monotonic() + 5)
    shown = {phase: {"p50_ms": round(1000 * statistics.median(found), 1), "max_ms": round(1000 * max(found), 1)}
             for phase, found in times.items()}  # fmt: skip
    return {"clients": clients, "megabytes": megabytes, "large": dict(statuses), "small": shown}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="model", help="name of the server's model")
    parser.add_argument("--large", type=int, metavar="CLIENTS")
    parser.add_argument("--megabytes", type=float, default=3.8)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    if options.large:
        print(json.dumps(large(options.url, options.large, options.megabytes, options.seconds)))
    else:
        print(json.dumps(fuzz(options.url, options.requests, options.seed, options.name), indent=1))
