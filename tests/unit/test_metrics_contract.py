"""Rules and dashboards name only metrics and labels that exist: vLLM renames its own now and then, and an empty panel raises no error.

The contract (roles/monitoring/files/metrics.yml) lists each of them. Rules and dashboards are held to it here, and it to recorded scrapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import promql
import pytest
from programs import ROOT

DASHBOARD = ROOT / "roles" / "monitoring" / "files" / "dashboards" / "agent-stack.json"
WATCHDOG = ROOT / "roles" / "vllm" / "files" / "watchdog.py"
SCRAPES = Path(__file__).parent / "data" / "scrapes"
VLLM_METRICS = Path(__file__).parent / "data" / "vllm_metrics.txt"
AGENT_METRICS = ROOT / "files" / "agent" / "src" / "agent" / "metrics.py"

SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}


def rule_expressions() -> list[str]:
    return [rule["expr"] for rule in promql.rules()]


def dashboard_expressions() -> list[str]:
    return [expression for path in promql.DASHBOARDS for _, expression in promql.panel_expressions(path)]


def metrics_in(expressions: list[str], prefix: str) -> set[str]:
    # Outside quotes: a job or a container may be called like a metric.
    return {name for text in expressions for name in re.findall(rf"(?<![\w:]){prefix}\w+", promql.TEXT.sub("", text))}


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
    used = metrics_in(rule_expressions(), "agent_stack_vllm_watchdog_")
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


@pytest.mark.parametrize("path", promql.DASHBOARDS, ids=lambda path: path.stem)
def test_panels_ask_the_provisioned_data_source(path: Path) -> None:
    panels = promql.panels(path)
    assert {source["uid"] for panel in panels for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"]))} == {"prometheus"}
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"] for panel in panels)
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in json.loads(path.read_text())["panels"]]
    assert not [(one, other) for one in places for other in places if one < other and overlap(one, other)]


def overlap(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    (x, y, w, h), (a, b, c, d) = one, other
    return x < a + c and a < x + w and y < b + d and b < y + h


def test_every_dashboard_is_another_one() -> None:
    documents = [json.loads(path.read_text()) for path in promql.DASHBOARDS]
    assert len({document["uid"] for document in documents}) == len({document["title"] for document in documents}) == len(documents) == 5
    installed = (ROOT / "roles" / "monitoring" / "tasks" / "grafana.yml").read_text()
    assert set(re.findall(r"lookup\('ansible.builtin.file', 'dashboards/([\w-]+)\.json'", installed)) == {path.stem for path in promql.DASHBOARDS}


# The contract.

Expressions = list[tuple[str, str]]
CONTRACT = promql.contract()


def expressions() -> Expressions:
    """Every expression, with where it stands."""
    in_rules = [(rule.get("alert", rule.get("record", "")), rule["expr"]) for rule in promql.rules()]
    return in_rules + [(f"{path.stem}: {title}", text) for path in promql.DASHBOARDS for title, text in promql.panel_expressions(path)]


def faults(given: Expressions) -> list[str]:
    """What the expressions name that the contract does not have."""
    recorded = {rule["record"]: set(rule.get("labels", {})) for rule in promql.rules() if "record" in rule}
    found = []
    for where, expression in given:
        asked, known = promql.asked(expression), set(promql.EVERYWHERE)
        for name, labels in asked.metrics.items():
            exported = promql.exported(name, CONTRACT)
            if name not in recorded and exported is None:
                found.append(f"{where}: no metric {name}")
                continue
            has = recorded[name] if exported is None else set(CONTRACT[exported]["labels"])
            known |= has
            found += [f"{where}: {name} has no label {label}" for label in sorted(labels - has - promql.EVERYWHERE)]
        found += [f"{where}: no metric has the label {label}" for label in sorted(asked.grouped - known)]
    return found


def test_rules_and_dashboards_keep_to_the_contract() -> None:
    assert faults(expressions()) == []


def test_nothing_in_the_contract_is_unused() -> None:
    used = {promql.exported(name, CONTRACT) for _, text in expressions() for name in promql.asked(text).metrics}
    assert set(CONTRACT) - used == set()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("rate(agent_turns_totals[5m]) > 0", "no metric agent_turns_totals"),
        ("agent_turn_duration_seconds > 1", "no metric agent_turn_duration_seconds"),
        ('sum(agent_runs{state="pending"})', "agent_runs has no label state"),
        ('up{job="vllm"} == 0 and on () vllm:num_requests', "no metric vllm:num_requests"),
        ("sum by (model) (vllm:num_requests_running)", "no metric has the label model"),
        ("pg_up / on (datname) group_left (server) redis_up", "no metric has the label datname"),
        ("histogram_quantile(0.9, sum by (le) (rate(agent_first_token_bucket[5m])))", "no metric agent_first_token_bucket"),
    ],
)
def test_what_the_contract_does_not_have_is_noticed(expression: str, words: str) -> None:
    assert f"here: {words}" in faults([("here", expression)])


@pytest.mark.parametrize("name", CONTRACT)
def test_an_entry_is_whole(name: str) -> None:
    entry = CONTRACT[name]
    assert entry.keys() == {"exporter", "type", "labels", "unit", "meaning"}
    assert entry["type"] in promql.SUFFIXES
    assert entry["unit"]
    assert entry["meaning"].endswith(".")
    # OpenMetrics would refuse a counter without it. Prometheus' exporters of other programs have a few.
    if entry["exporter"] in {"agent", "backup", "host", "watchdog"}:
        assert (entry["type"] == "counter") == name.endswith("_total")


LABELS_IN_TEXT = re.compile(r"\$labels\.(\w+)")


def test_texts_name_labels_that_the_alert_has() -> None:
    for rule in promql.rules():
        if "alert" not in rule:
            continue
        asked = promql.asked(rule["expr"])
        known = asked.grouped | promql.EVERYWHERE
        for name in asked.metrics:
            exported = promql.exported(name, CONTRACT)
            known |= set(CONTRACT[exported]["labels"]) if exported else {"kind"}
        named = {label for text in rule["annotations"].values() for label in LABELS_IN_TEXT.findall(text)}
        assert named <= known, rule["alert"]
        assert "$value" in rule["annotations"]["description"] or not re.search(r"[<>]", promql.TEXT.sub("", rule["expr"]).replace("> 0", "")), rule["alert"]


# Recorded scrapes.


def families(text: str) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, flags=re.MULTILINE))
    found: dict[str, tuple[str, set[str]]] = {name: (kind, set()) for name, kind in kinds.items()}
    for name, labels in re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? \S+$", text, flags=re.MULTILINE):
        base = name if name in kinds else re.sub(r"_(bucket|count|sum)$", "", name)
        found.setdefault(base, ("untyped", set()))[1].update(re.findall(r'(\w+)="', labels))
    return found


RECORDED = sorted({entry["exporter"] for entry in CONTRACT.values()} - {"prometheus", "alertmanager"})


@pytest.mark.parametrize("exporter", RECORDED)
def test_the_contract_is_what_was_recorded(exporter: str) -> None:
    found = families((SCRAPES / f"{exporter}.txt").read_text())
    for name, entry in CONTRACT.items():
        if entry["exporter"] == exporter:
            assert name in found, f"{exporter} exports no {name}"
            assert found[name][0] == entry["type"], name
            assert found[name][1] >= set(entry["labels"]), name
