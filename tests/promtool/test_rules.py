"""The alert rules, rendered with the role's defaults, against promtool; and promtool's tests against broken rules."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
ROLE = HERE.parent.parent / "roles" / "monitoring"
RULE_TESTS = HERE / "rules.test.yml"
# What promtool's tests must notice: alert, the part of its rule that is broken, what stands there, what it becomes.
# Each alert has one change that keeps it silent when it must fire, and one that makes it fire when it must be silent.
BROKEN = [
    ("AgentErrorsHigh", "expr", "> 0.05", "> 0.11"),
    ("AgentErrorsHigh", "expr", "> 0.05", "> 0.039"),
    ("AgentErrorsHigh", "expr", 'status=~"5.."', 'status=~"[45].."'),
    ("AgentErrorsHigh", "expr", 'route=~"/chat.*"', 'route=~".*"'),
    ("BackupFailed", "expr", "[1h]", "[30m]"),
    ("BackupFailed", "expr", "[1h]", "[2h]"),
    ("BackupNotTried", "expr", "15 * 86400", "16 * 86400"),
    ("BackupNotTried", "expr", "15 * 86400", "14 * 86400"),
    ("BackupNotTried", "expr", "+ 1 >", "+ 0 >"),
    ("BackupTooOld", "expr", "2 * 86400", "3 * 86400"),
    ("BackupTooOld", "expr", "agent_stack_backup_repository_up", "agent_stack_backup_repository"),
    ("BackupTooOld", "for", "30m", "5m"),
    ("BackupUnknown", "expr", "backup[.]prom", "backups[.]prom"),
    ("BackupUnknown", "expr", "backup[.]prom", ".*[.]prom"),
    ("BackupWalWaits", "expr", "> 600", "> 800"),
    ("BackupWalWaits", "expr", "> 600", "> 500"),
    ("DiskAlmostFull", "expr", "< 0.1", "< 0.08"),
    ("DiskAlmostFull", "expr", "< 0.1", "< 0.12"),
    ("DiskAlmostFull", "expr", "tmpfs|ramfs", "ramfs"),
    ("DiskAlmostFull", "for", "5m", "1m"),
    ("ModelDown", "expr", 'job="vllm"', 'job="model"'),
    ("ModelDown", "expr", "== 0", "<= 1"),
    ("ModelDown", "for", "300s", "2m"),
    ("ModelKvCacheFull", "expr", "> 0.9", "> 0.96"),
    ("ModelKvCacheFull", "expr", "> 0.9", "> 0.89"),
    ("ModelKvCacheFull", "for", "5m", "3m"),
    ("ModelLatencyHigh", "expr", "> 5", "> 8"),
    ("ModelLatencyHigh", "expr", "> 5", "> 4.9"),
    ("ModelLatencyHigh", "for", "2m", "1m"),
    ("ModelStuck", "expr", "[1h]", "[30m]"),
    ("ModelStuck", "expr", "[1h]", "[2h]"),
    ("ModelStuckForGood", "expr", "> 0", "> 100"),
    ("ModelStuckForGood", "expr", "[10m]", "[30m]"),
    ("ModelSwapCutOff", "expr", "[1h]", "[1m]"),
    ("ModelSwapCutOff", "expr", "[1h]", "[2h]"),
    ("PostgresDown", "expr", "pg_up", "redis_up"),
    ("PostgresDown", "expr", "== 0", "<= 1"),
    ("PostgresDown", "for", "1m", "15s"),
    ("RedisDown", "expr", "redis_up", "pg_up"),
    ("RedisDown", "expr", "== 0", "<= 1"),
    ("RedisDown", "for", "1m", "15s"),
    ("TargetDown", "expr", "== 0", "== 2"),
    ("TargetDown", "expr", "== 0", "<= 1"),
    ("TargetDown", "expr", 'job!="vllm"', 'job!="model"'),
    ("TargetDown", "for", "2m", "30s"),
    ("Watchdog", "expr", "vector(1)", "vector(1) > 1"),
]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rule file as Ansible's own template module writes it."""
    rendered = tmp_path_factory.mktemp("rendered") / "rules.yml"
    arguments = f"src={ROLE / 'templates' / 'rules.yml.j2'} dest={rendered}"
    command = [str(Path(sys.executable).with_name("ansible")), "localhost", "-c", "local", "-m", "ansible.builtin.template", "-a", arguments]
    subprocess.run([*command, "-e", f"@{ROLE / 'defaults' / 'main.yml'}"], check=True, capture_output=True, timeout=120)
    loaded: dict[str, Any] = yaml.safe_load(rendered.read_text())
    return loaded


def run_rule_tests(rules: dict[str, Any], directory: Path) -> subprocess.CompletedProcess[str]:
    (directory / "rules.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(RULE_TESTS, directory)
    return promtool("test", "rules", directory / RULE_TESTS.name)


def test_rules_pass(rules: dict[str, Any], tmp_path: Path) -> None:
    result = run_rule_tests(rules, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    check = promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yml")
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_alert_says_what_to_do(rules: dict[str, Any]) -> None:
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert rule["labels"]["severity"] in {"critical", "warning", "none"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_every_alert_is_broken_below(rules: dict[str, Any]) -> None:
    assert {alert for alert, *_ in BROKEN} == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}


@pytest.mark.parametrize(("alert", "part", "old", "new"), BROKEN)
def test_a_broken_rule_is_noticed(rules: dict[str, Any], tmp_path: Path, alert: str, part: str, old: str, new: str) -> None:
    broken = copy.deepcopy(rules)
    [rule] = [rule for group in broken["groups"] for rule in group["rules"] if rule["alert"] == alert]
    assert old in rule[part]
    rule[part] = rule[part].replace(old, new)
    result = run_rule_tests(broken, tmp_path)
    assert result.returncode != 0
    assert f"alertname: {alert}" in result.stdout + result.stderr


def test_dashboard_expressions_parse(tmp_path: Path) -> None:
    dashboard = json.loads((ROLE / "files" / "dashboards" / "agent-stack.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    records = [{"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "1m")} for number, text in enumerate(expressions)]
    rule_file = tmp_path / "panels.yml"
    rule_file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    check = promtool("check", "rules", "--lint=none", rule_file)
    assert check.returncode == 0, check.stdout + check.stderr
