"""The metric contract of the role `monitoring` against real scrapes: of the service, and of the exporters of Postgres and Redis.

RECORD_SCRAPES=1 writes them down for the tests of the dashboards, without what the contract does not have.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from servers import AGENT, Agent, Postgres, Process, Redis, find_program, wait_until

ROOT = AGENT.parents[1]
CONTRACT: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "roles" / "monitoring" / "files" / "metrics.yml").read_text())
SCRAPES = ROOT / "tests" / "unit" / "data" / "scrapes"


class Exporter(Process):
    """One of Debian's exporters."""

    def __init__(self, program: str, *arguments: str, **environment: str) -> None:
        super().__init__()
        self.arguments = [find_program(f"prometheus-{program}-exporter", f"prometheus-{program}-exporter"), *arguments]
        self.environment = environment
        self.start()

    def command(self) -> list[str]:
        return [*self.arguments, f"--web.listen-address=127.0.0.1:{self.port}"]

    def options(self) -> dict[str, Any]:
        return {"env": {**os.environ, **self.environment}, "cwd": self.directory}

    def answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=20).status_code == 200
        except httpx.TransportError:
            return False

    def scrape(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=20).text


class OpenRedis(Process):
    """Without users, because the exporter's rights are the affair of the role `redis`."""

    def command(self) -> list[str]:
        return [find_program("redis-server", "redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", ""]

    answers = Redis.answers


@pytest.fixture
def running() -> Iterator[Callable[[Process], Any]]:
    started: list[Process] = []

    def add(process: Process) -> Any:
        started.append(process)
        return process

    yield add
    for process in reversed(started):
        process.remove()


def families(text: str) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric, by the name that the contract has."""
    found = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" and f"\n{family.name}_total" in f"\n{text}" else "")
        labels = set().union(*(set(sample.labels) for sample in family.samples)) if family.samples else set()
        found[name] = (family.type, labels - {"le"})
    return found


def compare(exporter: str, text: str) -> None:
    wanted = {name: metric for name, metric in CONTRACT.items() if metric["exporter"] == exporter}
    assert wanted
    found = families(text)
    for name, metric in wanted.items():
        assert name in found, f"{exporter} exports no {name}"
        kind, labels = found[name]
        assert kind == metric["type"], name
        assert labels >= set(metric["labels"]), name
    if os.environ.get("RECORD_SCRAPES"):
        names = "|".join(re.escape(name) for name in wanted)
        kept = [line for line in text.splitlines() if re.match(rf"(# (HELP|TYPE) )?({names})(_bucket|_count|_sum)?([ {{]|$)", line)]
        SCRAPES.mkdir(exist_ok=True)
        (SCRAPES / f"{exporter}.txt").write_text("\n".join(kept) + "\n")


def test_the_agents_metrics_are_the_contracts(start_agent: Callable[..., Agent]) -> None:
    """After one turn of each kind, so that there are samples of all."""
    service = start_agent()
    service.chat('[[tool calculator {"expression": "6*7"}]]')
    service.client.post("/chat/stream", json={"message": "hello"})
    for line in ('\nagent_runs{status="pending"}', '\nagent_postgres_connections{state="idle"}'):
        wait_until(lambda line=line: line in service.client.get("/metrics").text, line, 15)
    compare("agent", service.client.get("/metrics").text)


def test_the_exporter_of_postgres_says_what_the_contract_says(postgres: Postgres, running: Callable[[Process], Any]) -> None:
    address = f"postgresql:///postgres?host={postgres.directory}&port={postgres.port}&user=postgres&sslmode=disable"
    compare("postgres", running(Exporter("postgres", DATA_SOURCE_NAME=address)).scrape())


def test_the_exporter_of_redis_says_what_the_contract_says(running: Callable[[Process], Any]) -> None:
    server = running(OpenRedis())
    server.start()
    compare("redis", running(Exporter("redis", f"--redis.addr=redis://127.0.0.1:{server.port}")).scrape())


@pytest.mark.parametrize("wrong", ["postgres", "agent"])
def test_a_scrape_that_lacks_a_metric_is_noticed(wrong: str) -> None:
    with pytest.raises(AssertionError, match="exports no"):
        compare(wrong, "# TYPE other gauge\nother 1\n")
