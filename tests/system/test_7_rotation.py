"""All secrets are rotated while turns are asked for: none fails, none waits long, and the old ones are refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import demo
import yaml

from .conftest import Play

Https = Callable[..., tuple[int, bytes]]
# What a user may wait for a new turn beyond the model's own time; the contract of a rotation.
HELD_SECONDS = 5
PAUSE_SECONDS = 2
KEPT = {"monitoring_grafana_password", "postgres_backup_cipher_pass"}


def kept_file() -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = yaml.safe_load(demo.SECRETS.read_text())
    return content


class Load:
    """Turns with an API key, one after the other, each with its status and its seconds."""

    def __init__(self, https: Https, key: str) -> None:
        self._https = https
        self._key = key
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.answers: list[tuple[int, float]] = []

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(180)

    def _ask(self) -> None:
        while not self._over.is_set():
            started = time.monotonic()
            status, _ = self._https("/chat", json.dumps({"message": "Say yes."}).encode(), key=self._key)
            self.answers.append((status, time.monotonic() - started))
            # No more than the limits allow of one owner.
            self._over.wait(PAUSE_SECONDS)


def test_all_secrets_are_rotated_under_load(play: Callable[..., Play], https: Https, wait_until_ready: Callable[[float], float]) -> None:
    wait_until_ready(60)
    before = kept_file()["agent_stack_secrets"]
    made = play("-e", json.dumps({"api_keys": ["rotation"]}), playbook="playbooks/api_keys.yml")
    assert made.returncode == 0, made.output[-3000:]
    key = yaml.safe_load(demo.SECRETS.with_name("api_keys.yml").read_text())["agent_api_keys"]["rotation"]
    try:
        with Load(https, key) as quiet:
            time.sleep(20)
        with Load(https, key) as load:
            said = play(playbook="playbooks/rotate.yml")
        assert said.returncode == 0, said.output[-6000:]
    finally:
        play("-e", json.dumps({"api_keys_revoked": ["rotation"]}), playbook="playbooks/api_keys.yml")
    after = kept_file()
    assert {name for name in before if after["agent_stack_secrets"][name] == before[name]} == KEPT
    assert not after["agent_stack_secrets_previous"]
    assert not [name for name, value in {**before, **after["agent_stack_secrets"]}.items() if value in said.output]
    assert {status for status, _ in load.answers} == {200}
    longest, usual = (max(seconds for _, seconds in each.answers) for each in (load, quiet))
    print(f"{len(load.answers)} turns, the longest {longest:.1f} s, without a rotation {usual:.1f} s")
    assert longest < usual + HELD_SECONDS
    # What the play itself asks too, from outside.
    assert https("/threads/search", b"{}", before["nginx_certbot_password"])[0] == 401
    assert https("/threads/search", b"{}", after["agent_stack_secrets"]["nginx_certbot_password"])[0] == 200
    again = play()
    assert again.returncode == 0, again.output[-3000:]
    assert again.recap["changed"] == 0, again.output[-6000:]
