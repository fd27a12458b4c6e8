"""Which host does what, for inventories of every form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils._topology import topology
from programs import ROOT

ONE = {"all": ["a"]}
MANY = {"all": ["a", "b", "c"], "agent_stack": ["a", "b", "c"]}
COMPANY = {"all": ["db", "a", "web"], "agent_stack": ["a"], "web": ["web"]}
UNCLEAR = {"all": ["db", "a", "web"], "web": ["web"]}
FRONT = {"all": ["front", "x", "y"], "inference": ["x", "y"]}
NO_FRONT = {"all": ["x", "y"], "inference": ["x", "y"]}
SHARED = {"all": ["front", "x", "y", "f1", "f2", "f3"], "inference": ["x", "y"], "followers": ["f1", "f2", "f3"]}
HEADS = {"f1": "x", "f2": "y", "f3": "x"}
ADDRESSES = {"x": "10.0.0.1", "y": "10.0.0.2"}


def value_of(host: str, name: str) -> str:
    return {"vllm_head": HEADS, "vllm_peer_address": ADDRESSES}[name].get(host, "")


@pytest.mark.parametrize(
    ("groups", "host", "expected"),
    [
        pytest.param(ONE, "a", {"fronts": ("a",), "servers": ("a",), "front": "a", "serves": True, "peers": (), "partners": ()}, id="one host"),
        pytest.param(
            MANY, "b", {"fronts": ("a", "b", "c"), "front": "b", "serves": True, "apart": (), "outside": (), "nodes": ("b",)}, id="stacks of their own"
        ),
        pytest.param(FRONT, "front", {"fronts": ("front",), "serves": False, "is_peer": False, "peers": ("x", "y"), "partners": ("x", "y")}, id="a front"),
        pytest.param(FRONT, "y", {"front": "front", "serves": True, "is_peer": True, "peers": (), "partners": ("front",), "outside": ("front",)}, id="a peer"),
        pytest.param(NO_FRONT, "x", {"fronts": ("x",), "serves": True, "is_peer": False, "peers": ("y",), "partners": ("y",)}, id="a front that serves"),
        pytest.param(NO_FRONT, "y", {"front": "x", "is_peer": True, "apart": ("y",), "partners": ("x",), "outside": ()}, id="a peer of a front that serves"),
        pytest.param(SHARED, "x", {"head": "x", "nodes": ("x", "f1", "f3"), "head_address": "10.0.0.1", "follows": False}, id="a head"),
        pytest.param(SHARED, "f3", {"head": "x", "nodes": ("x", "f1", "f3"), "head_address": "10.0.0.1", "follows": True, "is_peer": False}, id="a follower"),
        pytest.param(SHARED, "f2", {"head": "y", "nodes": ("y", "f2"), "head_address": "10.0.0.2", "serves": False}, id="a follower of another"),
        pytest.param(SHARED, "front", {"nodes": ("front",), "head_address": "", "outside": ("front",), "apart": ("x", "y")}, id="the front of heads"),
        pytest.param(
            SHARED, "", {"fronts": ("front",), "servers": ("x", "y"), "apart": ("x", "y"), "followers": ("f1", "f2", "f3"), "nodes": ()}, id="no host"
        ),
        pytest.param(MANY, "", {"fronts": ("a", "b", "c"), "servers": ("a", "b", "c"), "apart": (), "followers": (), "front": ""}, id="no host, no group"),
        pytest.param({**FRONT, "all": ["front", "other", "x", "y"]}, "x", {"outside": ("front", "other"), "front": "front"}, id="two outside"),
        pytest.param({"all": ["a"], "inference": []}, "a", {"fronts": ("a",), "servers": (), "serves": False, "peers": ()}, id="an empty group"),
        pytest.param(COMPANY, "", {"stack": ("a",), "fronts": ("a",), "servers": ("a",), "outside": ()}, id="a company's inventory"),
        pytest.param(UNCLEAR, "", {"stack": (), "fronts": (), "servers": (), "apart": (), "followers": ()}, id="nobody says which hosts"),
        pytest.param(UNCLEAR, "db", {"stack": (), "front": "db", "serves": True, "nodes": ("db",)}, id="a play of a user's own"),
        pytest.param(ONE, "", {"stack": ("a",), "fronts": ("a",)}, id="no host, one alone"),
        pytest.param(SHARED, "", {"stack": ("front", "x", "y", "f1", "f2", "f3")}, id="all of a group that serves"),
        pytest.param(
            {**SHARED, "all": [*SHARED["all"], "db"], "agent_stack": ["front", "x", "y", "f1", "f2", "f3"]},
            "front",
            {"stack": ("front", "x", "y", "f1", "f2", "f3"), "outside": ("front",), "front": "front", "fronts": ("front",)},
            id="several hosts in a company's inventory",
        ),
        pytest.param({**SHARED, "followers": ["lost"]}, "lost", {"head": "", "follows": True, "head_address": ""}, id="a follower without a head"),
    ],
)
def test_what_a_host_does(groups: dict[str, list[str]], host: str, expected: dict[str, Any]) -> None:
    found = asdict(topology(host, groups, value_of))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("host", "shared"), [("x", True), ("f1", True), ("front", False)])
def test_whether_hosts_share_the_model(host: str, shared: bool) -> None:
    assert topology(host, SHARED, value_of).shared is shared


def test_the_lookup_knows_the_inventory(tmp_path: Path) -> None:
    """In a play's hosts, where there is no host yet, and in a task, where addresses are templates of each host's own variables."""
    inventory = {
        "all": {
            "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "vllm_peer_address": "10.0.0.{{ number }}"},
            "hosts": {"front": {"number": 1}},
            "children": {
                "inference": {"hosts": {"x": {"number": 2}, "y": {"number": 3}}},
                "followers": {"hosts": {"f": {"number": 4, "vllm_head": "y"}}},
            },
        }
    }
    topology_of = "lookup('selfhosted.agent_stack.topology')"
    said = "{{ inventory_hostname }} %s {{ (" + topology_of + ".nodes + [" + topology_of + ".head_address]) | join(',') }}"
    plays = [
        {
            "hosts": f"{{{{ {topology_of}.{name} }}}}",
            "gather_facts": False,
            "tasks": [{"ansible.builtin.copy": {"content": said % name, "dest": f"{tmp_path}/{name}-{{{{ inventory_hostname }}}}", "mode": "0600"}}],
        }
        for name in ("fronts", "apart", "servers", "followers")
    ]
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    (tmp_path / "play.yml").write_text(yaml.safe_dump(plays))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(file.read_text() for file in tmp_path.glob("*-*")) == [
        "f followers y,f,10.0.0.3",
        "front fronts front,",
        "x apart x,",
        "x servers x,",
        "y apart y,f,10.0.0.3",
        "y servers y,f,10.0.0.3",
    ]


def test_nobody_reads_the_groups_but_the_lookup() -> None:
    """Where hosts are named by what they do, it is by the lookup, so that no second account of the inventory can differ from it."""
    files = [file for kind in ("roles", "playbooks") for suffix in ("yml", "j2") for file in (ROOT / kind).rglob(f"*.{suffix}")]
    assert len(files) > 100
    assert [str(file) for file in files if re.search(r"\bgroups(\[|\.(all|inference|followers)\b)", file.read_text())] == []
