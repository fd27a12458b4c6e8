"""What every task and playbook has to have, whoever writes it: a host in use, a proxy or a company's inventory would break it otherwise."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT


class Loader(yaml.SafeLoader):
    """Reads Ansible's `!unsafe`."""


Loader.add_constructor("!unsafe", lambda loader, node: node.value)
FILES = sorted([*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("roles/*/handlers/*.yml")])


def flat(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield task
        for part in ("block", "rescue", "always"):
            yield from flat(task.get(part, []))


def tasks_with(module: str) -> list[tuple[str, dict[str, Any]]]:
    """Each task that runs a module, with a name to show."""
    found = []
    for file in FILES:
        for task in flat(yaml.load(file.read_text(), Loader=Loader) or []):  # noqa: S506  a safe loader with one more tag
            if module in task:
                found.append((f"{file.parent.parent.name}: {task['name']}", task[module]))
    assert found
    return found


def test_every_task_waits_for_the_lock_of_apt() -> None:
    """unattended-upgrades and cloud-init hold it for minutes."""
    assert [name for name, arguments in tasks_with("ansible.builtin.apt") if arguments.get("lock_timeout") != 600] == []


def test_nothing_asks_the_hosts_own_addresses_through_a_proxy() -> None:
    assert [name for name, arguments in tasks_with("ansible.builtin.uri") if arguments.get("use_proxy") is not False] == []


def curls() -> list[tuple[str, list[str]]]:
    """Each task that runs curl, with its arguments."""
    commands = [(name, arguments.get("argv", [])) for name, arguments in tasks_with("ansible.builtin.command")]
    found = [(name, argv) for name, argv in commands if argv[:1] == ["curl"]]
    assert found
    return found


@pytest.mark.parametrize(("name", "argv"), curls(), ids=[name for name, _ in curls()])
@pytest.mark.parametrize("said_in", ["environment", "curlrc"])
def test_curl_asks_no_proxy(name: str, argv: list[str], said_in: str, tmp_path: Path) -> None:
    """One that listens hears nothing, whether the environment or root's .curlrc names it, while curl without our arguments does ask it."""

    def asked(arguments: list[str]) -> bool:
        with socket.create_server(("127.0.0.1", 0)) as proxy:
            address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
            environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
            if said_in == "environment":
                environment |= {"http_proxy": address, "https_proxy": address}
            else:
                (tmp_path / ".curlrc").write_text(f'proxy = "{address}"\n')
            subprocess.run(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=60)
            # What came waits to be accepted, although curl has given up.
            proxy.settimeout(0.1)
            try:
                proxy.accept()[0].close()
            except TimeoutError:
                return False
        return True

    url = "http://chat.example.org/"
    assert asked(["curl", "--max-time", "2", "--resolve", "chat.example.org:80:127.0.0.1", url])
    real = [re.sub(r"\{\{ item\.url \}\}", url, re.sub(r"\{\{ agent_stack_domain \}\}", "chat.example.org", word)) for word in argv]
    assert url in real
    assert not asked(real)


def test_what_installs_an_engine_or_its_runtime_removes_nothing() -> None:
    installing = [(name, arguments) for name, arguments in tasks_with("ansible.builtin.apt") if name.startswith(("docker: Install", "nvidia_toolkit: Install"))]
    assert len(installing) == 2
    assert [name for name, arguments in installing if arguments.get("fail_on_autoremove") is not True] == []


@pytest.mark.parametrize("path", sorted(set(ROOT.glob("playbooks/*.yml")) - {ROOT / "playbooks" / "ansible_version.yml"}), ids=lambda path: path.stem)
def test_no_playbook_is_for_hosts_that_are_not_the_stacks(path: Any) -> None:
    hosts = [play["hosts"] for play in yaml.safe_load(path.read_text()) if "hosts" in play]
    ours = re.compile(r"localhost|\{\{ (\[\] if \w+ is defined else )?lookup\('selfhosted\.agent_stack\.topology'\)\.")
    assert [pattern for pattern in hosts if not ours.match(pattern)] == []


def test_no_two_roles_have_a_handler_of_one_name() -> None:
    """In a play with both Ansible would run the last role's for either, with the variables of that one."""
    handlers = [(handler["name"], path) for path in ROOT.glob("roles/*/handlers/main.yml") for handler in yaml.safe_load(path.read_text()) or []]
    names = [name for name, path in handlers if path.parent.parent.name in ("docker", "nvidia_toolkit")]
    assert len(names) == len(set(names)) == 2
