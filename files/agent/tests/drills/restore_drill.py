"""The volume of Postgres is deleted under load and restored to a second, and every turn that a client was promised until then is looked for.

    python tests/drills/restore_drill.py [--rounds 5] [--seconds 20] [--clients 8]

The service, Postgres and pgBackRest are the real ones, and the program that backs up and restores is the host's. In each round clients have turns, a
second is chosen, they go on, the data directory is deleted below the running server, and the restore goes to that second. The last line is JSON:

acknowledged     turns that were acknowledged before the second of their round
lost             of these, the ones that are not in their thread with an answer
doubled          turns that are in their thread more than once
later            turns that began after the second, and are there
undone           turns that began and were acknowledged after the second, and are gone as they must be
broken           threads that are no sequence of questions and answers
restore_seconds  the longest restore, until the server takes writes
ready_seconds    the longest time from the start of the restore to the first turn that the service answers
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parents[2] / "tests" / "unit")]

from backup_host import Stack, backup  # noqa: E402

from drills.kill_drill import Client, Journal, questions  # noqa: E402
from servers import ODD_PASSWORD, Agent, Model, Redis, environment, migrate  # noqa: E402

PATIENCE_SECONDS = 120


@dataclass
class Report:
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    later: int = 0
    undone: int = 0
    broken: list[str] = field(default_factory=list)
    restore_seconds: float = 0.0
    ready_seconds: float = 0.0


class Postgres:
    """What the service's servers need to know of the one that is backed up."""

    def __init__(self, stack: Stack) -> None:
        self.port = stack.server.port
        admin = psycopg.conninfo.make_conninfo(host=stack.server.socket, port=self.port, user="postgres", dbname="agent")
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("CREATE ROLE agent LOGIN PASSWORD {}").format(psycopg.sql.Literal(ODD_PASSWORD)))
            connection.execute("ALTER DATABASE agent OWNER TO agent")
            connection.execute("GRANT ALL ON SCHEMA public TO agent")


def play_round(number: int, stack: Stack, service: Agent, seconds: float, clients: int, report: Report) -> None:
    journal = Journal(stack.directory / f"journal-{number}")
    threads = [Client(service, journal, 1000 * number + each) for each in range(clients)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(seconds / 2)
        stack.program.backup("auto", fast=True)
        time.sleep(seconds / 2)
        chosen = time.time()
        time.sleep(max(3.0, seconds / 4))
        wait_for_archive(stack, chosen)
        # The server still runs, and makes new files meanwhile.
        shutil.rmtree(stack.config.cluster, ignore_errors=True)
    finally:
        for thread in threads:
            thread.stopping.set()
    stack.server.crash()
    shutil.rmtree(stack.config.cluster, ignore_errors=True)
    for thread in threads:
        thread.join()
    began = time.monotonic()
    restored = stack.program.restore(backup.as_utc(chosen), replace=False, other_cluster=False)
    report.restore_seconds = max(report.restore_seconds, restored["seconds"])
    while service.client.post("/chat", json={"message": "are you back?", "thread_id": f"back-{number}"}).status_code != 200:
        assert time.monotonic() - began < PATIENCE_SECONDS, "the service does not come back"
        time.sleep(0.1)
    report.ready_seconds = max(report.ready_seconds, round(time.monotonic() - began, 1))
    judge(service, journal, chosen, report)


def wait_for_archive(stack: Stack, since: float) -> None:
    """Wait until a segment that was begun after that time is in the repository."""
    deadline = time.monotonic() + 60
    count = "SELECT count(*) FROM pg_stat_archiver WHERE last_archived_time > to_timestamp({})"
    while stack.server.sql(count.format(since + 2 * stack.server.archive_timeout)) == "0":
        assert time.monotonic() < deadline, "no WAL was archived"
        time.sleep(0.2)


def judge(service: Agent, journal: Journal, chosen: float, report: Report) -> None:
    """Read every thread, and compare it with what the clients wrote down."""
    asked: dict[str, float] = {}
    told: dict[str, float] = {}
    threads: set[str] = set()
    for line in journal.path.read_text().splitlines():
        at, what, turn_id, thread_id = json.loads(line)
        threads.add(thread_id)
        if what == "invoke":
            asked[turn_id] = at
        elif what == "ack":
            told[turn_id] = at
    stored: Counter[str] = Counter()
    for thread in sorted(threads):
        answer = service.client.get(f"/threads/{thread}/state")
        if answer.status_code == 404:
            continue
        answer.raise_for_status()
        texts, problem = questions(answer.json()["values"].get("messages", []))
        # A run that the chosen second cut off goes on after the restore, and is no fault.
        if problem not in (None, "the last question has no answer", "a question without an answer"):
            report.broken.append(f"{thread}: {problem}")
        for text in texts:
            stored.update(re.findall(r"[0-9a-f]{32}", text))
    promised = [turn_id for turn_id, at in told.items() if at <= chosen]
    report.acknowledged += len(promised)
    report.lost += len([turn_id for turn_id in promised if not stored[turn_id]])
    report.doubled += len([turn_id for turn_id, count in stored.items() if count > 1])
    report.undone += len([turn_id for turn_id in told if asked[turn_id] > chosen and not stored[turn_id]])
    report.later += len([turn_id for turn_id in stored if asked[turn_id] > chosen])


def drill(rounds: int, seconds: float, clients: int) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix="restore-drill-"))
    stack = Stack(directory, listens="127.0.0.1", archive_timeout=1)
    servers: list[Any] = []
    report = Report()
    try:
        postgres, redis, model = Postgres(stack), Redis(), Model()
        servers += [redis, model]
        migrated = migrate(environment(postgres, redis, model, directory))
        assert migrated.returncode == 0, migrated.stderr
        service = Agent(postgres, redis, model, workers=2, AGENT_TURN_TIMEOUT_SECONDS="20")
        servers.append(service)
        service.start()
        stack.program.prepare()
        for number in range(rounds):
            play_round(number, stack, service, seconds, clients, report)
            print(f"round {number + 1} of {rounds}: {vars(report)}", flush=True)
    finally:
        for server in reversed(servers):
            server.remove()
        stack.server.stop()
        shutil.rmtree(directory, ignore_errors=True)
    return {"rounds": rounds, **vars(report)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=8)
    wanted = parser.parse_args()
    report = drill(wanted.rounds, wanted.seconds, wanted.clients)
    print(json.dumps(report))
    # Without turns on both sides of the second nothing was shown.
    sys.exit(not report["acknowledged"] or not report["undone"] or any(report[name] for name in ("lost", "doubled", "later", "broken")))


if __name__ == "__main__":
    main()
