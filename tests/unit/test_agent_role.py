"""The role `agent` knows every setting of the service, and refuses what the service would refuse, in the same terms."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles" / "agent"
SOURCE = ROOT / "files" / "agent" / "src" / "agent"
PLAYBOOK = """
- hosts: all
  gather_facts: false
  vars_files: [STACK/defaults/main.yml, STACK/vars/main.yml]
  tasks:
    - ansible.builtin.include_role:
        name: selfhosted.agent_stack.agent
        tasks_from: check
        public: true
    - ansible.builtin.template:
        src: TEMPLATE
        dest: "{{ playbook_dir }}/{{ inventory_hostname }}.yml"
        mode: "0600"
"""
SHARED = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "agent_stack_component_revision": "0",
    "agent_stack_secrets": {"agent_proxy_secret": "s" * 32},
    "agent_stack_secure_logging": False,
    "vllm_served_name": "agent-model",
    "vllm_tool_call_parser": "hermes",
}
WEATHER = "{{ playbook_dir }}/weather.py"
WIKI = "{{ playbook_dir }}/wiki.py"
TAKEN: dict[str, dict[str, object]] = {
    "nothing": {},
    "much": {
        "vllm_tool_call_parser": "",
        "agent_model_url": "https://api.openai.com/v1",
        "agent_model_name": "gpt-5",
        "agent_model_api_key": "sk-x",
        "agent_model_extra_body": {"a": {"b": "$c"}},
        "agent_temperature": "",
        "agent_tool_files": [WEATHER, WIKI],
        "agent_tools_approval": ["fetch_*", "weather"],
        "agent_mcp_servers": {"files": "http://mcp.example.com:8000/mcp"},
        "agent_fetch_allow": ["*.example.com", "example.org"],
        "agent_memory_enabled": True,
        "agent_retention_days": 0,
    },
    "outside-model": {"agent_model_url": "https://model.example.com/v1"},
    "outside-search": {"agent_searxng_url": "http://search.example.com"},
    "outside-traces": {"agent_otlp_endpoint": "http://collector.example.com:4318"},
    "outside-pages": {"agent_fetch_allow": ["*"]},
    "outside-tools": {"agent_mcp_servers": {"a": "http://mcp.example.com"}},
}
REFUSED: list[tuple[dict[str, object], str]] = [
    ({"agent_workers": 0}, "agent_workers is 0; allowed is a whole number from 1 to 64"),
    ({"agent_retention_days": -1}, "agent_retention_days is -1; allowed is a whole number from 0 to 36500"),
    ({"agent_temperature": "hot"}, 'agent_temperature is "hot"; allowed is a number from 0 to 2'),
    ({"agent_temperature": 2.5}, 'agent_temperature is "2.5"; allowed is a number from 0 to 2'),
    ({"agent_model_url": "api.openai.com"}, 'agent_model_url is "api.openai.com"; allowed is an http or https URL'),
    ({"agent_proxy_secret": "short"}, "agent_proxy_secret has 5 characters; allowed are 32 to 128"),
    ({"agent_fetch_allow": ["10.0.0.1"]}, 'agent_fetch_allow has "10.0.0.1"; allowed is a host name'),
    ({"agent_mcp_servers": {"My Server": "http://a"}}, 'agent_mcp_servers has "My Server"; allowed is a name of 1 to 16 characters'),
    ({"agent_mcp_servers": {"a": ""}}, 'agent_mcp_servers has ""; allowed is an http or https URL'),
    ({"agent_tools_approval": ["rm -rf"]}, 'agent_tools_approval has "rm -rf"; allowed is a tool\'s name'),
    ({"agent_tool_files": ["/nowhere/tool.py"]}, 'agent_tool_files has "/nowhere/tool.py"; allowed is a file on the controller'),
    ({"agent_tool_files": ["/etc/hostname"]}, 'agent_tool_files has "hostname"; allowed is a file whose name'),
    ({"agent_max_tokens": 8000}, "agent_max_tokens is 8000; allowed is at most 7936"),
    ({"agent_turn_timeout_seconds": 340}, "agent_turn_timeout_seconds is 340; allowed is less than nginx_certbot_read_timeout_seconds, which is 340"),
    ({"agent_retention_schedule": "at dawn"}, 'agent_retention_schedule is "at dawn"; allowed is a systemd calendar event'),
    ({"agent_retention_schedule": "daily; rm"}, 'agent_retention_schedule is "daily; rm"; allowed is a systemd calendar event'),
]


def fields(file: str, name: str) -> dict[str, bool]:
    """The fields of a settings class, and whether each is a secret."""
    tree = ast.parse((SOURCE / file).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.target.id: "Secret" in ast.unparse(node.annotation) for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One host for each case, in one play: what it said, and where the Compose files are."""
    directory = tmp_path_factory.mktemp("play")
    for name in ("weather.py", "wiki.py"):
        (directory / name).write_text("tools = []\n")
    hosts = {**TAKEN, **{f"refused-{number}": values for number, (values, _) in enumerate(REFUSED)}}
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": SHARED}}))
    text = PLAYBOOK.replace("STACK", str(ROOT / "roles" / "agent_stack")).replace("TEMPLATE", str(ROLE / "templates" / "compose.yml.j2"))
    (directory / "play.yml").write_text(text)
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return " ".join((result.stdout + result.stderr).split()), directory


