"""What a model server's container is, for hosts as unlike as they can be, compared with a table: by itself, and as Ansible comes to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm_cases
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _topology, _vllm_service
from programs import ROOT, load

model_server = load("tests/model_server/server.py")
ROLE = ROOT / "roles" / "vllm"
TABLE = ROOT / "tests" / "unit" / "data" / "vllm_services.json"


def render(directory: Path, inventory: dict[str, Any]) -> dict[str, Any]:
    """Have Ansible say what the model server of every host is, with the roles' defaults and variables. A plan that a case lacks is not made there either."""
    defaults: dict[str, Any] = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "agent_stack_image_source": "registry"}
    for name in ("agent_stack", "vllm"):
        defaults = yaml.safe_load((ROOT / "roles" / name / "defaults" / "main.yml").read_text()) | defaults
    (directory / "group_vars").mkdir()
    (directory / "group_vars" / "all.yml").write_text(yaml.safe_dump(defaults))
    (directory / "hosts.yml").write_text(yaml.safe_dump(inventory))
    copy = {"content": "{{ __vllm_service | to_json }}", "dest": f"{directory}/{{{{ inventory_hostname }}}}.json", "mode": "0600"}
    play = {
        "hosts": "all:!front",
        "gather_facts": False,
        "vars_files": [str(ROOT / "roles" / name / "vars" / "main.yml") for name in ("agent_stack", "vllm")],
        "vars": {"role_path": str(ROLE)},
        "tasks": [{"ansible.builtin.copy": copy}],
    }
    (directory / "play.yml").write_text(yaml.safe_dump([play]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return {file.stem: json.loads(file.read_text()) for file in directory.glob("*.json")}


def table() -> dict[str, Any]:
    return dict(json.loads(TABLE.read_text()))


def settings_of(case: dict[str, Any], image: str) -> _vllm_service.Settings:
    """What the lookup makes of a case's variables and the role's defaults."""
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    stack = {"agent_stack_root": "/opt/agent-stack", "agent_stack_data_dir": "/var/lib/agent-stack"}
    values = defaults | stack | {"vllm_sleep_mode": case.get("vllm_device", "cuda") == "cuda"} | case
    return _vllm_service.read_settings(values, image)


def topology_of(host: str) -> _topology.Topology:
    if host in vllm_cases.ALONE:
        return _topology.topology(host, {"all": list(vllm_cases.ALONE)}, lambda _host, _name: "")
    cases = vllm_cases.cases()
    groups = {group: list(hosts) for group, hosts in vllm_cases.TOGETHER.items() if group}
    groups["all"] = [name for hosts in vllm_cases.TOGETHER.values() for name in hosts]
    return _topology.topology(host, groups, lambda name, variable: str(cases.get(name, {}).get(variable, "")))


@pytest.mark.parametrize("host", vllm_cases.cases())
def test_a_server_is_what_the_table_says(host: str) -> None:
    case, row = vllm_cases.cases()[host], table()[host]
    plan = case.get("__vllm_plan", {})
    found = _vllm_service.describe(settings_of(case, row["definition"]["image"]), topology_of(host), plan)
    assert found == row
    # In the same order, so that the file that Compose reads is the same to the byte.
    assert json.dumps(found["definition"]) == json.dumps(row["definition"])


@pytest.mark.parametrize("name", vllm_cases.inventories())
def test_ansible_comes_to_the_same(name: str, tmp_path: Path) -> None:
    rendered = render(tmp_path, vllm_cases.inventories()[name])
    assert rendered
    for host, service in rendered.items():
        assert service == table()[host], host


def test_the_table_has_a_row_for_every_host() -> None:
    assert sorted(table()) == sorted(vllm_cases.cases())


CASE = {"vllm_model": "Qwen/Qwen3-8B"}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("vllm_max_model_len", "8k", "vllm_max_model_len is '8k'; allowed is a whole number."),
        ("vllm_max_model_len", None, "vllm_max_model_len is None; allowed is a whole number."),
        ("vllm_gpu_memory_utilization", "most", "vllm_gpu_memory_utilization is 'most'; allowed is a number."),
        ("vllm_sleep_mode", "perhaps", "vllm_sleep_mode is 'perhaps'; allowed is true or false."),
        ("vllm_extra_arguments", "--seed 7", "vllm_extra_arguments is '--seed 7'; allowed is a list."),
    ],
)
def test_a_setting_of_the_wrong_form_is_a_sentence(variable: str, value: Any, said: str) -> None:
    with pytest.raises(_vllm_service.SettingsError) as caught:
        settings_of(CASE | {variable: value}, "image")
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("vllm_max_model_len", "8192", 8192),
        ("vllm_gpu_memory_utilization", "0.90", 0.9),
        ("vllm_gpu_memory_utilization", 1, 1.0),
        ("vllm_sleep_mode", "false", False),
        ("vllm_extra_arguments", ["--seed", 7], ["--seed", "7"]),
    ],
)
def test_a_value_given_as_text_is_the_same_server(variable: str, text: Any, value: Any) -> None:
    """`-e` gives all as text. Another definition would be a swap."""
    services = [_vllm_service.describe(settings_of(CASE | {variable: given}, "image"), topology_of("cuda-planned"), {}) for given in (text, value)]
    assert json.dumps(services[0]) == json.dumps(services[1])


