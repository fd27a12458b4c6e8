"""The Compose projects, units and scrape configuration that reach a server, against recorded ones.

Whatever differs recreates containers, or has systemd read its units again.

A difference that is meant is recorded with `RECORD_RENDERED=1 python -m pytest tests/unit/test_rendered.py`, and reviewed as a part of the change.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

RECORDED = Path(__file__).parent / "data" / "rendered"
# agent_stack last: its templates are what the others include.
ROLES = ("postgres", "redis", "agent", "monitoring", "agent_stack")
IMAGES = ("agent", "alertmanager", "blackbox-exporter", "grafana", "node-exporter", "postgres", "postgres-exporter", "prometheus", "redis", "redis-exporter")
SHARED: dict[str, Any] = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "agent_stack_component_revision": "0123456789ab",
    "agent_stack_domain": "agent.example.com",
    "agent_stack_image_overrides": {name: f"registry.example.com/{name}:1" for name in IMAGES},
    "agent_stack_secrets": {},
    "agent_proxy_secret": "s" * 32,
    "monitoring_grafana_password": "p" * 12,
    "postgres_backup_cipher_pass": "c" * 12,
    # Of the three services of the template.
    "job": "drill",
    "words": "restore a backup into a scratch server",
    "vllm_served_name": "agent-model",
    "vllm_tool_call_parser": "hermes",
}
HOSTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "changed": {
        "agent_stack_root": "/srv/stack",
        "agent_stack_data_dir": "/srv/data",
        "postgres_max_connections": 200,
        "postgres_memory_limit_mib": 2048,
        "postgres_backup_repository": "s3",
        "postgres_backup_s3_endpoint": "s3.example.com",
        "postgres_backup_s3_bucket": "backups",
        "postgres_backup_s3_key": "key",
        "postgres_backup_s3_key_secret": "secret",
        "redis_maxmemory_mib": 256,
        "agent_memory_limit_mib": 2048,
        "agent_model_url": "https://api.example.com/v1",
        "agent_model_api_key": "sk-x",
        "agent_model_extra_body": {"a": {"b": "$c"}},
        "agent_system_prompt": 'A "quoted" prompt, with $ and\na second line.',
        "agent_temperature": "",
        "agent_fetch_allow": ["*.example.com", "example.org"],
        "agent_mcp_servers": {"files": "http://mcp.example.com:8000/mcp"},
        "agent_tool_files": ["/srv/tools/weather.py"],
        "agent_memory_enabled": True,
        "agent_retention_schedule": "Sat 04:00",
        "monitoring_alert_receivers": [{"name": "watchdog"}],
        "monitoring_grafana_enabled": False,
    },
}
# Role and template; YAML is compared as data, a unit to the letter.
TEMPLATES = {
    "postgres.yml": ("postgres", "compose.yml.j2"),
    "redis.yml": ("redis", "compose.yml.j2"),
    "agent.yml": ("agent", "compose.yml.j2"),
    "monitoring.yml": ("monitoring", "compose.yml.j2"),
    "prometheus.yml": ("monitoring", "prometheus.yml.j2"),
    "agent-stack-host-metrics.service": ("monitoring", "host-metrics.service.j2"),
    "agent-stack@.service": ("agent_stack", "agent-stack@.service.j2"),
    "agent-stack.target": ("agent_stack", "agent-stack.target.j2"),
    "postgres-postgresql.conf": ("postgres", "postgresql.conf.j2"),
    "postgres-pgbackrest.conf": ("postgres", "pgbackrest.conf.j2"),
    "postgres-start.sh": ("postgres", "start.sh.j2"),
    "agent-stack-backup.service": ("postgres", "backup.service.j2"),
    "agent-stack-backup.timer": ("postgres", "backup.timer.j2"),
    "agent-stack-backup-drill.timer": ("postgres", "backup_drill.timer.j2"),
    "agent-stack-backup-metrics.timer": ("postgres", "backup_metrics.timer.j2"),
    "agent-stack-agent-retention.service": ("agent", "retention.service.j2"),
    "agent-stack-agent-retention.timer": ("agent", "retention.timer.j2"),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with HOST/NAME for every host and template."""
    directory = tmp_path_factory.mktemp("rendered")
    # Where a role's task finds the templates of the role agent_stack that it runs.
    (directory / "templates").symlink_to(ROOT / "roles" / "agent_stack" / "templates")
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": HOSTS, "vars": SHARED}}))
    tasks: list[dict[str, Any]] = [
        {
            "ansible.builtin.template": {
                "src": str(ROOT / "roles" / role / "templates" / template),
                "dest": f"{{{{ playbook_dir }}}}/{{{{ inventory_hostname }}}}-{name}",
                "mode": "0600",
            },
            "vars": {"role_path": str(ROOT / "roles" / role)},
        }
        for name, (role, template) in TEMPLATES.items()
    ]
    defaults: dict[str, Any] = {}
    for role in ROLES:
        defaults |= yaml.safe_load((ROOT / "roles" / role / "defaults" / "main.yml").read_text())
    # As a role's defaults are, below the inventory.
    (directory / "group_vars").mkdir()
    (directory / "group_vars" / "all.yml").write_text(yaml.safe_dump({name: value for name, value in defaults.items() if name not in SHARED}))
    files = [str(ROOT / "roles" / role / "vars" / "main.yml") for role in ROLES]
    (directory / "play.yml").write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "vars_files": files, "tasks": tasks}]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_reaches_a_server_is_what_was_recorded(rendered: Path, host: str, name: str) -> None:
    text = (rendered / f"{host}-{name}").read_text()
    if name.endswith(".yml"):
        text = json.dumps(yaml.safe_load(text), indent=1, sort_keys=True) + "\n"
    recorded = RECORDED / f"{host}-{name.removesuffix('.yml')}{'.json' if name.endswith('.yml') else ''}"
    if os.environ.get("RECORD_RENDERED"):
        recorded.write_text(text)
    assert text == recorded.read_text(), f"{recorded.name} differs; the docstring of this file says how to record it again"


SETS = r"\| *(difference|intersect|union|symmetric_difference|unique)\b"


@pytest.mark.parametrize("path", sorted(ROOT.glob("roles/*/templates/**/*.j2")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_depends_on_the_order_of_a_set(path: Path) -> None:
    """Ansible's filters of sets return another order with each run, so the second run would write another file."""
    assert [line for line in path.read_text().splitlines() if re.search(SETS, line)] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("roles/*/tasks/*.yml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_loop_has_the_order_of_a_set(path: Path) -> None:
    """Which of two faults a play names would change from run to run."""
    assert [line for line in path.read_text().splitlines() if line.strip().startswith("loop:") and re.search(SETS, line)] == []
