import json
import socket
import time

import pytest

from servers import PROXY_SECRET, Agent

CANARY = "canary-7f3a"
JSON = {"Content-Type": "application/json"}


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


BODIES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "not JSON": (b"hello canary-7f3a", 400),
    "half JSON": (b'{"message": "canary-7f3a', 400),
    "not UTF-8": (b'{"message": "canary-7f3a \xff"}', 400),
    "UTF-16": ('{"message": "canary-7f3a"}'.encode("utf-16"), 400),
    "byte order mark": (b"\xef\xbb\xbf" + body(message=CANARY), 400),
    "trailing text": (body(message=CANARY) + b"x", 400),
    "lone surrogate": (rb'{"message": "canary-7f3a \ud800"}', 400),
    "lone surrogate in thread_id": (rb'{"message": "canary-7f3a", "thread_id": "\udc00"}', 400),
    "raw control character": (b'{"message": "canary-7f3a \x01"}', 400),
    "deep array": (b'{"message": "canary-7f3a", "more": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400),
    "deep object": (b'{"message":' * 5_000 + b"1" + b"}" * 5_000, 400),
    "list": (b'["canary-7f3a"]', 422),
    "text": (b'"canary-7f3a"', 422),
    "null": (b"null", 422),
    "number": (b"1", 422),
    "no message": (b"{}", 422),
    "NaN": (b'{"message": NaN}', 400),
    "Infinity": (b'{"message": -Infinity}', 400),
    "NaN elsewhere": (b'{"message": "canary-7f3a", "temperature": NaN}', 400),
    "huge number": (b'{"message": ' + b"9" * 5000 + b"}", 400),
    "null message": (body(message=None), 422),
    "number message": (body(message=1), 422),
    "list message": (body(message=[CANARY]), 422),
    "empty message": (body(message=""), 422),
    "blank message": (body(message=" \t\n\u3000\u00a0"), 422),
    "NUL in message": (body(message=f"{CANARY}\0"), 422),
    "long message": (body(message=CANARY + "x" * 16_000), 422),
    "NUL in thread_id": (body(message=CANARY, thread_id="a\0b"), 422),
    "empty thread_id": (body(message=CANARY, thread_id=""), 422),
    "long thread_id": (body(message=CANARY, thread_id="a" * 65), 422),
    "9 kB thread_id": (body(message=CANARY, thread_id="a" * 9_000), 422),
    "newline in thread_id": (body(message=CANARY, thread_id="abc\n"), 422),
    "slash in thread_id": (body(message=CANARY, thread_id=f"../{CANARY}"), 422),
    "foreign digits in thread_id": (body(message=CANARY, thread_id="\u0661\u0662"), 422),
    "number thread_id": (body(message=CANARY, thread_id=7), 422),
    "unknown field": (body(message=CANARY, **{CANARY: 1}), 422),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_body(agent: Agent, name: str) -> None:
    data, status = BODIES[name]
    started = time.monotonic()
    answer = agent.client.post("/chat", content=data, headers=JSON)
    assert time.monotonic() - started < 1
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["error"].keys() == {"code", "message"}
    assert len(answer.text) < 250
    assert CANARY not in answer.text


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_wrong_content_type(agent: Agent, content_type: str) -> None:
    answer = agent.client.post("/chat", content=body(message=CANARY), headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_content_type_with_a_charset(agent: Agent) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert agent.client.post("/chat", content=body(message="hi"), headers=headers).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_megabyte(agent: Agent, chunked: bool) -> None:
    data = body(message="x" * 1_000_000)
    answer = agent.client.post("/chat", content=iter([data]) if chunked else data, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("length", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
def test_a_large_body_is_refused_before_it_has_come(agent: Agent, length: str) -> None:
    user = f"X-Forwarded-User: tester\r\nX-Proxy-Secret: {PROXY_SECRET}\r\n"
    head = f"POST /chat HTTP/1.1\r\nHost: x\r\n{user}Content-Type: application/json\r\n{length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", agent.port), timeout=5) as connection:
        connection.sendall(head.encode() + b"11000\r\n" + b"x" * 0x11000)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", f"/{CANARY}", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("POST", "/chat/", 404, "not_found"),
        ("GET", "/v1/models", 404, "not_found"),
        ("GET", "/chat", 405, "method_not_allowed"),
        ("DELETE", "/chat", 405, "method_not_allowed"),
        ("PROPFIND", "/chat", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there(agent: Agent, method: str, path: str, status: int, code: str) -> None:
    answer = agent.client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert CANARY not in answer.text


def test_requests_that_are_not_http(agent: Agent) -> None:
    with socket.create_connection(("127.0.0.1", agent.port), timeout=5) as connection:
        connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert agent.client.get("/health").status_code == 200


def test_nothing_sent_here_becomes_a_label(agent: Agent) -> None:
    for path in ("/one", "/two", f"/{CANARY}"):
        agent.client.get(path)
    agent.client.request("PROPFIND", "/chat")
    text = agent.client.get("/metrics").text
    assert CANARY not in text.lower()
    assert 'route="unknown"' in text
    assert 'route="/one"' not in text
    assert 'method="other"' in text
