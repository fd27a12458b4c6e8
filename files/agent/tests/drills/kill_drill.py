"""Workers and Postgres are killed under load, and every turn that a client was promised is looked for afterwards.

    python tests/drills/kill_drill.py [--kills 200] [--postgres-kills 50] [--clients 8]

As Jepsen does it: each client writes down what it is about to ask, and what it was told, and repeats what it was told
nothing about, with the same turn id. Beside them one client answers approvals, one has crons fall due, and one copies
threads and reads long histories. At the end the threads themselves are read. The last line is JSON:

lost      a turn that was acknowledged and is not in its thread, with its answer; a time of a cron without its run
doubled   a turn that is in its thread more than once, a time of a cron with two runs, or an approved call that ran twice
wedged    a thread whose next turn fails, or a turn that was never acknowledged however often it was repeated
broken    a thread that is no sequence of questions and answers, or an answer that was given without an earlier turn
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import Agent, Model, Postgres, Redis, environment, migrate

TURNS_A_THREAD = 30
THREADS = 12
CRONS = 4
# How long a turn is repeated before it counts as never acknowledged.
# For the turns that a drill of few kills asks for.
TURNS_SECONDS = 120
PATIENCE_SECONDS = 60
KINDS = (
    "hello {}",
    "wait {} [[delay 0.3]]",
    'add {} [[tool calculator {{"expression": "6*7"}}]]',
    'add {} [[tool calculator {{"expression": "6*7"}}]] [[delay 0.2]]',
)


@dataclass
class Turn:
    turn_id: str
    thread_id: str
    message: str
    acknowledged: bool = False


@dataclass
class Journal:
    """What the clients know. Written to a file as it happens: (time, what, turn, thread)."""

    path: Path
    turns: dict[str, Turn] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, turn: Turn) -> None:
        with self.lock:
            self.turns[turn.turn_id] = turn
            self.counts[what] += 1
            with self.path.open("a") as file:
                file.write(json.dumps([time.time(), what, turn.turn_id, turn.thread_id]) + "\n")


class Client(threading.Thread):
    """Asks one turn after the other, in threads that it shares with the others."""

    def __init__(self, service: Agent, journal: Journal, seed: int) -> None:
        super().__init__()
        self.stopping = threading.Event()
        self._journal = journal
        self._random = random.Random(seed)
        self._client = httpx.Client(base_url=service.url, headers=service.client.headers, timeout=25)
        self._count = 0

    def run(self) -> None:
        while not self.stopping.is_set():
            # A thread gets a new name before it is too long for the model's window.
            chapter = len(self._journal.turns) // (THREADS * TURNS_A_THREAD)
            turn_id = uuid4().hex
            thread_id = f"drill-{chapter}-{self._random.randrange(THREADS)}"
            turn = Turn(turn_id, thread_id, self._random.choice(KINDS).format(turn_id))
            self._journal.note("invoke", turn)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not (turn.acknowledged or time.monotonic() > deadline):
                self._try(turn)
        self._client.close()

    def _try(self, turn: Turn) -> None:
        body = {"message": turn.message, "thread_id": turn.thread_id, "turn_id": turn.turn_id}
        try:
            answer = self._client.post("/chat", json=body)
        except httpx.TransportError:
            self._journal.note("unknown", turn)
            time.sleep(0.1)
            return
        if answer.status_code == 200:
            turn.acknowledged = True
            self._journal.note("ack", turn)
        else:
            self._journal.note(f"fail {answer.status_code} {answer.json()['error']['code']}", turn)
            time.sleep(0.2)


class Worker(threading.Thread):
    """Does something again and again, whatever fails."""

    def __init__(self, service: Agent, postgres: Postgres, seed: int) -> None:
        super().__init__()
        self.stopping = threading.Event()
        self.postgres = postgres
        self.random = random.Random(seed)
        self.client = httpx.Client(base_url=service.url, headers=service.client.headers, timeout=25)

    def run(self) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(httpx.TransportError, psycopg.Error):
                self.once()
            self.stopping.wait(0.1)
        self.client.close()

    def once(self) -> None:
        raise NotImplementedError

    def insist(self, path: str, body: dict[str, Any], key: str) -> dict[str, Any] | None:
        """The answer to a request that is repeated with the same key, None where it never came."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError, ValueError):
                answer = self.client.post(path, json=body, headers={"Idempotency-Key": key})
                if answer.status_code == 200 and "__error__" not in (told := answer.json()):
                    return told
            time.sleep(0.2)
        return None


