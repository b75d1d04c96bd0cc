"""One real server for all tests that need sockets."""

import pytest

from tests.on_ray.serve.servers import started


@pytest.fixture(scope="session")
def server(spam_folder):
    """A server started with `pipelines serve`, in its own process with its own local Ray."""
    with started(spam_folder, "dtype=float32", "max_documents=40", "max_document_tokens=5000") as client:
        yield client
