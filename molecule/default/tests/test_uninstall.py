"""Uninstalling on a real host: a diff of everything that was there before the stack, kept by prepare.yml, and after it.

They run in this order, at the end of the scenario: each begins with what the one before left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# Another host, and its inventory, may be named.
NAME = os.environ.get("DRILL_HOST", "agent-stack-molecule")
INVENTORY = os.environ.get("DRILL_INVENTORY", str(ROOT / "molecule" / "default" / "inventory" / "hosts.yml"))
BEFORE = ROOT / ".cache" / "molecule-default-before.json"
DATA = "/var/lib/agent-stack"


def on_host(*command: str, stdin: str = "") -> str:
    result = subprocess.run(["docker", "exec", "--interactive", NAME, *command], capture_output=True, text=True, input=stdin, check=False)
    assert result.returncode == 0, f"`{' '.join(command)}` ended with {result.returncode}: {result.stderr or result.stdout}"
    return result.stdout


def state() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(on_host("python3", "-", stdin=(Path(__file__).parent / "host_state.py").read_text()))
    return found


def uninstall(*arguments: str) -> tuple[int, str]:
    """Return how many tasks changed something, and what the play said. It must not fail."""
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "playbooks/uninstall.yml", "-i", INVENTORY]
    command += ["-e", f"@{ROOT / '.cache' / 'machine.json'}", *arguments]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "MOLECULE_PROJECT_DIRECTORY": str(ROOT), "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return sum(int(number) for number in re.findall(r"changed=(\d+)", result.stdout)), result.stdout


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what is more, less or other than before, by kind."""
    found: dict[str, Any] = {}
    for kind, old in before.items():
        new = after[kind]
        if isinstance(old, dict):
            changes = {path: (old.get(path), new.get(path)) for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)}
        else:
            changes = {name: ("there" if name in old else None, "there" if name in new else None) for name in sorted({*old} ^ {*new})}
        if changes:
            found[kind] = changes
    return found


def test_a_dry_run_changes_nothing() -> None:
    before = state()
    changed, said = uninstall("--check")
    assert changed == 1
    for what in ("agent-stack.target", "agent-stack-agent-agent-1", "agent-stack-data", "nginx", "docker.io", "/opt/agent-stack"):
        assert what in said, said
    # The certificate's own renewal may run meanwhile, and does not here.
    assert difference(before, state()) == {}


def test_without_a_word_for_it_nothing_goes() -> None:
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "playbooks/uninstall.yml", "-i", INVENTORY]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "MOLECULE_PROJECT_DIRECTORY": str(ROOT), "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "uninstall_confirmed is false, so nothing was removed" in " ".join(result.stdout.split())
    assert "agent-stack-postgres-postgres-1" in on_host("docker", "ps")


def test_the_stack_goes_and_its_data_stays() -> None:
    conversations = on_host("sh", "-c", f"du --summarize --bytes {DATA}/postgres/base | cut -f1")
    changed, said = uninstall("-e", "uninstall_confirmed=true")
    assert changed == 1
    assert f"the data in {DATA}" in said
    assert on_host("sh", "-c", f"du --summarize --bytes {DATA}/postgres/base | cut -f1") == conversations
    left = difference(json.loads(BEFORE.read_text()), state())
    files = {path for path in left.pop("files") if not f"{path}/".startswith((f"{DATA}/", "/etc/letsencrypt/", "/var/lib/letsencrypt/"))}
    # What belongs to the certificates, which are data: Debian's package of certbot is removed, and not purged.
    timer = "/etc/systemd/system/timers.target.wants/certbot.timer"
    assert files <= {"/etc/cron.d", "/etc/cron.d/certbot", "/etc/logrotate.d/certbot", timer}
    assert left.pop("packages") == {"rc  certbot": (None, "there")}
    assert left == {}
    assert on_host("sh", "-c", "ls -A /var/lib/docker") == ""


def test_a_second_time_changes_nothing() -> None:
    assert uninstall("-e", "uninstall_confirmed=true")[0] == 0


def test_the_data_goes_by_name() -> None:
    changed, _ = uninstall("-e", "uninstall_confirmed=true", "-e", "uninstall_data=true")
    assert changed == 1
    assert difference(json.loads(BEFORE.read_text()), state()) == {}
    assert uninstall("-e", "uninstall_confirmed=true", "-e", "uninstall_data=true")[0] == 0
