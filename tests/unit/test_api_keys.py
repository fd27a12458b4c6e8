"""playbooks/api_keys.yml against a stand-in for the agent's own program, whose contract files/agent/tests/test_auth.py holds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.action.api_key_file import create_arguments, new_key, plan

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "files" / "agent" / "src" / "agent"
DOCKER = f"""#!{sys.executable}
import hashlib, json, pathlib, sys
store = pathlib.Path(__file__).with_name("keys.json")
keys = json.loads(store.read_text()) if store.exists() else []
start = ["compose", "--file", "/opt/agent-stack/agent/compose.yml", "run", "--rm", "--no-TTY", "--no-deps", "keys"]
assert sys.argv[1:9] == start, sys.argv
command, *rest = sys.argv[9:]
if command == "list":
    print(json.dumps({{"keys": keys}}))
    sys.exit()
if store.with_name("broken").exists():
    sys.exit("the agent is away")
name, *options = rest
active = [key for key in keys if key["name"] == name and not key["revoked_at"]]
changed = False
if command == "create":
    if not active:
        key = sys.stdin.read().strip()
        assert "--stdin" in options and key.startswith(f"ask_{{name}}_")
        digest = hashlib.sha256(key.encode()).hexdigest()
        assert digest not in [key["sha256"] for key in keys], "revoked"
        active = [{{"name": name, "sha256": digest, "revoked_at": None, "limits": None}}]
        keys += active
        changed = True
    limits = [word for word in options if word != "--stdin"]
    if limits and active[0]["limits"] != limits:
        active[0]["limits"], changed = limits, True
else:
    for key in active:
        key["revoked_at"], changed = "now", True
