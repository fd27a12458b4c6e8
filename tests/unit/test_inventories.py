"""Inventories as people have them, each through Ansible itself: whom a play is for, where the secrets go, and what a second run or another person finds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

pytestmark = pytest.mark.play

# The part of the play that concerns the inventory: the entry points that site.yml has, without a look at the machine that runs the tests.
PLAYBOOK = """
- name: Require an inventory that is clear
  ansible.builtin.import_playbook: {root}/playbooks/ansible_version.yml
- hosts: "{{{{ lookup('selfhosted.agent_stack.topology').stack }}}}"
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {{name: selfhosted.agent_stack.agent_stack, tasks_from: secrets}}
      vars: {{__agent_stack_secrets_state: present}}
    - name: Say what there is
      ansible.builtin.debug:
        msg: "of {{{{ inventory_hostname }}}}: setting={{{{ setting | default('none') }}}} redis={{{{ agent_stack_secrets.redis_agent_password }}}}"
"""
LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "agent_stack_secure_logging": False}


class Desk:
    """A directory of a person, with a playbook and a home."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "home").mkdir()
        (path / "play.yml").write_text(PLAYBOOK.format(root=ROOT))

    def write(self, name: str, content: object) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    def run(self, *arguments: str, playbook: str = "play.yml", at: str = ".", **environment: str) -> str:
        (self.path / at).mkdir(exist_ok=True)
        program = str(Path(sys.executable).parent / "ansible-playbook")
        known = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "COLUMNS": "1000", "HOME": str(self.path / "home")}
        command = [program, str(self.path / playbook), *arguments]
        result = subprocess.run(command, cwd=self.path / at, env=known | environment, capture_output=True, text=True, check=False)
        return " ".join((result.stdout + result.stderr).split())

    def files(self) -> list[str]:
        """The files with secrets, wherever they are."""
        found = [path for path in self.path.rglob("*.yml") if "agent_stack_secrets:" in path.read_text()]
        return sorted(str(path.relative_to(self.path)) for path in found)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def secret(output: str, host: str = "agent") -> str:
    found = re.search(rf"of {re.escape(host)}: setting=\S+ redis=(\w{{32}})", output)
    assert found, output
    return found[1]


def test_variables_in_a_file_are_not_hidden_by_the_secrets(desk: Desk) -> None:
    desk.write("inv/hosts.ini", "[servers]\nagent\n")
    desk.write("inv/group_vars/all.yml", {**LOCAL, "setting": "read"})
    first = desk.run("-i", "inv/hosts.ini")
    second = desk.run("-i", "inv/hosts.ini")
    assert secret(first) == secret(second)
    assert "setting=read" in first
    assert "setting=read" in second
    assert desk.files() == ["inv/group_vars/agent_stack_secrets.yml"]


def test_a_file_that_is_hidden_already_is_named(desk: Desk) -> None:
    desk.write("inv/hosts.yml", {"all": {"hosts": {"agent": LOCAL}}})
    desk.write("inv/group_vars/all.yml", {"setting": "lost"})
    desk.write("inv/group_vars/all/secrets.yml", {"agent_stack_secrets": {"redis_agent_password": "x"}})
    assert "because there is a directory all beside it. Move the file to all/main.yml." in desk.run("-i", "inv/hosts.yml")


def test_a_host_of_the_command_line_has_the_same_secrets_from_everywhere(desk: Desk) -> None:
    desk.write("local.yml", LOCAL)
    arguments = ("-i", "agent,", "-e", f"@{desk.path / 'local.yml'}")
    assert secret(desk.run(*arguments)) == secret(desk.run(*arguments, at="elsewhere"))
    assert desk.files() == ["home/.config/agent-stack/agent/secrets.yml"]


def test_two_inventories_have_one_file(desk: Desk) -> None:
    desk.write("one/hosts.yml", {"all": {"hosts": {"agent": LOCAL}}})
    desk.write("one/group_vars/all/main.yml", {"setting": "read"})
    desk.write("two/hosts.yml", {"all": {"children": {"inference": {"hosts": {"gpu": LOCAL}}}}})
    first = desk.run("-i", "one", "-i", "two")
    assert secret(first) == secret(first, "gpu")
    assert desk.files() == ["one/group_vars/all/secrets.yml"]
    turned = desk.run("-i", "two", "-i", "one")
    assert secret(turned) == secret(turned, "gpu") == secret(first)
    limited = desk.run("-i", "one", "-i", "two", "--limit", "gpu")
    assert secret(limited, "gpu") == secret(first)
    assert "of agent:" not in limited
    assert desk.files() == ["one/group_vars/all/secrets.yml"]


def test_in_a_companys_inventory_nobody_else_is_deployed_to(desk: Desk) -> None:
    company = {"all": {"hosts": {"db": LOCAL, "web": LOCAL}, "children": {"agent_stack": {"hosts": {"agent": LOCAL}}}}}
    desk.write("inv/hosts.yml", company)
    output = desk.run("-i", "inv")
    assert secret(output)
    assert "of db:" not in output
    listed = desk.run("-i", "inv", "--list-hosts", playbook=str(ROOT / "playbooks" / "site.yml"))
    plays = re.findall(r"play #\d+ \((\S+?)\): .*? hosts \((\d+)\):((?: (?!play)\S+)*)", listed)
    assert len(plays) >= 4
    # Only the question for Ansible's version is for all, and asks none of them.
    assert {hosts.strip() for pattern, count, hosts in plays if pattern != "all" and count != "0"} == {"agent"}