def services(played: tuple[str, Path], name: str) -> dict[str, Any]:
    output, directory = played
    file = directory / f"{name}.yml"
    assert file.exists(), output
    return dict(yaml.safe_load(file.read_text())["services"])


def test_every_setting_is_a_variable_of_the_role() -> None:
    wanted = fields("settings.py", "PostgresSettings") | fields("settings.py", "Settings") | fields("retention.py", "RetentionSettings")
    variables = {f"AGENT_{name.upper()}" + ("_FILE" if secret else "") for name, secret in wanted.items()}
    assert set(yaml.safe_load((ROLE / "vars" / "main.yml").read_text())["__agent_environment"]) == variables


def test_the_defaults_use_the_stacks_own_model_and_reach_nothing_else(played: tuple[str, Path]) -> None:
    found = services(played, "nothing")
    environment = found["agent"]["environment"]
    assert environment["AGENT_MODEL_BASE_URL"] == "http://gateway.inference.internal:8000/v1"
    assert (environment["AGENT_MODEL_NAME"], environment["AGENT_TOOLS_ENABLED"]) == ("agent-model", "true")
    assert environment["AGENT_MODEL_API_KEY_FILE"] == environment["AGENT_TOOLS"] == environment["AGENT_FETCH_ALLOW"] == ""
    assert (environment["AGENT_CONTEXT_TOKENS"], environment["AGENT_MEMORY_ENABLED"]) == ("8192", "false")
    assert all(isinstance(value, str) for value in environment.values())
    assert found["agent"]["networks"] == ["data", "edge", "inference", "monitor"]
    for name in ("migrate", "keys", "retention"):
        assert found[name]["networks"] == ["data"]
        assert found[name]["profiles"]


def test_everything_that_can_be_said(played: tuple[str, Path]) -> None:
    environment = services(played, "much")["agent"]["environment"]
    assert environment["AGENT_MODEL_BASE_URL"] == "https://api.openai.com/v1"
    assert environment["AGENT_MODEL_NAME"] == "gpt-5"
    assert environment["AGENT_MODEL_API_KEY_FILE"] == "/run/secrets/model_api_key"
    # Compose reads two dollar signs as one.
    assert json.loads(environment["AGENT_MODEL_EXTRA_BODY"].replace("$$", "$")) == {"a": {"b": "$c"}}
    assert (environment["AGENT_TEMPERATURE"], environment["AGENT_TOOLS_ENABLED"]) == ("", "true")
    assert (environment["AGENT_TOOLS"], environment["AGENT_TOOLS_APPROVAL"]) == ("weather,wiki", "fetch_*,weather")
    assert json.loads(environment["AGENT_MCP_SERVERS"]) == {"files": "http://mcp.example.com:8000/mcp"}
    assert environment["AGENT_FETCH_ALLOW"] == "*.example.com,example.org"
    assert (environment["AGENT_MEMORY_ENABLED"], environment["AGENT_RETENTION_DAYS"]) == ("true", "0")


def test_the_readme_has_every_variable() -> None:
    readme = (ROLE / "README.md").read_text()
    variables = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    assert [name for name in variables if f"| `{name}` | " not in readme] == []


@pytest.mark.parametrize("name", [name for name in TAKEN if name.startswith("outside")])
def test_what_is_outside_needs_the_way_out(played: tuple[str, Path], name: str) -> None:
    assert "egress" in services(played, name)["agent"]["networks"]


@pytest.mark.parametrize(("number", "words"), [(number, words) for number, (_, words) in enumerate(REFUSED)], ids=lambda case: str(case)[:40])
def test_what_is_refused(played: tuple[str, Path], number: int, words: str) -> None:
    output, directory = played
    assert words in output, output
    assert not (directory / f"refused-{number}.yml").exists()


def test_users_wait_as_long_as_the_gateway_holds_requests() -> None:
    """A swap on one GPU holds them, and none may fail of it on the way."""
    defaults: dict[str, Any] = {}
    for role in ("vllm", "agent", "nginx_certbot"):
        defaults |= yaml.safe_load((ROOT / "roles" / role / "defaults" / "main.yml").read_text())
    assert defaults["vllm_hold_seconds"] <= defaults["agent_model_hold_seconds"]
    assert defaults["vllm_hold_seconds"] < defaults["agent_turn_timeout_seconds"] < defaults["nginx_certbot_read_timeout_seconds"]