class Approver(Worker):
    """Begins turns whose tool waits for approval, and approves it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.threads: list[str] = []
        self.wedged: list[str] = []

    def once(self) -> None:
        thread, key = f"approval-{uuid4().hex}", uuid4().hex
        text = {"messages": f"what time is it? {key} [[tool current_time {{}}]]"}
        path = f"/threads/{thread}/runs/wait"
        told = self.insist(path, {"assistant_id": "agent", "input": text, "if_not_exists": "create"}, key)
        if told is not None:
            told = self.insist(path, {"assistant_id": "agent", "command": {"resume": {"approve": True}}}, f"{key}-yes")
        (self.threads if told is not None else self.wedged).append(thread)

    def check(self) -> tuple[int, list[str]]:
        """How many calls ran twice, and what is wrong with the threads."""
        doubled, broken = 0, []
        for thread in self.threads:
            messages = self.state_of(thread)
            results = [message for message in messages if message["type"] == "tool"]
            doubled += len(results) > 1
            texts, problem = questions(messages)
            if problem or len(texts) != 1 or not results:
                broken.append(f"{thread}: {problem or 'not one question, or no result'}")
        return doubled, broken

    def state_of(self, thread: str) -> list[dict[str, Any]]:
        with httpx.Client(base_url=self.client.base_url, headers=self.client.headers, timeout=25) as client:
            messages: list[dict[str, Any]] = client.get(f"/threads/{thread}/state").json()["values"]["messages"]
        return messages


class Clockwork(Worker):
    """Has crons fall due: each time that was set is one run."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        # How often each fell due; and how often more it may have, where Postgres was killed before it could say.
        self.due: Counter[str] = Counter()
        self.perhaps: Counter[str] = Counter()
        body = {"assistant_id": "agent", "schedule": "@yearly", "on_run_completed": "keep", "input": {"messages": "report"}}
        self.crons = [self.client.post("/runs/crons", json=body).json()["cron_id"] for _ in range(CRONS)]

    def once(self) -> None:
        cron = self.random.choice(self.crons)
        self.perhaps[cron] += 1
        # Only one that is not due already: its time is not used up yet.
        set_due = "UPDATE crons SET next_at = now() - interval '1 second' WHERE cron_id = %s AND next_at > now() RETURNING 1"
        if self.postgres.query(set_due, cron):
            self.due[cron] += 1
        self.perhaps[cron] -= 1

    def check(self) -> tuple[int, int]:
        """Times without a run that succeeded, and runs without a time."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        waiting = (
            "SELECT (SELECT count(*) FROM crons WHERE next_at <= now())"
            " + (SELECT count(*) FROM runs WHERE options->'metadata'->>'cron_id' IS NOT NULL AND status IN ('pending', 'running'))"
        )
        while self.postgres.query(waiting) != [(0,)] and time.monotonic() < deadline:
            time.sleep(0.5)
        ran = Counter(dict(self.postgres.query(
            "SELECT options->'metadata'->>'cron_id', count(*) FROM runs WHERE options->'metadata'->>'cron_id' IS NOT NULL AND status = 'success' GROUP BY 1"
        )))  # fmt: skip
        lost = sum(max(0, self.due[cron] - ran[cron]) for cron in self.crons)
        return lost, sum(max(0, ran[cron] - self.due[cron] - self.perhaps[cron]) for cron in self.crons)


class Reader(Worker):
    """Copies threads of the load, and reads the history of a long one and makes it longer."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.copies: list[str] = []
        self.histories = 0

    def once(self) -> None:
        copy = self.client.post(f"/threads/drill-0-{self.random.randrange(THREADS)}/copy")
        if copy.status_code == 200:
            self.copies.append(copy.json()["thread_id"])
        more = {"values": {"messages": [{"role": "user", "content": "x" * 8_000}, {"role": "assistant", "content": "noted"}]}, "as_node": "model"}
        self.client.post("/threads", json={"thread_id": "long", "if_exists": "do_nothing"})
        self.client.post("/threads/long/state", json=more)
        history = self.client.post("/threads/long/history", json={"limit": 1000})
        self.histories += history.status_code == 200 and bool(history.json())

    def check(self) -> list[str]:
        broken = []
        with httpx.Client(base_url=self.client.base_url, headers=self.client.headers, timeout=25) as client:
            for thread in self.copies:
                problem = questions(client.get(f"/threads/{thread}/state").json()["values"].get("messages", []))[1]
                # A copy of a turn that is being worked on has its question only.
                if problem and problem != "the last question has no answer":
                    broken.append(f"copy {thread}: {problem}")
        return broken


