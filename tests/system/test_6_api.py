"""The agent's other doors, through nginx: API keys that come and go, streams, the page, OpenAI's API."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import demo
import pytest
import yaml

from .conftest import Play

Https = Callable[..., tuple[int, bytes]]
KEYS = demo.INVENTORY / "group_vars" / "all" / "api_keys.yml"
PLAYBOOK = "playbooks/api_keys.yml"
MESSAGE = json.dumps({"message": "Say hello."}).encode()


@pytest.fixture(scope="module")
def keys(play: Callable[..., Play]) -> Iterator[Path]:
    made = play("-e", json.dumps({"api_keys": ["drill"]}), playbook=PLAYBOOK)
    assert made.returncode == 0, made.output
    assert made.recap["changed"] > 0
    yield KEYS
    KEYS.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def key(keys: Path) -> str:
    value: str = yaml.safe_load(keys.read_text())["agent_api_keys"]["drill"]
    return value


def test_the_keys_are_the_owners_alone(keys: Path) -> None:
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600


def test_a_second_run_makes_no_second_key(play: Callable[..., Play], key: str) -> None:
    again = play("-e", json.dumps({"api_keys": ["drill"]}), playbook=PLAYBOOK)
    assert (again.returncode, again.recap["changed"]) == (0, 0), again.output
    assert key not in again.output


def test_a_stream_by_key(https: Https, key: str) -> None:
    status, body = https("/chat/stream", MESSAGE, key=key)
    assert status == 200
    events = [line.removeprefix("event: ") for line in body.decode().splitlines() if line.startswith("event: ")]
    assert (events[0], events[-1]) == ("run", "end")
    assert "token" in events


def test_openai_by_key(https: Https, key: str) -> None:
    asked = json.dumps({"model": "agent", "messages": [{"role": "user", "content": "Say hello."}]}).encode()
    status, body = https("/openai/v1/chat/completions", asked, key=key)
    assert status == 200, body
    assert json.loads(body)["choices"][0]["message"]["content"]


def test_threads_are_their_owners(https: Https, key: str, secrets: dict[str, str]) -> None:
    thread = json.loads(https("/chat", MESSAGE, key=key)[1])["thread_id"]
    assert https(f"/threads/{thread}", key=key)[0] == 200
    assert https(f"/threads/{thread}", password=secrets["nginx_certbot_password"])[0] == 404


def test_the_page_is_behind_the_login(https: Https, secrets: dict[str, str]) -> None:
    assert https("/")[0] == 401
    status, body = https("/", password=secrets["nginx_certbot_password"])
    assert status == 200
    assert b"<!doctype html>" in body.lower()


def test_a_revoked_key_is_out_within_five_seconds(https: Https, play: Callable[..., Play], key: str) -> None:
    assert https("/threads/count", b"{}", key=key)[0] == 200
    revoked = play("-e", json.dumps({"api_keys_revoked": ["drill"]}), playbook=PLAYBOOK)
    assert revoked.returncode == 0, revoked.output
    time.sleep(5)
    assert https("/threads/count", b"{}", key=key)[0] == 401
