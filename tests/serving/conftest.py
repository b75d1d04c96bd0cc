"""Fixtures for the HTTP application without sockets and without Ray."""

import asyncio
import threading

import httpx
import pytest

from pipelines.serving.api import build_api
from pipelines.serving.job import ServeJob
from pipelines.serving.predictor import Predictor
from tests.serving.keys import HASHES, KEYS


class ApiClient:
    """A client of an application in this process. The application runs on an event loop in a thread."""

    def __init__(self, job):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.predictor = self._wait(Predictor.open(job))
        self.headers = {"authorization": f"Bearer {KEYS[1]}"}
        transport = httpx.ASGITransport(build_api(self.predictor))
        self._client = httpx.AsyncClient(transport=transport, base_url="http://api", timeout=60)

    def _wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def request(self, method, path, *, headers=None, **options):
        """Send a request and return the response. `headers` replace the API key."""
        given = self.headers if headers is None else headers
        return self._wait(self._client.request(method, path, headers=given, **options))

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, **options):
        return self.request("POST", path, **options)

    def predict(self, **body):
        return self.post("/v1/predict", json=body)

    def close(self):
        self._wait(self._client.aclose())
        self._wait(self.predictor.close())
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="session")
def api(spam_folder):
    """The spam model with two API keys and small limits."""
    limits = {"max_documents": 40, "max_document_tokens": 5000, "dtype": "float32", "device": "cpu"}
    client = ApiClient(ServeJob.parse({"model": str(spam_folder.path), "api_keys": HASHES, **limits}))
    yield client
    client.close()