class Drill:
    def __init__(self, seed: int, clients: int) -> None:
        self._random = random.Random(seed)
        self._clients = clients
        self._seed = seed
        self.worker_kills = 0
        self.postgres_kills = 0
        # From a kill to the next turn that was acknowledged.
        self.gaps: list[float] = []

    def run(self, kills: int, postgres_kills: int, turns: int = 0) -> dict[str, Any]:
        """Kill so often, and go on until so many turns were acknowledged: on a slow machine few are while the kills last."""
        started = time.monotonic()
        with self._servers() as (postgres, service):
            journal = Journal(postgres.directory / "journal")
            clients = [Client(service, journal, self._seed + number) for number in range(self._clients)]
            others = (Approver(service, postgres, self._seed), Clockwork(service, postgres, self._seed), Reader(service, postgres, self._seed))
            for client in (*clients, *others):
                client.start()
            plan = ["worker"] * kills + ["postgres"] * postgres_kills
            self._random.shuffle(plan)
            for number, victim in enumerate(plan, 1):
                time.sleep(self._random.uniform(0.15, 0.7))
                acknowledged = journal.counts["ack"]
                killed = time.monotonic()
                if victim == "worker":
                    self._kill_worker(service)
                else:
                    self._kill_postgres(postgres)
                while journal.counts["ack"] == acknowledged and time.monotonic() - killed < PATIENCE_SECONDS:
                    time.sleep(0.01)
                self.gaps.append(time.monotonic() - killed)
                if number % 10 == 0:
                    print(f"{number} of {len(plan)} kills, {dict(journal.counts)}", flush=True)
            while journal.counts["ack"] < turns and time.monotonic() - started < TURNS_SECONDS:
                time.sleep(0.1)
            for client in (*clients, *others):
                client.stopping.set()
            for client in (*clients, *others):
                client.join()
            report = check(service, postgres, journal)
            add_others(report, *others)
        report |= {
            "worker_kills": self.worker_kills,
            "postgres_kills": self.postgres_kills,
            "longest_gap_seconds": round(max(self.gaps), 1),
            "seconds": round(time.monotonic() - started),
        }
        return report

    @contextlib.contextmanager
    def _servers(self) -> Iterator[tuple[Postgres, Agent]]:
        with contextlib.ExitStack() as stack:
            postgres, redis, model = Postgres(), Redis(), Model()
            for server in (postgres, redis, model):
                stack.callback(server.remove)
            migrated = migrate(environment(postgres, redis, model, postgres.directory))
            assert migrated.returncode == 0, migrated.stderr
            service = Agent(postgres, redis, model, workers=2, AGENT_TURN_TIMEOUT_SECONDS="20", AGENT_TOOLS_APPROVAL="current_time", AGENT_STORAGE_MIB="0")
            stack.callback(service.remove)
            service.start()
            yield postgres, service

    def _kill_worker(self, service: Agent) -> None:
        # Never the last one that serves: what is measured is the turns, not how fast a process starts.
        deadline = time.monotonic() + 20
        while len(workers := service.workers()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._random.choice(workers), signal.SIGKILL)
            self.worker_kills += 1

    def _kill_postgres(self, postgres: Postgres) -> None:
        postgres.crash()
        self.postgres_kills += 1
        postgres.start()


