"""What the playbooks uninstall.yml, clean.yml and status.yml make of their variables, which are texts on a command line. Their modules are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

# It says what it was given, and changes nothing.
STAND_IN = """
import json
from ansible.module_utils.basic import AnsibleModule
NAMES = ("root", "data", "footprint", "daemon_options", "remove_data", "remove_packages", "days", "kinds", "model", "images")
module = AnsibleModule(argument_spec={name: {"type": "raw"} for name in NAMES}, supports_check_mode=True)
given = {name: value for name, value in module.params.items() if value is not None and name != "footprint"}
said = ["%s=%s" % (name, json.dumps(given[name])) for name in sorted(given)]
item = {"kind": "model", "name": "old", "size": 2048, "age_days": 9}
module.exit_json(changed=True, removed={"given": said}, kept=["the data"], gone=[item], freed=2048, free={"/data": 4096}, failed_items=said)
"""
HOSTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "meant": {"uninstall_confirmed": "true", "clean_days": "30"},
    "data": {"uninstall_confirmed": "yes", "uninstall_data": "true", "clean_kinds": ["models"]},
    "packages": {"uninstall_confirmed": "true", "uninstall_packages": "false", "docker_daemon_options": {"mtu": 1400}, "clean_days": "-1"},
    "odd": {"uninstall_confirmed": "maybe", "clean_days": "soon"},
}
SHARED: dict[str, Any] = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "agent_stack_domain": "agent.example.com",
    "agent_stack_email": "ops@example.com",
    "vllm_model": "Qwen/Qwen3-8B",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the collection, in which the two modules that change a host are stand-ins."""
    directory = tmp_path_factory.mktemp("day2")
    collection = directory / "ansible_collections" / "selfhosted" / "agent_stack"
    for part in ("plugins", "meta", "roles", "playbooks"):
        shutil.copytree(ROOT / part, collection / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("uninstall", "clean"):
        (collection / "plugins" / "modules" / f"{name}.py").write_text(STAND_IN)
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": {"agent_stack": {"hosts": HOSTS}}, "vars": SHARED}}))
    return directory


def play(directory: Path, name: str, *arguments: str) -> dict[str, str]:
    """Run a playbook, and return what was said of each host, in one line."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_COLLECTIONS_PATH": str(directory), "ANSIBLE_NOCOLOR": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", f"selfhosted.agent_stack.{name}", *arguments]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    found = dict.fromkeys(HOSTS, "")
    host = ""
    for line in result.stdout.splitlines():
        begun = next((each for each in HOSTS if f"[{each}]" in line), None)
        host = begun or ("" if line.startswith(("TASK", "PLAY")) else host)
        if host:
            # JSON in JSON, without its quotes.
            found[host] += " ".join(line.replace('\\"', "").split()) + " "
    assert any(found.values()), result.stdout + result.stderr
    return found


def test_uninstalling_is_what_was_asked_for(installed: Path) -> None:
    said = play(installed, "uninstall")
    assert "uninstall_confirmed is false, so nothing was removed from plain; allowed is true." in said["plain"]
    assert "given" not in said["plain"]
    for host, data, packages in (("meant", "false", "true"), ("data", "true", "true"), ("packages", "false", "false")):
        for text in (f"remove_data={data}", f"remove_packages={packages}", "root=/opt/agent-stack", "the data", "went"):
            assert text in said[host], (host, said[host])
    assert "daemon_options={mtu: 1400}" in said["packages"]
    assert "agent_stack_uninstall_confirmed" in said["odd"]
    assert "maybe" in said["odd"]
    assert "given" not in said["odd"]


def test_a_dry_run_needs_no_confirmation(installed: Path) -> None:
    assert "would go" in play(installed, "uninstall", "--check")["plain"]


def test_cleaning_is_what_was_asked_for(installed: Path) -> None:
    said = play(installed, "clean")
    for host, days, kinds in (("plain", "7", "images"), ("meant", "30", "build_cache"), ("data", "7", "kinds=[models]")):
        for text in (f"days={days}", kinds, "model=Qwen/Qwen3-8B", "model old, 2.00 KB", "docker.io/library/redis"):
            assert text in said[host], (host, said[host])
    assert "clean_days is -1; allowed is a number of days, 0 or more." in said["packages"]
    assert "clean_days is soon; allowed is a number of days, 0 or more." in said["odd"]


def test_a_host_without_the_command_is_a_sentence(installed: Path) -> None:
    said = play(installed, "status")["plain"]
    assert "plain has no /usr/local/sbin/agent-stack: the stack was not installed there, or by an older version. Run site.yml." in said