def test_the_token_is_not_in_what_is_shown() -> None:
    settings = settings_of(CASE | {"vllm_hf_token": "hf_secret"}, "image")
    assert "hf_secret" not in repr(settings)
    assert "hf_secret" not in json.dumps(_vllm_service.describe(settings, topology_of("cuda-planned"), {}))


def test_the_role_knows_the_servers_user() -> None:
    assert yaml.safe_load((ROLE / "vars" / "main.yml").read_text())["__vllm_uid"] == _vllm_service.UID


def test_the_roles_variables_are_data() -> None:
    lines = (ROLE / "vars" / "main.yml").read_text().splitlines()
    assert len(lines) < 50
    assert [line for line in lines if "{{" in line and "}}" not in line] == []
    assert [line for line in lines if line.rstrip().endswith((">-", "|", ">"))] == []


@pytest.mark.parametrize("host", ["cpu-path", "cuda-planned", "third"])
def test_the_servers_user_has_a_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted server fails as vLLM does where neither the environment nor the system has one."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(os, "environ", table()[host]["definition"]["environment"])
    assert model_server.user_name() == "vllm"
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(KeyError, match="uid not found"):
        model_server.user_name()


@pytest.mark.parametrize("host", ["cuda-planned", "cuda-several", "third"])
def test_what_is_compiled_outlives_the_container(host: str) -> None:
    definition = table()[host]["definition"]
    assert f"{table()[host]['cache']}:/cache" in definition["volumes"]
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "PYTHONPYCACHEPREFIX"):
        assert Path(definition["environment"][name]).is_relative_to("/cache"), name


def test_another_image_is_another_meeting_port_and_cache() -> None:
    """Both servers may be there at once, and the followers of the one that serves must stay."""
    one, other = (_vllm_service.describe(settings_of(vllm_cases.cases()["head"], image), topology_of("head"), {}) for image in ("a:1", "a:2"))
    assert one["follower"] != other["follower"]
    assert one["cache"] != other["cache"]


DRAFT = {"method": "draft_model", "model": "someone/draft", "revision": "v1", "num_speculative_tokens": 3}


def test_what_guesses_ahead_is_fetched_and_found_in_the_container() -> None:
    """The server reaches no hub, so it must not be told the name that the model has there."""
    settings = settings_of({"vllm_model": "Qwen/Qwen3-8B", "vllm_speculative_config": DRAFT, "vllm_hf_token": "secret"}, "image")
    plan = {"model_arguments": ["--speculative-config", json.dumps(DRAFT), "--reasoning-parser", "qwen3"]}
    service = _vllm_service.describe(settings, topology_of("cuda-planned"), plan)
    command = service["definition"]["command"]
    place = command.index("--speculative-config")
    assert json.loads(command[place + 1]) == {"method": "draft_model", "model": "/draft", "num_speculative_tokens": 3}
    assert command[place + 2 : place + 4] == ["--reasoning-parser", "qwen3"]
    assert "/var/lib/agent-stack/models/someone--draft--v1:/draft:ro" in service["definition"]["volumes"]
    assert service["more_fetches"] == {
        "fetch-draft": [
            *("python3", "/etc/agent-stack/fetch_model.py", "--to", "/models/someone--draft--v1", "--hub", "someone/draft"),
            *("--revision", "v1", "--token-file", "/run/secrets/hf_token"),
        ]
    }


@pytest.mark.parametrize(
    ("config", "more", "model"),
    [
        ({"method": "ngram", "num_speculative_tokens": 2}, {}, None),
        ({"method": "mtp", "model": "Qwen/Qwen3-8B", "num_speculative_tokens": 1}, {}, "/models/Qwen--Qwen3-8B--main"),
        ({"model": "/models/draft", "num_speculative_tokens": 1}, {}, "/models/draft"),
        ({"model": "/models/draft", "num_speculative_tokens": 1}, {"vllm_model": "/srv/models/first"}, "/models/draft"),
    ],
    ids=["no model", "the served model's own head", "a directory", "a directory beside a model that is one"],
)
def test_what_else_guesses_ahead_is_not_fetched(config: dict[str, Any], more: dict[str, Any], model: str | None) -> None:
    settings = settings_of({"vllm_model": "Qwen/Qwen3-8B", "vllm_speculative_config": config} | more, "image")
    plan = {"model_arguments": ["--speculative-config", json.dumps(config)]}
    service = _vllm_service.describe(settings, topology_of("cuda-planned"), plan)
    command = service["definition"]["command"]
    assert json.loads(command[command.index("--speculative-config") + 1]).get("model") == model
    assert not service["more_fetches"]
    assert not [volume for volume in service["definition"]["volumes"] if volume.endswith(":/draft:ro")]


def test_a_draft_that_is_no_dictionary_is_refused() -> None:
    with pytest.raises(_vllm_service.SettingsError, match=r"vllm_speculative_config is 'mtp'; allowed is a dictionary\."):
        settings_of({"vllm_model": "Qwen/Qwen3-8B", "vllm_speculative_config": "mtp"}, "image")