def check(service: Agent, postgres: Postgres, journal: Journal) -> dict[str, Any]:
    """Read every thread and compare it with what the clients know."""
    wedged = [turn.turn_id for turn in journal.turns.values() if not turn.acknowledged]
    threads = sorted({turn.thread_id for turn in journal.turns.values()})
    stored: Counter[str] = Counter()
    answered: set[str] = set()
    broken: list[str] = []
    for thread in threads:
        answer = service.client.post("/chat", json={"message": "are you there?", "thread_id": thread})
        if answer.status_code != 200:
            wedged.append(thread)
            continue
        state = service.client.get(f"/threads/{thread}/state").json()
        texts, problem = questions(state["values"]["messages"])
        if problem:
            broken.append(f"{thread}: {problem}")
        for text in texts:
            for turn_id in re.findall(r"[0-9a-f]{32}", text):
                stored[turn_id] += 1
                answered.add(turn_id)
    rows = postgres.query("SELECT turn_id FROM runs WHERE turn_id IS NOT NULL AND status <> 'success'")
    unfinished = {row[0] for row in rows}
    acknowledged = [turn.turn_id for turn in journal.turns.values() if turn.acknowledged]
    return {
        "turns": len(journal.turns),
        "acknowledged": len(acknowledged),
        "repeated": sum(count for what, count in journal.counts.items() if what not in ("invoke", "ack")),
        "threads": len(threads),
        "lost": len([turn_id for turn_id in acknowledged if turn_id not in answered or turn_id in unfinished]),
        "doubled": len([turn_id for turn_id, count in stored.items() if count > 1]),
        "wedged": len(wedged),
        "broken": broken[:5],
    }


def add_others(report: dict[str, Any], approver: Approver, clockwork: Clockwork, reader: Reader) -> None:
    """Count what went wrong beside the turns."""
    ran_twice, broken = approver.check()
    lost, doubled = clockwork.check()
    report["lost"] += lost
    report["doubled"] += doubled + ran_twice
    report["wedged"] += len(approver.wedged)
    report["broken"] = [*report["broken"], *broken, *reader.check()][:5]
    counts = {"approvals": len(approver.threads), "crons": clockwork.due.total(), "copies": len(reader.copies), "histories": reader.histories}
    report.update(counts)


def questions(messages: list[dict[str, Any]]) -> tuple[list[str], str | None]:
    """The questions that have an answer, and what is wrong with the thread."""
    texts: list[str] = []
    open_question: str | None = None
    open_calls: set[str] = set()
    for message in messages:
        match message["type"]:
            case "human":
                if open_question is not None:
                    return texts, "a question without an answer"
                open_question = message["content"]
            case "ai" if message["tool_calls"]:
                open_calls = {call["id"] for call in message["tool_calls"]}
            case "tool":
                if message["tool_call_id"] not in open_calls:
                    return texts, "a result without a call"
                open_calls.discard(message["tool_call_id"])
            case "ai":
                if open_question is None or open_calls:
                    return texts, "an answer without a question"
                texts.append(open_question)
                open_question = None
                # The model says how many questions it was shown.
                seen = re.match(r"I see (\d+) user", message["content"])
                if seen and int(seen[1]) != len(texts):
                    return texts, f"answer {len(texts)} was given with {seen[1]} questions in sight"
    return texts, "the last question has no answer" if open_question is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--postgres-kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    report = Drill(wanted.seed, wanted.clients).run(wanted.kills, wanted.postgres_kills)
    print(json.dumps(report))
    sys.exit(any(report[name] for name in ("lost", "doubled", "wedged", "broken")))


if __name__ == "__main__":
    main()
