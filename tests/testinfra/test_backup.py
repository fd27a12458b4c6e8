"""The backups of the running Postgres, asked of pgBackRest, Postgres, systemd and Prometheus. What it writes is a segment of WAL."""

from __future__ import annotations

import json
import time

import pytest
from testinfra.host import Host

POSTGRES = "docker exec agent-stack-postgres-postgres-1"
PROGRAM = "python3 /opt/agent-stack/postgres/backup/backup.py /opt/agent-stack/postgres/backup/config.json"


def sql(host: Host, query: str) -> str:
    return str(host.check_output(f"{POSTGRES} psql --username=postgres --dbname=agent -At --command=%s", query))


def test_the_play_has_begun_a_full_backup(host: Host) -> None:
    deadline = time.monotonic() + 120
    while not (backups := json.loads(host.check_output(f"{POSTGRES} pgbackrest info --output=json"))[0]["backup"]):
        assert time.monotonic() < deadline, host.run("journalctl --no-pager -u agent-stack-backup").stdout
        time.sleep(2)
    assert backups[0]["type"] == "full"
    assert not backups[0]["error"]


def test_wal_arrives_in_the_repository(host: Host) -> None:
    assert sql(host, "SHOW archive_timeout") == "1min"
    segment = sql(host, "SELECT pg_walfile_name(pg_current_wal_lsn()) FROM (SELECT pg_logical_emit_message(true, 'test', 'x')) AS one")
    sql(host, "SELECT pg_switch_wal()")
    deadline = time.monotonic() + 30
    while json.loads(host.check_output(f"{POSTGRES} pgbackrest info --output=json"))[0]["archive"][-1]["max"] < segment:
        assert time.monotonic() < deadline, host.run("docker logs --tail 20 agent-stack-postgres-postgres-1").stderr
        time.sleep(1)


@pytest.mark.parametrize("unit", ["agent-stack-backup", "agent-stack-backup-drill", "agent-stack-backup-metrics"])
def test_the_timers_run_and_the_units_are_confined(host: Host, unit: str) -> None:
    assert host.service(f"{unit}.timer").is_running
    assert host.run(f"systemd-analyze security --no-pager --threshold=20 {unit}.service").rc == 0


@pytest.mark.parametrize("unit", ["agent-stack-backup", "agent-stack-backup-drill", "agent-stack-backup-metrics"])
def test_each_job_works_within_its_confinement(host: Host, unit: str) -> None:
    done = host.run(f"systemctl start {unit}.service")
    assert done.rc == 0, host.run(f"journalctl --no-pager -n 20 -u {unit}").stdout


def test_the_metrics_tell_of_it(host: Host) -> None:
    lines = host.check_output("cat /var/lib/agent-stack/textfile/backup.prom").splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values["agent_stack_backup_repository_up"] == "1"
    assert values["agent_stack_backup_drill_success"] == "1"
    assert float(values["agent_stack_backup_wal_waiting_seconds"]) < 60
    assert abs(float(values['agent_stack_backup_last_timestamp_seconds{type="full"}']) - time.time()) < 8 * 86400


def test_a_restore_over_the_living_cluster_needs_the_word(host: Host) -> None:
    refused = host.run(f"{PROGRAM} restore --check")
    assert refused.rc == 1
    assert "needs restore_replace=true" in refused.stdout
