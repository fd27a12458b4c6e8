"""Read-only questions to the running Postgres and Redis; usable against production."""

from __future__ import annotations

import pytest
from testinfra.host import Host

POSTGRES = "docker compose --file /opt/agent-stack/postgres/compose.yml exec --no-TTY postgres"
REDIS = "docker compose --file /opt/agent-stack/redis/compose.yml exec --no-TTY redis"


def sql(host: Host, query: str) -> str:
    return str(host.check_output(f"{POSTGRES} psql --username=postgres --dbname=agent -At --command=%s", query))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("password_encryption", "scram-sha-256"), ("data_checksums", "on"), ("full_page_writes", "on"), ("fsync", "on"), ("log_statement", "none")],
)
def test_postgres_runs_with(host: Host, setting: str, value: str) -> None:
    assert sql(host, f"SHOW {setting}") == value


def test_no_login_of_ours_is_powerful(host: Host) -> None:
    query = "SELECT string_agg(rolname, ',' ORDER BY rolname) FROM pg_roles WHERE rolcanlogin AND NOT (rolsuper OR rolcreaterole OR rolcreatedb)"
    assert sql(host, query) == "agent,exporter"
    assert sql(host, "SELECT pg_has_role('agent', 'pg_execute_server_program', 'member')") == "f"


def test_every_password_is_a_scram_verifier(host: Host) -> None:
    query = "SELECT bool_and(rolpassword LIKE 'SCRAM-SHA-256$%') FROM pg_authid WHERE rolname IN ('agent', 'exporter')"
    assert sql(host, query) == "t"
    assert sql(host, "SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = 'postgres'") == "t"


def test_postgres_refuses_a_login_without_password(host: Host) -> None:
    for user in ("agent", "postgres"):
        answer = host.run(f"{POSTGRES} psql --no-password --host=127.0.0.1 --username={user} --dbname=agent --command='SELECT 1'")
        assert answer.rc != 0


def test_conversations_are_migrated(host: Host) -> None:
    assert int(sql(host, "SELECT count(*) FROM checkpoint_migrations")) > 0


def test_redis_refuses_who_has_no_login(host: Host) -> None:
    assert "NOAUTH" in host.run(f"{REDIS} redis-cli PING").stdout


@pytest.mark.parametrize("command", ["INFO", "CONFIG GET maxmemory", "FLUSHALL", "KEYS x", "GET x"])
def test_the_health_login_may_only_ping(host: Host, command: str) -> None:
    login = f"{REDIS} redis-cli --user health --pass health --no-auth-warning"
    assert host.check_output(f"{login} PING") == "PONG"
    assert "NOPERM" in host.run(f"{login} {command}").stdout
