"""The role `agent` knows every setting of the service, and refuses what the service would refuse, in the same terms."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import agent_settings
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles" / "agent"
SERVICE = agent_settings.load()
FIELDS = {**SERVICE.Settings.model_fields, **SERVICE.RetentionSettings.model_fields}
# Which secrets the service cannot do without; it takes a file for each.
REQUIRED = [SERVICE.variable(field, info) for field, info in FIELDS.items() if info.is_required()]
SETTINGS = json.loads((ROLE / "vars" / "settings.json").read_text())
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
      vars:
        role_path: ROLE
"""
SHARED = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "agent_stack_component_revision": "0",
    "agent_proxy_secret": "s" * 32,
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
    ({"agent_storage_mib": -1}, "agent_storage_mib is -1; allowed is a whole number from 0 to 1000000"),
    ({"agent_thread_mib": 0}, "agent_thread_mib is 0; allowed is a whole number from 1 to 64"),
    ({"agent_rate_limit": "200000/minute"}, 'agent_rate_limit is "200000/minute"; allowed is a count and a period, COUNT/PERIOD, such as 60/minute'),
    ({"agent_openai_body_kib": 63}, "agent_openai_body_kib is 63; allowed is a whole number from 64 to 65536"),
    ({"agent_system_prompt": " \n"}, 'agent_system_prompt is " \\n"; allowed is 1 to 20000 characters, not all of them white space'),
    ({"agent_searxng_url": "http://search:99999"}, 'agent_searxng_url is "http://search:99999"; allowed is an http or https URL'),
    ({"agent_otlp_endpoint": None}, 'agent_otlp_endpoint is "None"; allowed is an http or https URL'),
    ({"agent_model_extra_body": '{"a": 1}'}, "agent_model_extra_body has "),
    ({"agent_model_api_key": "two words"}, "agent_model_api_key has 9 characters; allowed are up to 512"),
    ({"agent_retention_schedule": "daily; rm"}, 'agent_retention_schedule is "daily; rm"; allowed is a systemd calendar event'),
]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One host for each case, in one play: what it said, and where the Compose files are."""
    directory = tmp_path_factory.mktemp("play")
    # Where a role's task finds the templates of the role agent_stack that it runs.
    (directory / "templates").symlink_to(ROOT / "roles" / "agent_stack" / "templates")
    for name in ("weather.py", "wiki.py"):
        (directory / name).write_text("tools = []\n")
    hosts = {**TAKEN, **{f"refused-{number}": values for number, (values, _) in enumerate(REFUSED)}}
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": SHARED}}))
    text = (
        PLAYBOOK.replace("STACK", str(ROOT / "roles" / "agent_stack"))
        .replace("TEMPLATE", str(ROLE / "templates" / "compose.yml.j2"))
        .replace("ROLE", str(ROLE))
    )
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


def test_the_generated_files_are_what_settings_py_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["agent_settings.py", "check"])
    assert agent_settings.main() == 0, capsys.readouterr().err


def test_a_secret_of_no_known_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(agent_settings.SECRETS, "proxy_secret")
    with pytest.raises(SystemExit, match=r"settings\.py has the secret proxy_secret, of which the role does not know the form"):
        agent_settings.files()


def test_a_file_that_is_not_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in ("vars", "defaults", "meta"):
        (tmp_path / directory).mkdir()
    monkeypatch.setattr(agent_settings, "ROOT", tmp_path)
    monkeypatch.setattr(agent_settings, "ROLE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["agent_settings.py", "write"])
    assert agent_settings.main() == 0
    (tmp_path / "defaults" / "main.yml").write_text("---\nagent_workers: 3\n")
    monkeypatch.setattr(sys, "argv", ["agent_settings.py", "check"])
    capsys.readouterr()
    assert agent_settings.main() == 1
    assert capsys.readouterr().err == "defaults/main.yml is not what settings.py says: run python tools/agent_settings.py write\n"


def test_every_setting_reaches_the_container(played: tuple[str, Path]) -> None:
    wanted = {SERVICE.variable(field, info) for field, info in FIELDS.items()}
    assert set(services(played, "nothing")["agent"]["environment"]) == wanted


def service(environment: dict[str, str], secret: Path) -> dict[str, Any]:
    """What the service makes of an environment. Raises SettingsError."""
    secrets = {name: str(secret) for name, value in environment.items() if name.endswith("_FILE") and value}
    values: dict[str, Any] = {}
    for kind in (SERVICE.Settings, SERVICE.RetentionSettings):
        values |= kind.from_environment(environment | secrets).model_dump()
    return values


def refusal(environment: dict[str, str]) -> str:
    """Why the service does not take an environment, beside which it has its passwords; nothing if it does."""
    try:
        service(dict.fromkeys(REQUIRED, "x") | environment, Path(__file__).parent / "data" / "one_line")
    except SERVICE.SettingsError as error:
        return str(error)
    return ""


def test_the_roles_defaults_are_the_services(played: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret\n")
    secrets = dict.fromkeys([*REQUIRED, "AGENT_PROXY_SECRET_FILE"], "x")
    assert service(services(played, "nothing")["agent"]["environment"], tmp_path / "secret") == service(secrets, tmp_path / "secret")


def test_a_name_that_docker_does_not_know_costs_less_than_a_login(played: tuple[str, Path]) -> None:
    """Of a database that is away. DNS servers out of reach would be asked for 10 seconds otherwise, once for each search domain."""
    options = dict(option.split(":") for option in services(played, "nothing")["agent"]["dns_opt"])
    # Postgres' connect_timeout in the service is 3 seconds.
    assert int(options["timeout"]) * int(options["attempts"]) < 3
    assert options["ndots"] == "1"


def test_nginx_writes_down_what_the_agent_takes_for_a_proxy_secret() -> None:
    (setting,) = (setting for setting in SETTINGS if setting["name"] == "agent_proxy_secret")
    check = (ROOT / "roles" / "nginx_certbot" / "tasks" / "check.yml").read_text()
    assert f"nginx_certbot_proxy_secret | string is match('{setting['pattern']}\\\\Z')" in check


def role_takes(setting: dict[str, Any], value: Any) -> bool:
    """What tasks/check.yml asks of a value; what it refuses in fact is a table above."""
    if setting["type"] == "bool":
        return isinstance(value, bool)
    texts = [str(part) for part in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value])]
    pattern = f"({setting['pattern']}{'|' if setting['optional'] else ''})\\Z"
    names = [re.match(f"({setting['key_pattern']})\\Z", name) for name in value] if "key_pattern" in setting else []
    within = texts == [""] or "min" not in setting or all(setting["min"] <= float(text) <= setting["max"] for text in texts if re.match(pattern, text))
    return within and all(re.match(pattern, text) for text in texts) and all(names)


def texts_for(setting: dict[str, Any]) -> st.SearchStrategy[str]:
    """Texts that have the form, that nearly have it, and any."""
    near = st.from_regex(f"(?:{setting['pattern']})\\Z", fullmatch=True)
    numbers = [str(setting[end] + step) for end in ("min", "max") if end in setting for step in (-1, 0, 1)]
    broken = st.tuples(near, st.sampled_from(["", " ", "\n", "0", "/", ":99999", "\u0661", ",", "\0"])).map("".join)
    return st.one_of(near, broken, st.text(max_size=50), st.sampled_from([*numbers, "", " ", "\n\t"]))


def values_for(setting: dict[str, Any]) -> st.SearchStrategy[Any]:
    if setting["type"] == "bool":
        return st.booleans()
    texts = texts_for(setting)
    if setting["type"] == "list":
        return st.lists(texts, max_size=3)
    if "key_pattern" in setting:
        return st.dictionaries(st.one_of(st.from_regex(setting["key_pattern"], fullmatch=True), st.text(max_size=20)), texts, max_size=3)
    if setting["type"] == "dict":
        leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
        return st.dictionaries(st.text(max_size=10), st.recursive(leaves, lambda part: st.lists(part, max_size=2), max_leaves=4), max_size=3)
    return texts


PASSED_ON = [setting for setting in SETTINGS if setting["env"] and not setting["secret"] and setting["name"] != "agent_tool_files"]


@settings(deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("setting", PASSED_ON, ids=lambda setting: setting["name"])
def test_what_the_role_lets_through_the_service_takes(setting: dict[str, Any], data: st.DataObject) -> None:
    value = data.draw(values_for(setting))
    if setting["type"] == "bool":
        text = str(value).lower()
    elif setting["type"] == "dict":
        text = json.dumps(value)
    else:
        text = ",".join(value) if setting["type"] == "list" else value
    takes = role_takes(setting, value)
    # Of the stack's own model the role passes on what the service has as its default.
    given_by_role = {} if text == "" and setting["name"] in {"agent_model_url", "agent_model_name"} else {setting["env"]: text}
    room = {"agent_max_tokens": {"AGENT_CONTEXT_TOKENS": "10000000"}, "agent_context_tokens": {"AGENT_MAX_TOKENS": "1"}}.get(setting["name"], {})
    problem = refusal(room | given_by_role)
    assert not (takes and problem)
    # A text has one pattern for both. The service reads numbers in more ways than the role, and lists and JSON from one text.
    assert problem or takes or setting["type"] != "str" or "min" in setting, text


@settings(deadline=None)
@given(context=st.integers(0, 3000), answer=st.integers(0, 3000))
@example(context=1280, answer=1024)
@example(context=1279, answer=1024)
def test_both_leave_the_same_room_for_the_question(context: int, answer: int) -> None:
    numbers = {"agent_context_tokens": context, "agent_max_tokens": answer}
    takes = context >= answer + 256 and all(role_takes(setting, numbers[setting["name"]]) for setting in SETTINGS if setting["name"] in numbers)
    assert takes == (not refusal({"AGENT_CONTEXT_TOKENS": str(context), "AGENT_MAX_TOKENS": str(answer)}))


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if "min" in setting], ids=lambda setting: setting["name"])
def test_the_ends_of_each_range_are_in_it(setting: dict[str, Any]) -> None:
    assert [role_takes(setting, number) for number in (setting["min"], setting["max"], setting["max"] + 1)] == [True, True, False]
    assert setting["min"] == 0 or not role_takes(setting, setting["min"] - 1)


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