def test_an_inventory_that_says_nothing_is_refused(desk: Desk) -> None:
    desk.write("inv/hosts.yml", {"all": {"hosts": {"db": LOCAL, "agent": LOCAL}}})
    output = desk.run("-i", "inv")
    assert "The inventory has 2 hosts and no group agent_stack; allowed is a group agent_stack with the hosts of the stack, or one host alone." in output
    assert "of agent:" not in output
    assert desk.files() == []


def test_a_password_in_the_inventorys_directory_is_no_host_to_deploy_to(desk: Desk) -> None:
    desk.write("inv/hosts.yml", {"agent_stack": {"hosts": {"agent": LOCAL}}})
    desk.write("inv/vault-password", "correct-horse\n")
    output = desk.run("-i", "inv", "--vault-password-file", "inv/vault-password")
    assert secret(output)
    assert "of correct-horse:" not in output
    # Without the group nobody knows which of the two is meant, and the sentence does not show the other.
    desk.write("inv/hosts.yml", {"all": {"hosts": {"agent": LOCAL}}})
    refused = desk.run("-i", "inv", "--vault-password-file", "inv/vault-password")
    assert "keep it elsewhere" in refused


def test_a_second_person_with_the_file_finds_the_same(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> None:
    desk.write("inv/hosts.yml", {"all": {"hosts": {"agent": LOCAL}}})
    desk.write("inv/group_vars/all/main.yml", {"setting": "read"})
    first = desk.run("-i", "inv")
    other = Desk(tmp_path_factory.mktemp("other"))
    for name in ("inv/hosts.yml", "inv/group_vars/all/main.yml", "inv/group_vars/all/secrets.yml"):
        other.write(name, (desk.path / name).read_text())
    assert secret(other.run("-i", "inv")) == secret(first)


def test_a_run_that_begins_later_has_the_secrets_too(desk: Desk) -> None:
    """Of a file that Ansible does not read as variables itself."""
    desk.write("inv/hosts.ini", "agent\n")
    desk.write("inv/group_vars/all.yml", LOCAL)
    first = desk.run("-i", "inv/hosts.ini")
    later = desk.run("-i", "inv/hosts.ini", "--start-at-task", "Say what there is")
    assert "Create the secrets" not in later
    assert secret(later) == secret(first)


def test_secrets_of_a_file_on_the_command_line(desk: Desk) -> None:
    desk.write("inv/hosts.yml", {"all": {"hosts": {"agent": LOCAL}}})
    desk.write("some.yml", {"agent_stack_secrets": {"redis_agent_password": "r" * 32}})
    assert "agent_stack_secrets comes from the command line and lacks agent_proxy_secret," in desk.run("-i", "inv", "-e", "@some.yml")
    whole = {name: "r" * 32 for role in ROOT.glob("roles/*/meta/component.yml") for name in (yaml.safe_load(role.read_text()) or {}).get("secrets", [])}
    desk.write("all.yml", {"agent_stack_secrets": whole})
    assert secret(desk.run("-i", "inv", "-e", "@all.yml")) == "r" * 32


def test_secrets_that_the_inventory_gives_are_not_made(desk: Desk) -> None:
    desk.write("inv/hosts.yml", {"all": {"hosts": {"agent": LOCAL}}})
    desk.write("inv/group_vars/all/main.yml", {"agent_stack_secrets": {"redis_agent_password": "g" * 32}})
    assert secret(desk.run("-i", "inv")) == "g" * 32
    written = yaml.safe_load((desk.path / "inv/group_vars/all/secrets.yml").read_text())["agent_stack_secrets"]
    assert "redis_agent_password" not in written
    assert "agent_proxy_secret" in written


def test_no_task_on_the_controller_becomes_root() -> None:
    """`ansible_become: true` for all hosts wins over the keyword, and not over a variable of the task."""
    tasks = [task for path in ROOT.glob("roles/*/tasks/*.yml") for task in flat(yaml.safe_load(path.read_text()) or [])]
    delegated = [task for task in tasks if task.get("delegate_to") == "localhost"]
    assert len(delegated) >= 4
    assert [task["name"] for task in delegated if task.get("vars", {}).get("ansible_become") is not False] == []
    plays = [play for path in ROOT.glob("playbooks/*.yml") for play in yaml.safe_load(path.read_text()) if play.get("hosts") == "localhost"]
    assert plays
    assert [play["name"] for play in plays if play.get("vars", {}).get("ansible_become") is not False] == []


def flat(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for task in tasks:
        found.append(task)
        for part in ("block", "rescue", "always"):
            found += flat(task.get(part, []))
    return found


def test_the_variable_of_a_task_is_what_keeps_sudo_away(desk: Desk) -> None:
    desk.write("bin/sudo", f"#!/bin/sh\ntouch {desk.path}/called\nexit 1\n").chmod(0o755)
    desk.write("inv.yml", {"all": {"hosts": {"agent": {}}, "vars": {"ansible_become": True, "ansible_become_user": "nobody"}}})
    for variables, called in (({"ansible_become": False}, False), ({}, True)):
        task = {"ansible.builtin.command": "true", "delegate_to": "localhost", "vars": {**variables, "ansible_become_exe": str(desk.path / "bin" / "sudo")}}
        desk.write("become.yml", [{"hosts": "all", "gather_facts": False, "tasks": [task]}])
        desk.run("-i", "inv.yml", playbook="become.yml")
        assert (desk.path / "called").exists() is called
