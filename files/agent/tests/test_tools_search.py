import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from agent.tools.search import search_tool
from servers import Agent, free_port

RESULT = {"title": "Debian", "url": "https://www.debian.example/", "content": "The universal  operating\nsystem."}
ANSWERS: dict[str, tuple[int, bytes]] = {
    "one": (200, json.dumps({"results": [RESULT]}).encode()),
    "many": (200, json.dumps({"results": [RESULT] * 50}).encode()),
    "none": (200, b'{"results": []}'),
    "long": (200, json.dumps({"results": [dict.fromkeys(RESULT, "x" * 100_000)]}).encode()),
    "odd": (200, rb'{"results": [{"title": "nul\u0000 half \ud800 \u202e", "url": null, "content": 7}]}'),
    "huge": (200, b'{"results": "' + b"x" * (2 << 20)),
    "html": (200, b"<html>"),
    "list": (200, b"[]"),
    "deep": (200, b"[" * 100_000),
    "wrong": (200, b'{"results": [null]}'),
    "forbidden": (403, b"JSON is off"),
    "redirect": (302, b""),
    "broken": (500, b"Traceback"),
}


class SearXNG(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        assert query["format"] == ["json"]
        self.server.queries.append(query["q"][0])
        word = query["q"][0].split()[0]
        if word == "slow":
            time.sleep(13)
        status, body = ANSWERS.get(word, ANSWERS["one"])
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def searxng() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), SearXNG)
    server.daemon_threads = True
    server.queries = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def ask(start_agent: Callable[..., Agent], searxng: ThreadingHTTPServer) -> Callable[[str], str]:
    service = start_agent(AGENT_SEARXNG_URL=f"http://127.0.0.1:{searxng.server_port}", AGENT_TURN_TIMEOUT_SECONDS="30")

    def ask(query: str) -> str:
        answer = service.chat(f"[[tool web_search {json.dumps({'query': query})}]]")
        assert answer.status_code == 200, answer.text
        return answer.json()["response"].removeprefix("The tool says: ")

    return ask


def test_search(ask: Callable[[str], str], searxng: ThreadingHTTPServer) -> None:
    assert ask("one") == "Debian\nhttps://www.debian.example/\nThe universal operating system."
    assert ask("many").count("universal") == 5
    assert ask("none") == "No results."
    assert len(ask("long")) == 200 + 500 + 500 + 2
    assert ask("odd") == "nul half"
    ask("word " * 200 + "&format=html\x00")
    assert len(searxng.queries[-1]) == 400


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("huge", "too long an answer"),
        ("html", "cannot be read"),
        ("list", "cannot be read"),
        ("deep", "cannot be read"),
        ("wrong", "cannot be read"),
        ("forbidden", "status 403"),
        ("redirect", "status 302"),
        ("broken", "status 500"),
        ("slow", "did not answer in time"),
        (" ", "the query is empty"),
    ],
)
def test_failures_are_told_to_the_model(ask_all: Callable[[str], str], word: str, reason: str) -> None:
    assert reason in ask_all(word)


@pytest.fixture(scope="module")
def ask_all(searxng: ThreadingHTTPServer) -> Callable[[str], str]:
    """The tool alone: a service of its own for each failure would only cost time."""
    tool = search_tool(f"http://127.0.0.1:{searxng.server_port}")
    return lambda query: asyncio.run(tool.ainvoke({"query": query}))


def test_a_service_that_is_away() -> None:
    answer = asyncio.run(search_tool(f"http://127.0.0.1:{free_port()}").ainvoke({"query": "hello"}))
    assert answer == "the search service cannot be reached"


def test_no_address_no_tool(agent: Agent) -> None:
    assert "web_search is not a valid tool" in agent.chat('[[tool web_search {"query": "x"}]]').json()["response"]
