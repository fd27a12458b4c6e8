"""The load client of bench/gpu_host.sh and bench/gpu.sh: it counts what happened, no more and no less."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from programs import load

gpu_client = load("bench/gpu_client.py")

ROLE = '{"choices": [{"delta": {"role": "assistant", "content": ""}}]}'
TOKEN = '{"choices": [{"delta": {"content": "word "}}]}'
USAGE = '{"choices": [], "usage": {"completion_tokens": 3}}'
ERROR = '{"error": {"message": "the model is away"}}'


@contextmanager
def server(status: int, events: list[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers every request with these events; yields its address, and the requests that it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
            answer = "".join(f"data: {event}\n\n" for event in events).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", requests
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.mark.parametrize(
    ("status", "events", "tokens", "failure"),
    [
        (200, [ROLE, TOKEN, TOKEN, TOKEN, USAGE, "[DONE]"], 3, ""),
        (200, [ROLE, TOKEN], 0, "broke off"),
        (200, [ROLE, TOKEN, TOKEN, TOKEN, USAGE], 3, "broke off"),
        (200, [ROLE, "[DONE]"], 0, "no token"),
        (200, [ROLE, TOKEN, ERROR, "[DONE]"], 0, "the model is away"),
        (503, [ERROR], 0, "503"),
    ],
)
def test_an_answer_is_judged_by_what_it_brought(status: int, events: list[str], tokens: int, failure: str) -> None:
    with server(status, events) as (url, _):
        answer = gpu_client.Client(gpu_client.parse([url, "m", "1", "0"]), 0, 0).ask()
    assert (answer.tokens, failure in answer.failure, bool(answer.failure)) == (tokens, True, bool(failure))


def test_nobody_answers() -> None:
    answer = gpu_client.Client(gpu_client.parse(["http://127.0.0.1:9", "m", "1", "0"]), 0, 0).ask()
    assert "ConnectionRefusedError" in answer.failure


def stop_after(requests: list[dict[str, Any]], count: int, file: Path) -> None:
    while len(requests) < count:
        time.sleep(0.01)
    file.touch()


def test_every_request_is_counted_once(tmp_path: Path) -> None:
    with server(200, [TOKEN, USAGE, "[DONE]"]) as (url, requests):
        options = gpu_client.parse([url, "m", "3", "60", "--until", str(tmp_path / "stop")])
        started = gpu_client.time.monotonic()
        threading.Thread(target=stop_after, args=(requests, 12, tmp_path / "stop"), daemon=True).start()
        answers = gpu_client.work(options, [1, 2, 3], started + 60)
    result = gpu_client.summary(answers, started, 3)
    assert result["answers"] == len(requests) >= 12
    assert result["tokens"] == 3 * len(requests)
    assert result["failed"] == 0
    assert len({json.dumps(request["messages"]) for request in requests}) == len(requests)


def test_what_is_asked() -> None:
    with server(200, [TOKEN, USAGE, "[DONE]"]) as (url, requests):
        for arguments in ([], ["--plain", "--path", "/openai/v1/chat/completions", "--header", "Authorization: Basic x:y"]):
            gpu_client.Client(gpu_client.parse([url, "m", "1", "0", "64", "10", *arguments]), 0, 0).ask()
    assert [(one["path"], one["key"], one.get("ignore_eos")) for one in requests] == [
        ("/v1/chat/completions", None, True),
        ("/openai/v1/chat/completions", "Basic x:y", None),
    ]
    assert all(one["max_tokens"] == 64 and len(one["messages"][0]["content"].split()) == 10 for one in requests)


def test_it_ends_when_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert gpu_client.work(gpu_client.parse(["http://127.0.0.1:9", "m", "2", "60", "--until", str(tmp_path / "stop")]), [1, 2], float("inf")) == []


def test_failures_are_told() -> None:
    answers = [gpu_client.Answer(0.0, failure=f"503: {number}") for number in range(9)]
    assert gpu_client.summary(answers, 0.0, 9) == {"clients": 9, "answers": 0, "failed": 9, "failures": [f"503: {number}" for number in range(5)]}


def test_a_header_without_a_colon_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_client.parse(["http://x", "m", "1", "0", "--header", "nothing"])
    assert "--header is 'nothing'; allowed is `Name: value`." in capsys.readouterr().err
