"""Helpers that start a server in a new process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import httpx

from tests.jobs import free_port
from tests.serving.keys import HASHES, KEYS


@contextlib.contextmanager
def started(folder, *settings, port=None):
    """A client of a server with KEYS. The server must shut down cleanly at the end."""
    port = port or free_port()
    command = [sys.executable, "-m", "pipelines", "serve", str(folder.path), "--port", str(port)]
    for setting in (f"api_keys=[{','.join(HASHES)}]", *settings):
        command += ["--set", setting]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    deadline = time.monotonic() + 120
    while not any("ready on" in line for line in lines):
        assert process.poll() is None, "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
        time.sleep(0.2)
    assert not any(".cc:" in line for line in lines), "a line of Ray's C++ part"
    headers = {"authorization": f"Bearer {KEYS[1]}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as client:
        yield client
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    reader.join(timeout=10)
    assert any("running requests finish first" in line for line in lines)
    assert not any("Traceback" in line for line in lines)


def predict(server, **body):
    return server.post("/v1/predict", json=body)
