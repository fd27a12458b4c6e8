"""The alert rules, rendered with the role's defaults, against promtool; and promtool's tests against broken rules."""

from __future__ import annotations

import copy
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
ROLE = HERE.parent.parent / "roles" / "monitoring"
RULE_TESTS = sorted(HERE.glob("*.test.yml"))
RUNBOOK = HERE.parent.parent / "docs" / "runbook.md"
DASHBOARDS = sorted((ROLE / "files" / "dashboards").glob("*.json"))
# What promtool's tests must notice: alert, the part of its rule that is broken, what stands there, what it becomes.
# Each alert has one change that keeps it silent when it must fire, and one that makes it fire when it must be silent.
BROKEN = [
    ("AgentErrorsHigh", "expr", "> 0.05", "> 0.11"),
    ("AgentErrorsHigh", "expr", "> 0.05", "> 0.039"),
    ("AgentErrorsHigh", "expr", 'status=~"5.."', 'status=~"[45].."'),
    ("AgentErrorsHigh", "expr", 'route=~"/chat(/stream)?|', 'route=~".*|'),
    (
        "AgentErrorsHigh",
        "expr",
        "/chat(/stream)?|/openai/v1/(chat/completions|responses)|/runs/batch|(/threads/[{]thread_id[}])?/runs(/stream|/wait)?",
        "/chat.*",
    ),
    ("AgentErrorsHigh", "expr", "> 2.5", "> 0.5"),
    ("AgentNotReady", "expr", "== 0", "== 2"),
    ("AgentNotReady", "expr", " unless on () agent_stack_swap_under_way == 1", ""),
    ("AgentNotReady", "for", "45s", "15s"),
    ("AgentWaitsForConnections", "expr", "> 0", "> 3"),
    ("AgentWaitsForConnections", "expr", '{state="wanted"}', ""),
    ("AgentWaitsForConnections", "for", "1m", "15s"),
    ("AvailabilityBurnsFast", "expr", "14.4", "30"),
    ("AvailabilityBurnsFast", "expr", "14.4", "9"),
    ("AvailabilityBurnsFast", "expr", "> 9.5", "> 3"),
    ("AvailabilityBurnsSlowly", "expr", "> 6 *", "> 9 *"),
    ("AvailabilityBurnsSlowly", "expr", "> 6 *", "> 4 *"),
    ("BackupFailed", "expr", "[1h]", "[30m]"),
    ("BackupFailed", "expr", "[1h]", "[2h]"),
    ("BackupNotTried", "expr", "15 * 86400", "16 * 86400"),
    ("BackupNotTried", "expr", "15 * 86400", "14 * 86400"),
    ("BackupNotTried", "expr", "== 0", "== 2"),
    ("BackupNotTried", "expr", " != 0", ""),
    ("BackupTooOld", "expr", "2 * 86400", "3 * 86400"),
    ("BackupTooOld", "expr", "2 * 86400", "1 * 86400"),
    ("BackupTooOld", "expr", "time() - max", "time() - min"),
    ("BackupTooOld", "expr", "max(agent_stack_backup_repository_up)", "max(agent_stack_backup_repository_up == 0)"),
    ("BackupTooOld", "expr", " unless max(agent_stack_backup_last_timestamp_seconds)", ""),
    ("BackupTooOld", "for", "30m", "5m"),
    ("BackupUnknown", "expr", "> 3600", "> 7200"),
    ("BackupUnknown", "expr", "> 3600", "> 1800"),
    ("BackupUnknown", "expr", "/backup[.]prom", "[.]prom"),
    ("BackupWalWaits", "expr", "> 600", "> 800"),
    ("BackupWalWaits", "expr", "> 600", "> 500"),
    ("CertificateEndsSoon", "expr", "< 14", "< 12"),
    ("CertificateEndsSoon", "expr", "< 14", "< 16"),
    ("ClockOff", "expr", "== 0", "== 2"),
    ("ClockOff", "expr", "and max_over_time(node_timex_sync_status[1d]) == 1", ""),
    ("ContainerRestarting", "expr", "> 2.5", "> 4"),
    ("ContainerRestarting", "expr", "> 2.5", "> 1.5"),
    ("DiskAlmostFull", "expr", "< 0.1", "< 0.08"),
    ("DiskAlmostFull", "expr", "< 0.1", "< 0.12"),
    ("DiskAlmostFull", "expr", "tmpfs|ramfs", "ramfs"),
    ("DiskAlmostFull", "for", "5m", "1m"),
    ("DiskFullInADay", "expr", "86400", "8640"),
    ("DiskFullInADay", "expr", "< 0.4", "< 0.9"),
    ("DiskFullInADay", "for", "30m", "10m"),
    ("GpuError", "expr", "> 0", "> 5"),
    ("GpuError", "expr", "increase(agent_stack_gpu_errors_total[10m])", "agent_stack_gpu_errors_total"),
    ("GpuHot", "expr", "> 85", "> 90"),
    ("GpuHot", "expr", "> 85", "> 84"),
    ("GpuHot", "for", "5m", "4m"),
    ("GpuLost", "expr", "max_over_time(stack:gpus:count[1d])", "0"),
    ("GpuLost", "expr", 'source="gpu"', 'source="docker"'),
    ("GpuMemoryBroken", "expr", "> 0", "> 2"),
    ("GpuMemoryBroken", "expr", "> 0", ">= 0"),
    ("GpuThrottled", "expr", "hw_thermal_slowdown|", ""),
    ("GpuThrottled", "expr", "hw_power_brake_slowdown", "sw_power_cap"),
    ("HostDown", "expr", "== 0", "== 2"),
    ("HostDown", "expr", "max by", "min by"),
    ("HostMetricsOld", "expr", "> 120", "> 600"),
    ("HostMetricsOld", "expr", ".*host.prom", ".*.prom"),
    ("HostSourceDown", "expr", "== 0", "== 2"),
    ("HostSourceDown", "expr", '{source!="gpu"}', ""),
    ("HostSourceDown", "for", "2m", "30s"),
    ("InodesAlmostFull", "expr", "< 0.1", "< 0.04"),
    ("InodesAlmostFull", "expr", "< 0.1", "< 0.11"),
    ("MemoryLow", "expr", "< 0.05", "< 0.03"),
    ("MemoryLow", "expr", "< 0.05", "< 0.06"),
    ("ModelAway", "expr", "== 0", "== 2"),
    ("ModelAway", "expr", " unless on () agent_stack_swap_under_way == 1", ""),
    ("ModelAway", "for", "40s", "15s"),
    ("ModelDown", "expr", 'job="vllm"', 'job="model"'),
    ("ModelDown", "expr", "== 0", "<= 1"),
    ("ModelDown", "for", "300s", "2m"),
    ("ModelFirstTokenSlow", "expr", "> 5", "> 8"),
    ("ModelFirstTokenSlow", "expr", "> 5", "> 4.9"),
    ("ModelFirstTokenSlow", "expr", "> 9.5", "> 4"),
    ("ModelKvCacheFull", "expr", "> 0.9", "> 0.96"),
    ("ModelKvCacheFull", "expr", "> 0.9", "> 0.89"),
    ("ModelKvCacheFull", "for", "5m", "3m"),
    ("ModelLatencyHigh", "expr", "> 5", "> 8"),
    ("ModelLatencyHigh", "expr", "> 5", "> 4.9"),
    ("ModelLatencyHigh", "for", "2m", "1m"),
    ("ModelLatencyHigh", "expr", "unless on (model_name)", "and on (model_name)"),
    ("ModelLatencyHigh", "expr", "> 9.5", "> 0.5"),
    ("ModelPreemptions", "expr", "> 10", "> 25"),
    ("ModelPreemptions", "expr", "> 10", "> 7"),
    ("ModelQueueGrows", "expr", "> 4", "> 40"),
    ("ModelQueueGrows", "expr", "> 4", "> 3"),
    ("ModelQueueGrows", "expr", ")) > 0", ")) >= 0"),
    ("ModelStalled", "expr", "== 0", "== 100"),
    ("ModelStalled", "expr", "or sum(haproxy_server_current_sessions", "and sum(haproxy_server_current_sessions"),
    ("ModelStalled", "expr", ', server!="hold"', ""),
    ("ModelStalled", "expr", "[1m]", "[20s]"),
    ("ModelStuck", "expr", "[1h]", "[30m]"),
    ("ModelStuck", "expr", "[1h]", "[2h]"),
    ("ModelStuckForGood", "expr", "> 0", "> 100"),
    ("ModelStuckForGood", "expr", "[10m]", "[30m]"),
    ("ModelSwapCutOff", "expr", "[1h]", "[1m]"),
    ("ModelSwapCutOff", "expr", "[1h]", "[2h]"),
    ("ModelSwapFailed", "expr", "[1h]", "[1m]"),
    ("ModelSwapFailed", "expr", '{result="failed"}', ""),
    ("ModelTokensSlow", "expr", "> 0.5", "> 0.7"),
    ("ModelTokensSlow", "expr", "> 0.5", "> 0.49"),
    ("ModelTokensSlow", "expr", "> 99.5", "> 40"),
    ("NotificationsFail", "expr", "> 0", "> 1"),
    ("NotificationsFail", "expr", "> 0", ">= 0"),
    ("OutOfMemoryKill", "expr", "> 0", "> 5"),
    ("OutOfMemoryKill", "expr", "increase(node_vmstat_oom_kill[10m])", "node_vmstat_oom_kill"),
    ("PostgresConnections", "expr", "> 0.8", "> 0.9"),
    ("PostgresConnections", "expr", "> 0.8", "> 0.79"),
    ("PostgresDown", "expr", "pg_up", "redis_up"),
    ("PostgresDown", "expr", "== 0", "<= 1"),
    ("PostgresDown", "for", "30s", "15s"),
    ("PostgresGrowsFast", "expr", "> 2 *", "> 200 *"),
    ("PostgresGrowsFast", "expr", "> 1e9", "> 1e6"),
    ("PostgresGrowsFast", "for", "1h", "5m"),
    ("PublicNameDown", "expr", "== 0", "== 2"),
    ("PublicNameDown", "expr", '{job="probe"}', ""),
    ("PublicNameDown", "for", "30s", "15s"),
    ("RateLimitStorm", "expr", "> 1 and", "> 5 and"),
    ("RateLimitStorm", "expr", "> 1 and", "> 0 and"),
    ("RateLimitStorm", "expr", "> 0.5", "> 0.3"),
    ("RedisDown", "expr", "redis_up", "pg_up"),
    ("RedisDown", "expr", "== 0", "<= 1"),
    ("RedisDown", "for", "30s", "15s"),
    ("RedisMemoryFull", "expr", "> 0.9", "> 0.96"),
    ("RedisMemoryFull", "expr", "> 0.9", "> 0.89"),
    ("RedisMemoryFull", "expr", "(redis_memory_max_bytes > 0)", "redis_memory_max_bytes"),
    ("RulesFail", "expr", "> 0", "> 100"),
    ("RulesFail", "expr", "> 0", ">= 0"),
    ("TargetDown", "expr", "== 0", "== 2"),
    ("TargetDown", "expr", "== 0", "<= 1"),
    ("TargetDown", "expr", 'job!="vllm"', 'job!="model"'),
    ("TargetDown", "for", "40s", "15s"),
    ("TurnsFail", "expr", "> 0.05", "> 0.11"),
    ("TurnsFail", "expr", "> 0.05", "> 0.01"),
    ("TurnsFail", "expr", "> 2.5", "> 1"),
    ("TurnsFail", "expr", "model_failed|", "cancelled|"),
    ("UnitFailed", "expr", "== 1", "== 2"),
    ("UnitFailed", "for", "1m", "15s"),
    ("Watchdog", "expr", "vector(1)", "vector(1) > 1"),
]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rule file as Ansible's own template module writes it."""
    rendered = tmp_path_factory.mktemp("rendered") / "rules.yml"
    arguments = f"src={ROLE / 'templates' / 'rules.yml.j2'} dest={rendered}"
    command = [str(Path(sys.executable).with_name("ansible")), "localhost", "-c", "local", "-m", "ansible.builtin.template", "-a", arguments]
    subprocess.run([*command, "-e", f"@{ROLE / 'defaults' / 'main.yml'}"], check=True, capture_output=True, timeout=120)
    loaded: dict[str, Any] = yaml.safe_load(rendered.read_text())
    return loaded


