"""Ask a server about texts, and wait politely if it is overloaded.

python docs/examples/client.py http://127.0.0.1:8000 "a text" "another text"
"""

import os
import sys
import time

import httpx


def classify(server: str, texts: list[str], *, key: str | None = None, tries: int = 5) -> list[dict]:
    """Return the predictions of texts. An overloaded server (429, 503) is asked again when it says so."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    for _ in range(tries):
        answer = httpx.post(f"{server}/v1/predict", json={"inputs": texts}, headers=headers, timeout=120)
        if answer.status_code in (429, 503):
            time.sleep(float(answer.headers.get("retry-after", 1)))
            continue
        if answer.is_error:
            raise SystemExit(f"{answer.status_code}: {answer.json()['error']}")
        return answer.json()["predictions"]
    raise SystemExit(f"the server was overloaded {tries} times")


if __name__ == "__main__":
    server, *texts = sys.argv[1:]
    for text, found in zip(texts, classify(server, texts, key=os.environ.get("API_KEY")), strict=True):
        label = found.get("label") or ", ".join(found.get("labels") or []) or found.get("value")
        print(f"{label}\t{found['scores']}\t{text[:60]!r}")
