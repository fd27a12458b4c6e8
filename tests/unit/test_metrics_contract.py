"""Rules and dashboard name only metrics that exist: vLLM renames its own now and then, and an empty panel raises no error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from programs import load

backup = load("roles/postgres/files/backup.py")
ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "roles" / "monitoring" / "templates" / "rules.yml.j2"
DASHBOARD = ROOT / "roles" / "monitoring" / "files" / "dashboards" / "agent-stack.json"
WATCHDOG = Path(__file__).resolve().parents[2] / "roles" / "vllm" / "files" / "watchdog.py"
VLLM_METRICS = Path(__file__).parent / "data" / "vllm_metrics.txt"
AGENT_METRICS = ROOT / "files" / "agent" / "src" / "agent" / "metrics.py"

SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}


def rule_expressions() -> list[str]:
    rules = yaml.safe_load(RULES.read_text().replace("[[", "").replace("]]", "").replace(" ansible_managed | comment", ""))
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", [])]


def metrics_in(expressions: list[str], prefix: str) -> set[str]:
    return {name for text in expressions for name in re.findall(rf"(?<![\w:]){prefix}\w+", text)}


def vllm_metrics() -> set[str]:
    return {line for line in VLLM_METRICS.read_text().splitlines() if not line.startswith("#")}


def agent_metrics() -> set[str]:
    declared = re.findall(r"\b(Counter|Gauge|Histogram)\(\s*\"(agent_\w+)\"", AGENT_METRICS.read_text())
    return {name + suffix for kind, name in declared for suffix in SUFFIXES[kind]}


@pytest.mark.parametrize("source", [rule_expressions, dashboard_expressions])
def test_vllm_metrics_exist(source: Callable[[], list[str]]) -> None:
    used = metrics_in(source(), "vllm:")
    assert used
    assert used <= vllm_metrics()


@pytest.mark.parametrize("source", [rule_expressions, dashboard_expressions])
def test_agent_metrics_exist(source: Callable[[], list[str]]) -> None:
    used = {name for name in metrics_in(source(), "agent_") if not name.startswith("agent_stack_")}
    assert used
    assert used <= agent_metrics()


def test_the_watchdogs_metrics_exist() -> None:
    used = metrics_in(rule_expressions(), "agent_stack_vllm_")
    assert used
    assert used <= set(re.findall(r"# TYPE (agent_stack_\w+) ", WATCHDOG.read_text()))


def test_the_guides_panels_are_there() -> None:
    assert metrics_in(dashboard_expressions(), "vllm:") >= {
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:request_success_total",
        "vllm:generation_tokens_total",
    }


def test_panels_ask_the_provisioned_data_source() -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert {source["uid"] for panel in panels for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"]))} == {"prometheus"}
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_backups_metrics_exist() -> None:
    last = {"type": "full", "timestamp": {"stop": 1}, "info": {"size": 1, "repository": {"delta": 1}}}
    written = backup.exposition(backup.Repository("", True, "1", [last]), [0, 0, 0], backup.Memory())
    used = metrics_in(rule_expressions(), "agent_stack_backup_")
    assert used
    assert used <= set(re.findall(r"^(agent_stack_backup_\w+)", written, re.M))
