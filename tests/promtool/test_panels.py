"""Every panel of every dashboard has data in a real Prometheus that reads recorded scrapes, with the role's rules. An empty panel raises no error."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

import chromium  # noqa: E402
import promql  # noqa: E402

SCRAPES = ROOT / "tests" / "unit" / "data" / "scrapes"
# What each job's target serves, of the recorded scrapes.
SERVED = {
    "agent": ["agent"],
    "gateway": ["gateway"],
    "node": ["node", "host", "watchdog"],
    "postgres": ["postgres"],
    "probe": ["blackbox"],
    "redis": ["redis"],
    "vllm": ["vllm"],
}
# Messages that failed are counted by Alertmanager itself, from the first one on.
FAILED = '# TYPE alertmanager_notifications_failed_total counter\nalertmanager_notifications_failed_total{integration="webhook"} 0\n'
# What may be empty while all is well.
EMPTY_BY_NATURE = {"annotation Alerts", "annotation Swaps"}


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked did not wait for the answer, and asks again."""


class Targets(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        job = self.path.strip("/")
        text = FAILED if job == "alertmanager" else "".join((SCRAPES / f"{name}.txt").read_text() for name in SERVED[job])
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        text = expression.replace("$__rate_interval", "1m")
        with urllib.request.urlopen(f"{self.url}/api/v1/query?query={quote(text)}", timeout=30) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result

    def has_data(self, expression: str, seconds: float = 30) -> bool:
        """Whether there is some, now or after the next scrapes."""
        deadline = time.monotonic() + seconds
        while not (found := bool(self.query(expression))) and time.monotonic() < deadline:
            time.sleep(1)
        return found


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    groups = [{"name": "all", "rules": promql.rules()}]
    (directory / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    address = f"127.0.0.1:{free_port()}"
    with Server(("127.0.0.1", 0), Targets) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        jobs = [
            {"job_name": job, "metrics_path": f"/{job}", "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}]}
            for job in [*SERVED, "alertmanager"]
        ]
        own = {"job_name": "prometheus", "static_configs": [{"targets": [address]}]}
        # Not shorter: a scrape that is late on a busy machine ends every series of its target until the next one.
        config = {"global": {"scrape_interval": "4s", "evaluation_interval": "4s"}, "rule_files": ["rules.yml"], "scrape_configs": [*jobs, own]}
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        page = directory / "page"
        shutil.copytree(promql.ROLE / "files" / "page", page)
        shutil.copytree(promql.ROLE / "files" / "dashboards", page / "dashboards")
        flags = [
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={address}",
            f"--web.user-assets={page}",
        ]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log)
        found = Prometheus(f"http://{address}")
        try:
            deadline = time.monotonic() + 120
            # Three scrapes of each, so that rates have something to compare, and the rules were evaluated on them.
            while not ready(found):
                assert process.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < deadline, (directory / "log").read_text()
                time.sleep(0.5)
            yield found
        finally:
            process.kill()
            process.wait()
            server.shutdown()


def ready(prometheus: Prometheus) -> bool:
    try:
        scraped = prometheus.query("count_over_time(up[5m]) >= 3 and up == 1")
        return len(scraped) == len(SERVED) + 2 and bool(prometheus.query('count_over_time(agent:failures:increase1h{kind="turn"}[5m]) >= 3'))
    except OSError:
        return False


PANELS = [(path.stem, title, text) for path in promql.DASHBOARDS for title, text in promql.panel_expressions(path)]


@pytest.mark.parametrize(("dashboard", "title", "expression"), PANELS, ids=lambda value: re.sub(r"\W+", "-", value)[:40])
def test_a_panel_has_data(prometheus: Prometheus, dashboard: str, title: str, expression: str) -> None:
    assert title in EMPTY_BY_NATURE or prometheus.has_data(expression), f"{dashboard}: {title}"


def test_a_panel_that_asks_for_nothing_is_noticed(prometheus: Prometheus) -> None:
    assert prometheus.query("sum(rate(vllm:generation_tokens[$__rate_interval]))") == []


@pytest.mark.parametrize("path", promql.DASHBOARDS, ids=lambda path: path.stem)
def test_the_page_draws_every_panel(prometheus: Prometheus, path: Path) -> None:
    """Without Grafana, from the same files."""
    page = chromium.dom(f"{prometheus.url}/user/?dashboard={path.stem}")
    drawn = [part.removeprefix("<h3>").partition("</h3>")[::2] for part in page.split('<div class="panel">')[1:]]
    assert [title for title, _ in drawn] == [panel["title"] for panel in promql.panels(path)]
    assert [title for title, body in drawn if "no data" in body or "Prometheus says" in body] == []
    pictures = sum("<svg" in body or "nothing to measure" in body for _, body in drawn)
    assert pictures == sum(panel["type"] == "timeseries" for panel in promql.panels(path))
    assert "<svg" in page


def test_no_rule_fails(prometheus: Prometheus) -> None:
    """On everything at once, as two series where one is expected are seen only then."""
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/rules", timeout=30) as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
    assert len(rules) == len(promql.rules())