def alerts(rules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule}


def cases() -> list[tuple[Path, dict[str, Any]]]:
    """Every test of every file, as texts: what looks like a number (`0x40`) is none."""
    loaded = [(path, yaml.load(path.read_text(), Loader=yaml.BaseLoader)) for path in RULE_TESTS]  # noqa: S506  the loader that makes only texts
    return [(path, {**document, "tests": [case]}) for path, document in loaded for case in document["tests"]]


def named(document: dict[str, Any]) -> set[str]:
    return {step["alertname"] for step in document["tests"][0]["alert_rule_test"]}


def run_rule_tests(rules: dict[str, Any], directory: Path, alert: str) -> subprocess.CompletedProcess[str]:
    """promtool's tests that name this alert, with the rules that they name and those that these use: all of them would take minutes."""
    documents = [document for _, document in cases() if alert in named(document)]
    needed = set().union(*map(named, documents))
    asked = " ".join(rule["expr"] for name, rule in alerts(rules).items() if name in needed)
    groups = [
        {**group, "rules": [rule for rule in group["rules"] if rule.get("alert") in needed or ("record" in rule and rule["record"] in asked)]}
        for group in rules["groups"]
    ]
    (directory / "rules.yml").write_text(yaml.safe_dump({"groups": [group for group in groups if group["rules"]]}))
    files = []
    for number, interval in enumerate(sorted({document["evaluation_interval"] for document in documents})):
        tests = [document["tests"][0] for document in documents if document["evaluation_interval"] == interval]
        files.append(directory / f"{number}.test.yml")
        files[-1].write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": interval, "tests": tests}))
    return promtool("test", "rules", *files)


