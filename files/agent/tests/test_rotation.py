"""Passwords and the secret of the proxy change while turns are asked for; the service is not restarted. playbooks/rotate.yml has the same order."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from servers import ODD_PASSWORD, PROXY_SECRET, REDIS_COMMANDS, Agent, Postgres, Redis

NEW = "another password' \\ of now"
NEW_PROXY_SECRET = "n" * 32
# Contract: a new turn is held at most so long.
HELD_SECONDS = 5


def replace(file: Path, text: str) -> None:
    """As Ansible does: another file of the same name."""
    new = file.with_name("new")
    new.write_text(text)
    new.replace(file)


def accept(redis: Redis, *passwords: str) -> None:
    """Have Redis take these passwords of the agent and no other, by the restart that a recreated container is."""
    digests = " ".join(f"#{hashlib.sha256(password.encode()).hexdigest()}" for password in passwords)
    redis.acl.write_text(f"user default off\nuser agent on {digests} ~agent:* resetchannels -@all {REDIS_COMMANDS}\n")
    redis.stop()
    redis.start()


def alter(postgres: Postgres, password: str) -> None:
    with psycopg.connect(postgres.admin(), autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER ROLE agent PASSWORD {}").format(sql.Literal(password)))


def cut(postgres: Postgres) -> None:
    """End the agent's connections, so that it has to log in again."""
    postgres.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'agent'")


class Load:
    """Turns, one after the other in some threads, each as nginx asks at that moment."""

    def __init__(self, service: Agent, threads: int) -> None:
        self._service = service
        self.proxy_secret = PROXY_SECRET
        self.answers: list[tuple[int, float]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self) -> None:
        while not self._over.is_set():
            started = time.monotonic()
            answer = self._service.chat("hello", **{"X-Proxy-Secret": self.proxy_secret})
            self.answers.append((answer.status_code, time.monotonic() - started))


@pytest.fixture
def _as_before(migrated: Postgres, redis: Redis) -> Iterator[None]:
    yield
    alter(migrated, ODD_PASSWORD)
    accept(redis, ODD_PASSWORD)


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_turn_fails_while_secrets_are_rotated(start_agent: Callable[..., Agent], migrated: Postgres, redis: Redis, workers: str) -> None:
    service = start_agent(AGENT_WORKERS=workers)
    password, proxy_secret = (service.directory / name for name in ("password", "proxy_secret"))
    with Load(service, 4) as load:
        time.sleep(1)
        accept(redis, NEW, ODD_PASSWORD)
        for file, old, new in ((password, ODD_PASSWORD, NEW), (proxy_secret, PROXY_SECRET, NEW_PROXY_SECRET)):
            replace(file.with_name(f"{file.name}.previous"), old)
            replace(file, new)
        time.sleep(1)
        alter(migrated, NEW)
        load.proxy_secret = NEW_PROXY_SECRET
        time.sleep(1)
        # Those that were asked with the secret before are answered by now.
        for file in (password, proxy_secret):
            replace(file.with_name(f"{file.name}.previous"), "")
        accept(redis, NEW)
        time.sleep(1)
    assert len(load.answers) > 20
    assert {status for status, _ in load.answers} == {200}
    assert max(seconds for _, seconds in load.answers) < HELD_SECONDS
    assert service.chat("hello", **{"X-Proxy-Secret": PROXY_SECRET}).status_code == 401
    # It logs in with the new ones.
    cut(migrated)
    assert service.chat("hello", **{"X-Proxy-Secret": NEW_PROXY_SECRET}).status_code == 200
    assert service.client.get("/ready").status_code == 200
    assert NEW not in service.log.read_text()
    assert ODD_PASSWORD not in service.log.read_text()


@pytest.mark.usefixtures("_as_before")
def test_it_logs_in_with_either_password_while_one_is_rotated(start_agent: Callable[..., Agent], migrated: Postgres) -> None:
    service = start_agent()
    password = service.directory / "password"
    replace(password.with_name("password.previous"), ODD_PASSWORD)
    replace(password, NEW)
    for known in (ODD_PASSWORD, NEW):
        alter(migrated, known)
        cut(migrated)
        assert service.chat("hello").status_code == 200, known
    # And with no other: the test can fail.
    replace(password.with_name("password.previous"), "")
    alter(migrated, ODD_PASSWORD)
    cut(migrated)
    assert service.chat("hello").status_code == 503
