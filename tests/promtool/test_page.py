"""The page that shows without Grafana what is broken, since when, and what to do: in a real browser, with answers of Prometheus made here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

import chromium  # noqa: E402
import promql  # noqa: E402

FILES = promql.ROLE / "files"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json"}


@dataclass
class Answers:
    """What Prometheus says: its alerts, what it answers to queries (a number for all, or by expression), and whether it answers at all."""

    alerts: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, str | None] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    broken: bool = False
    address: str = ""

    def result(self, path: str, query: dict[str, list[str]]) -> dict[str, Any]:
        if path == "alerts":
            return {"alerts": self.alerts}
        expression = query["query"][0]
        now = time.time()
        if path == "query_range":
            return {"result": [{"metric": {"model_name": "m"}, "values": [[now - 60, "1"], [now - 45, "2"], [now - 10, "3"]]}]}
        if expression.startswith("max by (alertname)"):
            return {"result": [{"metric": {"alertname": name}, "value": [now, str(now - 600)]} for name in self.ended]}
        value = self.values.get(expression, "1")
        return {"result": [] if value is None else [{"metric": {}, "value": [now, value]}]}


def alert(name: str, severity: str, seconds: float, state: str = "firing", **annotations: str) -> dict[str, Any]:
    since = datetime.fromtimestamp(time.time() - seconds, UTC).isoformat()
    words = {"summary": f"{name} happened", "description": f"What to do about {name}.", **annotations}
    return {"labels": {"alertname": name, "severity": severity, "host": "front"}, "annotations": words, "state": state, "activeAt": since, "value": "1"}


WATCHDOG = alert("Watchdog", "none", 86400)


@pytest.fixture
def answers() -> Iterator[Answers]:
    told = Answers(alerts=[WATCHDOG])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if address.path.startswith("/api/v1/"):
                status, kind = (503, "text/plain") if told.broken else (200, "application/json")
                data = told.result(address.path.removeprefix("/api/v1/"), parse_qs(address.query))
                body = b"Service Unavailable" if told.broken else json.dumps({"status": "success", "data": data}).encode()
            else:
                name = address.path.removeprefix("/user/") or "index.html"
                path = FILES / name if name.startswith("dashboards/") else FILES / "page" / name
                status, kind, body = (200, TYPES[path.suffix], path.read_bytes()) if path.is_file() else (404, "text/plain", b"")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told.address = f"http://127.0.0.1:{server.server_port}/user/"
        yield told
        server.shutdown()


def verdict(page: str) -> tuple[str, str]:
    """The sentence, and whether it is `good` or `bad`."""
    found = re.search(r'<h1 id="verdict" role="status" class="(\w*)">([^<]*)</h1>', page)
    assert found, page
    return found[2], found[1]


@pytest.mark.parametrize(
    ("alerts", "expected"),
    [
        ([WATCHDOG], ("Nothing is known to be broken", "good")),
        ([], ("No alert is judged: the rules are not loaded, or Prometheus has just started", "bad")),
        ([WATCHDOG, alert("Slow", "warning", 60, "pending")], ("Nothing is known to be broken", "good")),
        ([WATCHDOG, alert("Slow", "warning", 900), alert("Down", "critical", 60)], ("Down happened, and 1 more", "bad")),
        ([WATCHDOG, alert("Late", "critical", 60), alert("Early", "critical", 900)], ("Early happened, and 1 more", "bad")),
        ([WATCHDOG, alert("Own", "page", 900), alert("Slow", "warning", 60)], ("Slow happened, and 1 more", "bad")),
    ],
    ids=["well", "nobody judges", "pending", "worst first", "first first", "a severity of one's own"],
)
def test_the_verdict(tmp_path: Path, alerts: list[dict[str, Any]], expected: tuple[str, str]) -> None:
    shutil.copy(FILES / "page" / "judge.js", tmp_path / "judge.mjs")
    (tmp_path / "run.mjs").write_text(f'import {{verdict}} from "./judge.mjs"; console.log(JSON.stringify(verdict({json.dumps(alerts)})));')
    result = subprocess.run(["node", str(tmp_path / "run.mjs")], capture_output=True, text=True, check=True)
    sentence, good = json.loads(result.stdout)
    assert (sentence, "good" if good else "bad") == expected


def test_what_is_broken_since_when_and_what_to_do(answers: Answers) -> None:
    answers.alerts = [
        WATCHDOG,
        alert("Slow", "warning", 900),
        alert("Down", "critical", 180, runbook_url="https://example.com/runbook#down"),
        alert("Soon", "warning", 30, "pending"),
    ]
    answers.ended = ["Earlier"]
    page = chromium.dom(answers.address)
    assert re.findall(r'<article class="(\w+)"><h3>([^<]*)', page) == [
        ("critical", "Down: Down happened"),
        ("warning", "Slow: Slow happened"),
        ("warning", "Soon: Soon happened"),
    ]
    assert re.findall(r"since \d\d:\d\d:\d\d \((\d+ \w+)\)", page)[:2] == ["3 min", "15 min"]
    assert "<p>What to do about Down.</p>" in page
    assert re.findall(r'href="(https:[^"]*)"', page) == ["https://example.com/runbook#down"]
    assert "host=front" in page
    assert "Watchdog" not in page
    assert page.index("Broken</h2>") < page.index("Slow happened</h3>") < page.index("About to be an alert</h2>") < page.index("Soon happened</h3>")
    assert re.search(r"Earlier \(until \d\d:\d\d:\d\d\)", page)


def test_prometheus_that_does_not_answer_is_no_good_news(answers: Answers) -> None:
    answers.broken = True
    sentence, kind = verdict(chromium.dom(answers.address))
    assert sentence.startswith("Prometheus does not answer")
    assert kind == "bad"


def test_what_is_well_what_nobody_measures_and_a_gap(answers: Answers) -> None:
    answers.values = {"min(pg_up)": None, "min(redis_up)": "0"}
    page = chromium.dom(answers.address)
    assert verdict(page) == ("Nothing is known to be broken", "good")
    shown = dict(re.findall(r'<h3>([^<]*)</h3><div class="value ?(\w*">[^<]*)', page))
    assert shown["Postgres"] == 'bad">no data'
    assert shown["Redis"] == 'bad">away'
    assert shown["Public name"] == 'good">answers'
    # Two samples 15 seconds apart, and one 35 later: the line is interrupted.
    lines = re.findall(r'<path d="([^"]*)"', page)
    assert lines
    assert {re.sub(r"[^ML]", "", line) for line in lines} == {"MLM"}


def test_labels_and_annotations_are_text(answers: Answers) -> None:
    """They come from rules and scrapes, which others may write."""
    answers.alerts = [WATCHDOG, alert("Down", "critical", 60, summary="<img src=x onerror=document.title=1>", runbook_url="javascript:alert(1)")]
    page = chromium.dom(answers.address)
    assert "<img" not in page
    assert "javascript:" not in page
    assert verdict(page)[0] == "&lt;img src=x onerror=document.title=1&gt;"


def test_the_page_knows_every_dashboard() -> None:
    names = re.search(r"const DASHBOARDS = \{(.*)\}", (FILES / "page" / "page.js").read_text())
    assert names
    assert set(re.findall(r'"?([\w-]+)"?: "', names[1])) == {path.stem for path in promql.DASHBOARDS}


def test_a_unit_that_the_page_cannot_show_is_noticed() -> None:
    known = set(re.findall(r'unit === "(\w+)"', (FILES / "page" / "page.js").read_text())) | {"short"}
    assert {panel["fieldConfig"]["defaults"]["unit"] for path in promql.DASHBOARDS for panel in promql.panels(path)} <= known


def test_everything_that_the_page_loads_is_put_beside_it() -> None:
    tasks = (promql.ROLE / "tasks" / "configure.yml").read_text()
    written = set(re.findall(r"config/prometheus/page/(\S+)\"", tasks))
    assert written == {path.name for path in (FILES / "page").iterdir()} | {f"dashboards/{path.name}" for path in promql.DASHBOARDS}