ALERTS = sorted({name for _, document in cases() for name in named(document)})


@pytest.mark.parametrize("alert", ALERTS)
def test_rules_pass(rules: dict[str, Any], tmp_path: Path, alert: str) -> None:
    result = run_rule_tests(rules, tmp_path, alert)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_are_valid(rules: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    check = promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yml")
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_alert_fires_is_silent_and_clears(rules: dict[str, Any]) -> None:
    """Each has a test in which it fires and clears, and one in which it never fires. The heartbeat always fires."""
    fires, clears, silent = set(), set(), set()
    for _, document in cases():
        steps = document["tests"][0]["alert_rule_test"]
        for alert in named(document):
            firing = [bool(step.get("exp_alerts")) for step in steps if step["alertname"] == alert]
            fires |= {alert} if any(firing) else set()
            silent |= {alert} if not any(firing) else set()
            clears |= {alert} if any(before and not after for before, after in itertools.pairwise(firing)) else set()
    wanted = set(alerts(rules))
    assert fires == wanted
    assert wanted - clears == {"Watchdog"}
    assert wanted - silent == {"Watchdog"}


def test_every_alert_has_its_place_in_the_runbook(rules: dict[str, Any]) -> None:
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", RUNBOOK.read_text(), flags=re.MULTILINE | re.DOTALL))
    assert set(sections) == set(alerts(rules))
    for name, rule in alerts(rules).items():
        assert rule["annotations"]["runbook_url"].endswith(f"/docs/runbook.md#{name.lower()}")
        assert re.findall(r"^- \*\*(\w+)\*\*: \S", sections[name], flags=re.MULTILINE) == ["Means", "See", "Mend", "Sure"], name


def test_what_must_be_seen_within_a_minute_is(rules: dict[str, Any]) -> None:
    """15 seconds until it is read, 5 until it is judged, and 40 of patience; what heals within 30 seconds is nobody's affair."""
    for name in ("PublicNameDown", "PostgresDown", "RedisDown", "TargetDown", "HostDown", "ModelAway"):
        assert 30 <= int(alerts(rules)[name]["for"].removesuffix("s")) <= 40, name


def test_every_alert_says_what_to_do(rules: dict[str, Any]) -> None:
    for name, rule in alerts(rules).items():
        assert rule["labels"]["severity"] in {"critical", "warning", "none"}, name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert re.fullmatch(r"\d+[smh]", rule["for"]), name


def test_every_alert_is_broken_below(rules: dict[str, Any]) -> None:
    assert {alert for alert, *_ in BROKEN} == set(alerts(rules))


@pytest.mark.parametrize(("alert", "part", "old", "new"), BROKEN)
def test_a_broken_rule_is_noticed(rules: dict[str, Any], tmp_path: Path, alert: str, part: str, old: str, new: str) -> None:
    broken = copy.deepcopy(rules)
    rule = alerts(broken)[alert]
    assert old in rule[part]
    rule[part] = rule[part].replace(old, new)
    result = run_rule_tests(broken, tmp_path, alert)
    assert result.returncode != 0
    assert f"alertname: {alert}" in result.stdout + result.stderr


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_expressions_parse(tmp_path: Path, dashboard: Path) -> None:
    panels = json.loads(dashboard.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    records = [{"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "1m")} for number, text in enumerate(expressions)]
    rule_file = tmp_path / "panels.yml"
    rule_file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    check = promtool("check", "rules", "--lint=none", rule_file)
    assert check.returncode == 0, check.stdout + check.stderr
