"""Bad values stop the play before its first change, with the variable, the value and what is allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import demo
import pytest

from .conftest import Play

DAEMON_JSON = "/etc/docker/daemon.json"
INVENTORY_CASES = [
    ({"agent_stack_domain": ""}, 'agent_stack_domain is "" allowed is a DNS name'),
    ({"agent_stack_domain": "agent example.com"}, 'agent_stack_domain is "agent example.com" allowed is a DNS name'),
    ({"agent_stack_domain": "agent.$(id).com"}, "agent_stack_domain is agent.$(id).com allowed is a DNS name"),
    ({"agent_stack_email": "nobody"}, "agent_stack_email is nobody allowed is an e-mail address"),
    ({"agent_stack_image_source": "hub"}, "agent_stack_image_source must be one of: registry, build, archive, got: hub"),
    ({"vllm_device": "tpu"}, "vllm_device must be one of: cuda, cpu, got: tpu"),
    ({"vllm_model": ""}, 'vllm_model is "" allowed is an id on the model hub'),
    ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization is 1.5 allowed is 0.01 to 1.0"),
    ({"agent_port": 70000}, "agent_port is 70000 allowed is 1024 to 65535"),
    ({"agent_port": 0}, "agent_port is 0 allowed is 1024 to 65535"),
    ({"agent_port": "80; x"}, "agent_port 80; x int"),
    ({"agent_rate_limit": "many"}, "agent_rate_limit is many allowed is a count and a period"),
    ({"postgres_agent_password": "short"}, "postgres_agent_password has 5 characters allowed are at least 12"),
    ({"redis_agent_password": ""}, "redis_agent_password has 0 characters allowed are at least 12"),
    ({"nginx_certbot_password": "short"}, "nginx_certbot_password too short Allowed: 12 characters"),
    ({"monitoring_retention_days": 0}, "monitoring_retention_days is 0 allowed"),
]


@pytest.mark.parametrize(("values", "words"), INVENTORY_CASES, ids=lambda case: str(case)[:60])
def test_bad_inventory_stops_before_the_first_change(play: Callable[..., Play], values: dict[str, object], words: str) -> None:
    result = play("-e", json.dumps({**values, "agent_stack_secure_logging": False}))
    assert result.returncode != 0
    assert result.recap["changed"] == 0
    message = " ".join(result.output[result.output.index("[ERROR]") :].split())
    assert [word for word in words.split() if word not in message] == [], message


@pytest.mark.parametrize("name", ["agent_stack_domain", "agent_stack_email", "vllm_model"])
def test_missing_required_value(play: Callable[..., Play], tmp_path: Path, name: str) -> None:
    inventory = tmp_path / "inventory"
    shutil.copytree(demo.INVENTORY, inventory)
    variables = inventory / "group_vars" / "all" / "main.yml"
    lines = variables.read_text().splitlines(keepends=True)
    variables.write_text("".join(line for line in lines if not line.startswith(f"{name}:")))
    result = play(inventory=inventory)
    assert result.returncode != 0
    assert result.recap["changed"] == 0
    assert f"missing required arguments: {name}" in " ".join(result.output.split())


def test_a_broken_daemon_json_is_refused_and_left_alone(play: Callable[..., Play], on_host: Callable[..., str]) -> None:
    broken = '{"log-driver": "json-file",}'
    on_host("cp", "--archive", DAEMON_JSON, f"{DAEMON_JSON}.drill")
    try:
        on_host("tee", DAEMON_JSON, stdin=broken)
        result = play("--tags", "docker")
        assert (result.returncode, result.recap["changed"]) == (2, 0), result.output[-3000:]
        assert f"{DAEMON_JSON} on the host is not a JSON object. Repair it or move it away; it was not changed." in " ".join(result.output.split())
        assert on_host("cat", DAEMON_JSON) == broken
    finally:
        on_host("mv", f"{DAEMON_JSON}.drill", DAEMON_JSON)


CHAT_CASES = {
    "not JSON": (b"{", range(400, 423)),
    "a list": (b"[]", range(400, 423)),
    "no message": (b"{}", range(400, 423)),
    "empty message": (b'{"message": ""}', range(400, 423)),
    "blank message": (b'{"message": " "}', range(400, 423)),
    "1 MB message": (b'{"message": "' + b"a" * 1_000_000 + b'"}', range(413, 414)),
    "NUL": (b'{"message": "a\\u0000"}', range(400, 423)),
    "thread of another form": (b'{"message": "a", "thread_id": "../x"}', range(400, 423)),
}


@pytest.mark.parametrize("case", CHAT_CASES)
def test_bad_request_gets_a_short_json_error(https: Callable[..., tuple[int, bytes]], secrets: dict[str, str], case: str) -> None:
    body, allowed = CHAT_CASES[case]
    status, answer = https("/chat", body, secrets["nginx_certbot_password"])
    assert status in allowed, answer
    assert len(answer) < 500
    assert set(json.loads(answer)) == {"error"}
    assert b"Traceback" not in answer
