"""Access control of the local Ray that a command starts. Its ports are reachable, but clients need the token."""

import re
import subprocess
import sys

import pytest

from pipelines.on_ray.cluster import make_token
from tests.jobs import clean_environment

ASK = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=9)))
"""


def ask(address, **more):
    """List the nodes of the Ray at `address` from another process."""
    environment = clean_environment()
    command = [sys.executable, "-c", ASK, address]
    return subprocess.run(
        command, env={**environment, **more}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.timeout(400)
def test_local_ray_requires_token(local_ray):
    address = local_ray.get_runtime_context().gcs_address
    assert ask(address, RAY_AUTH_MODE="token").stdout == "1\n", "this user can read the token"
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}):
        done = ask(address, **stranger)
        assert done.returncode != 0
        assert "InvalidAuthToken" in done.stderr


def test_only_this_user_can_read_a_new_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_token()
    token = tmp_path / ".ray" / "auth_token"
    content = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", content)
    assert token.stat().st_mode & 0o077 == 0
    make_token()
    assert token.read_text() == content, "a token that exists stays"
    assert list(token.parent.iterdir()) == [token]


def test_local_ray_has_no_dashboard(local_ray):
    assert not local_ray._private.worker.global_worker.node.webui_url