store.write_text(json.dumps(keys))
print(json.dumps({{"name": name, "changed": changed}}))
"""


class Site:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "group_vars" / "all" / "api_keys.yml"
        self.file.parent.mkdir(parents=True)
        (directory / "hosts.yml").write_text(
            yaml.safe_dump({"all": {"hosts": {"host": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}}}})
        )
        self.bin = directory / "bin"
        self.bin.mkdir()
        (self.bin / "docker").write_text(DOCKER)
        (self.bin / "docker").chmod(0o755)

    def play(self, *arguments: str, **values: object) -> tuple[int, int, str]:
        """How it ended, how many tasks changed something, and all that it said."""
        program = str(Path(sys.executable).parent / "ansible-playbook")
        command = [program, "-i", str(self.directory), str(ROOT / "playbooks" / "api_keys.yml"), "-e", json.dumps(values), *arguments]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "PATH": f"{self.bin}:{os.environ['PATH']}"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        output = result.stdout + result.stderr
        changed = re.search(r"changed=(\d+)", output)
        return result.returncode, int(changed[1]) if changed else 0, output

    def keys(self) -> dict[str, str]:
        return dict(yaml.safe_load(self.file.read_text())["agent_api_keys"]) if self.file.exists() else {}

    def active(self) -> dict[str, dict[str, Any]]:
        store = self.bin / "keys.json"
        return {key["name"]: key for key in (json.loads(store.read_text()) if store.exists() else []) if not key["revoked_at"]}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_life(site: Site) -> None:
    wanted = ["ci", {"name": "ada", "tokens_per_minute": 50000}]
    rc, changed, output = site.play("--check", api_keys=wanted)
    assert (rc, changed, site.keys(), site.active()) == (0, 1, {}, {}), output
    assert "Would make keys for: ada, ci" in output

    rc, changed, output = site.play("-v", "--diff", api_keys=wanted)
    assert (rc, changed) == (0, 2), output
    keys = site.keys()
    assert sorted(keys) == sorted(site.active()) == ["ada", "ci"]
    assert site.active()["ada"]["limits"] == ["--tokens-per-minute", "50000"]
    for name, key in keys.items():
        assert re.fullmatch(rf"ask_{name}_[A-Za-z0-9_-]{{43}}", key)
        assert site.active()[name]["sha256"] == hashlib.sha256(key.encode()).hexdigest()
        assert key not in output
    assert stat.S_IMODE(site.file.stat().st_mode) == 0o600

    rc, changed, output = site.play(api_keys=wanted)
    assert (rc, changed, site.keys()) == (0, 0, keys), output
    rc, changed, output = site.play("--check", api_keys=wanted)
    assert (rc, changed) == (0, 0), output

    rc, changed, output = site.play("--check", api_keys_revoked=["ci"])
    assert (rc, changed, site.keys()) == (0, 2, keys), output
    rc, changed, output = site.play(api_keys_revoked=["ci"])
    assert (rc, changed, sorted(site.keys()), sorted(site.active())) == (0, 2, ["ada"], ["ada"]), output
    rc, changed, output = site.play(api_keys_revoked=["ci", "nobody"])
    assert (rc, changed) == (0, 0), output

    assert site.play(api_keys=["ci"])[1] == 2
    assert site.keys()["ci"] != keys["ci"]


def test_a_play_that_was_cut_off_is_mended(site: Site) -> None:
    (site.bin / "broken").touch()
    rc, _, output = site.play(api_keys=["ci"])
    assert rc != 0
    written = site.keys()
    assert sorted(written) == ["ci"]
    assert written["ci"] not in output
    (site.bin / "broken").unlink()
    assert site.play(api_keys=["ci"])[:2] == (0, 1)
    assert site.keys() == written
    assert list(site.active()) == ["ci"]


def test_the_file_is_encrypted_where_there_is_a_vault_password(site: Site) -> None:
    (site.directory / "password").write_text("vault password")
    vault = ("--vault-password-file", str(site.directory / "password"))
    assert site.play(*vault, api_keys=["ci"])[:2] == (0, 2)
    assert site.file.read_text().startswith("$ANSIBLE_VAULT;")
    assert site.play(*vault, api_keys=["ci"])[:2] == (0, 0)


def test_bad_names_are_refused_first(site: Site) -> None:
    for values, words in (
        ({"api_keys": ["ci", "Ada"]}, 'api_keys has "Ada"'),
        ({"api_keys": [{"name": "ci", "speed": 1}]}, 'api_keys has {"name": "ci", "speed": 1}'),
        ({"api_keys": [{"name": "ci", "tokens_per_minute": "many"}]}, "a number, 0 for no limit"),
        ({"api_keys": ["ci"], "api_keys_revoked": ["ci"]}, 'api_keys_revoked has "ci"'),
        ({"api_keys": ["ci", {"name": "ci"}]}, "api_keys has a name twice"),
        ({"api_keys_revoked": ["a;b"]}, 'api_keys_revoked has "a;b"'),
    ):
        rc, changed, output = site.play(**values)
        assert (rc != 0, changed) == (True, 0), output
        assert words in " ".join(output.split()), output
    assert (site.keys(), site.active()) == ({}, {})


def known(name: str, key: str, revoked: str | None = None) -> dict[str, str | None]:
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "revoked_at": revoked}


def test_plan() -> None:
    old, odd = new_key("ci"), new_key("odd")
    assert plan({}, [], [], []) == ({}, {})
    # The agent has it, whatever the file says.
    assert plan({}, ["ci"], [], [known("ci", old)]) == ({}, {})
    # Written, never learned.
    assert plan({"ci": old}, ["ci"], [], []) == ({"ci": old}, {"ci": old})
    # Revoked elsewhere: the file's key would be refused.
    values, missing = plan({"ci": old, "odd": odd}, ["ci"], [], [known("ci", old, "now")])
    assert values == {"ci": missing["ci"], "odd": odd}
    assert missing["ci"] != old
    assert plan({"ci": old, "odd": odd}, [], ["ci"], [known("ci", old)]) == ({"odd": odd}, {})


def test_create_arguments() -> None:
    assert create_arguments({"name": "ci"}) == []
    assert create_arguments({"name": "ci", "concurrent_runs": 0, "tokens_per_minute": "default"}) == [
        "--concurrent-runs",
        "0",
        "--tokens-per-minute",
        "default",
    ]


def test_a_keys_name_is_one_thing_everywhere() -> None:
    """The role refuses what neither the agent's program nor its database would take, and nothing else."""
    variables = yaml.safe_load((ROOT / "roles" / "agent_stack" / "vars" / "main.yml").read_text())
    (program,) = re.findall(r'^KEY_NAME = re.compile\(r"(.*)"\)$', (AGENT / "access" / "auth.py").read_text(), re.M)
    (database,) = re.findall(r"name text NOT NULL CHECK \(name ~ '\^(.*)\$'\)", (AGENT / "migrations" / "0002_api_keys.sql").read_text())
    assert variables["__agent_stack_key_pattern"] == program == database
