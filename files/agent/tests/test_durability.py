"""What was accepted is worked on to its end, once, whatever dies on the way.

Two services with one worker each share the database, so that a test can choose which of them it asks.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from agent.serve import Supervisor
from servers import Agent, Model, Postgres, Redis, wait_until
from streams import Stream


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def post(service: Agent, message: str, thread: str, turn: str | None = None) -> httpx.Response:
    body = {"message": message, "thread_id": thread} | ({"turn_id": turn} if turn else {})
    return service.client.post("/chat", json=body)


def start_run(service: Agent, thread: str, message: str, **more: Any) -> httpx.Response:
    body = {"assistant_id": "agent", "input": {"messages": [{"role": "user", "content": message}]}, **more}
    return service.client.post(f"/threads/{thread}/runs", json={"if_not_exists": "create", **body})


def messages(service: Agent, thread: str) -> list[dict[str, Any]]:
    return service.client.get(f"/threads/{thread}/state").json()["values"]["messages"]


def texts(service: Agent, thread: str) -> list[str]:
    return [message["content"] for message in messages(service, thread)]


def questions(service: Agent, thread: str) -> list[str]:
    return [message["content"] for message in messages(service, thread) if message["type"] == "human"]


def status(database: Postgres, thread: str) -> list[str]:
    return [row[0] for row in database.query("SELECT status FROM runs WHERE thread_id = %s ORDER BY run_id", thread)]


def runs_in(database: Postgres, thread: str) -> bool:
    return status(database, thread) == ["running"]


class TestKilledWorker:
    def test_another_one_finishes_the_run(self, pair: tuple[Agent, Agent], migrated: Postgres, threads: ThreadPoolExecutor) -> None:
        first, second = pair
        taken_over = second.metric("agent_runs_taken_over_total")
        lost = threads.submit(post, first, "work [[delay 2]]", "killed-worker", "turn-1")
        wait_until(lambda: runs_in(migrated, "killed-worker"), "the turn runs")
        first.process.kill()
        killed = time.monotonic()
        with pytest.raises(httpx.TransportError):
            lost.result()
        # The client's retry finds the first try's run, and waits for it.
        answer = post(second, "work [[delay 2]]", "killed-worker", "turn-1")
        assert answer.status_code == 200
        assert time.monotonic() - killed < 15
        assert questions(second, "killed-worker") == ["work [[delay 2]]"]
        assert status(migrated, "killed-worker") == ["success"]
        assert second.metric("agent_runs_taken_over_total") == taken_over + 1

    def test_nobody_needs_to_ask_for_it(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        first, second = pair
        assert start_run(first, "killed-alone", "work [[delay 2]]").status_code == 200
        wait_until(lambda: runs_in(migrated, "killed-alone"), "the turn runs")
        first.process.kill()
        wait_until(lambda: status(migrated, "killed-alone") == ["success"], "the turn is finished", 15)
        assert len(texts(second, "killed-alone")) == 2

    def test_a_tool_that_ran_does_not_run_again(self, pair: tuple[Agent, Agent], migrated: Postgres, model: Model) -> None:
        first, second = pair
        message = '[[tool calculator {"expression": "6*7"}]] [[delay 1.5]]'
        assert start_run(first, "killed-after-tool", message).status_code == 200
        stored = "SELECT count(*) FROM checkpoints WHERE thread_id = 'killed-after-tool'"
        wait_until(lambda: migrated.query(stored)[0][0] >= 3, "the tool's result is stored")
        wait_until(lambda: len(model.requests()) == 2, "the model is asked about it")
        first.process.kill()
        wait_until(lambda: status(migrated, "killed-after-tool") == ["success"], "the turn is finished", 15)
        assert [message["type"] for message in messages(second, "killed-after-tool")] == ["human", "ai", "tool", "ai"]
        # The call, the try that was killed, and the one that answered.
        assert len(model.requests()) == 3

    def test_one_that_starts_from_an_older_checkpoint_goes_on_too(self, pair: tuple[Agent, Agent], migrated: Postgres, model: Model) -> None:
        first, second = pair
        thread = "killed-fork"
        for text in ("before", "left out"):
            assert post(first, text, thread).status_code == 200
        states = first.client.post(f"/threads/{thread}/history", json={"limit": 10}).json()
        fork = next(state for state in states if len(state["values"]["messages"]) == 2)
        asked = len(model.requests())
        message = '[[tool calculator {"expression": "6*7"}]] [[delay 1.5]]'
        place = {"checkpoint_id": fork["checkpoint"]["checkpoint_id"]}
        assert start_run(first, thread, message, **place).status_code == 200
        wait_until(lambda: len(model.requests()) == asked + 2, "the model is asked about the tool's result")
        first.process.kill()
        wait_until(lambda: status(migrated, thread)[-1] == "success", "the turn is finished", 15)
        kinds = [message["type"] for message in messages(second, thread)]
        assert kinds == ["human", "ai", "human", "ai", "tool", "ai"]
        assert questions(second, thread) == ["before", message]
        # The call, the try that was killed, and the one that answered.
        assert len(model.requests()) == asked + 3

    def test_what_waited_behind_it_runs_too(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        first, second = pair
        for number in range(3):
            assert start_run(first, "killed-queue", f"number {number} [[delay 0.5]]").status_code == 200
        first.process.kill()
        wait_until(lambda: status(migrated, "killed-queue") == ["success"] * 3, "all turns are finished", 20)
        assert questions(second, "killed-queue") == [f"number {number} [[delay 0.5]]" for number in range(3)]

    def test_one_that_kills_its_worker_is_given_up(self, start_agent: Callable[..., Agent], migrated: Postgres) -> None:
        service = start_agent()
        assert start_run(service, "deadly", "[[delay 60]]").status_code == 200
        migrated.query("UPDATE runs SET attempt = 4, worker = gen_random_uuid() WHERE thread_id = 'deadly' RETURNING 1")
        wait_until(lambda: status(migrated, "deadly") == ["error"], "the run is given up", 15)
        assert service.chat("next", "deadly").status_code == 200

    def test_the_service_replaces_it(self, start_agent: Callable[..., Agent]) -> None:
        service = start_agent(workers=2)

        def started() -> list[int]:
            return [line["pid"] for line in service.log_lines() if line["message"] == "started"]

        wait_until(lambda: set(started()) == set(service.workers()) and len(started()) == 2, "two workers serve")
        for _ in range(3):
            victim = service.workers()[0]
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: len(set(service.workers()) - {victim}) == 2, "it is replaced", 5)  # noqa: B023
            wait_until(lambda: set(service.workers()) <= set(started()), "the new one serves", 5)
            assert time.monotonic() - killed < 5
        assert {service.chat("hello").status_code for _ in range(10)} == {200}

    def test_one_of_which_a_part_fails_ends(self, start_agent: Callable[..., Agent], agent_process: Agent, migrated: Postgres) -> None:
        """A row that nobody can read stands for a mistake in what looks after the runs."""
        agent_process.freeze()
        try:
            service = start_agent(workers=2)
            assert service.chat("hello", "unreadable").status_code == 200
            before = service.workers()
            migrated.query(
                "INSERT INTO runs (run_id, thread_id, owner, status, input, options)"
                " VALUES (gen_random_uuid(), 'unreadable', 'user:tester', 'pending', '{}', '[]') RETURNING 1"
            )
            wait_until(lambda: set(service.workers()) != set(before), "a worker ends", 5)
        finally:
            migrated.query("DELETE FROM runs WHERE thread_id = 'unreadable' RETURNING 1")
            agent_process.thaw()
        failed = [line for line in service.log_lines() if line["level"] == "critical"]
        assert "AttributeError" in failed[0]["exception"]
        wait_until(lambda: len(service.workers()) == 2, "it is replaced")
        assert service.chat("hello", "unreadable").status_code == 200

    def test_a_stop_that_finds_it_dead_already_goes_on(self) -> None:
        dead, alive = (subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2))
        dead.kill()
        dead.wait()
        with socket.socket() as listener:
            supervisor = Supervisor(listener, 2)
            supervisor._workers = {dead.pid: 0.0, alive.pid: 0.0}
            supervisor._stop(signal.SIGTERM, None)
        assert alive.wait(5) == -signal.SIGTERM

    def test_a_service_that_cannot_start_ends(self, start_agent: Callable[..., Agent], tmp_path: Path) -> None:
        service = start_agent(workers=2)
        service.stop(signal.SIGTERM)
        service.environ |= {"AGENT_TOOLS": "missing", "AGENT_TOOLS_DIR": str(tmp_path)}
        with pytest.raises(pytest.fail.Exception, match="missing"):
            service.start()
        assert service.process.returncode not in (0, None)
        service.process = None


def test_a_worker_that_was_taken_for_dead_changes_nothing(pair: tuple[Agent, Agent], migrated: Postgres) -> None:
    first, second = pair
    assert start_run(first, "stale", "work [[delay 1]]").status_code == 200
    wait_until(lambda: runs_in(migrated, "stale"), "the turn runs")
    first.freeze()
    try:
        wait_until(lambda: status(migrated, "stale") == ["success"], "the other one finishes the turn", 20)
        after = texts(second, "stale")
        assert post(second, "again", "stale").status_code == 200
    finally:
        first.thaw()
    wait_until(lambda: any("taken over" in line["message"] for line in first.log_lines()), "it learns of it")
    time.sleep(0.5)
    assert texts(second, "stale")[: len(after)] == after
    assert len(texts(second, "stale")) == 4
    assert post(first, "and again", "stale").status_code == 200


class TestPostgres:
    @pytest.mark.parametrize("seconds", [0.0, 3.0])
    def test_crashes_in_the_middle_of_a_turn(self, agent: Agent, migrated: Postgres, threads: ThreadPoolExecutor, seconds: float) -> None:
        thread = f"crash-{seconds:.0f}"
        turn = threads.submit(post, agent, "work [[delay 1]]", thread, thread)
        wait_until(lambda: runs_in(migrated, thread), "the turn runs")
        migrated.crash()
        time.sleep(seconds)
        migrated.start()
        answer = turn.result()
        if answer.status_code != 200:
            wait_until(lambda: post(agent, "work [[delay 1]]", thread, thread).status_code == 200, "a retry succeeds")
        assert questions(agent, thread) == ["work [[delay 1]]"]
        assert agent.chat("next", thread).status_code == 200

    def test_crashes_while_a_tool_runs(self, agent: Agent, migrated: Postgres, threads: ThreadPoolExecutor) -> None:
        message = '[[tool calculator {"expression": "6*7"}]] [[delay 1]]'
        turn = threads.submit(post, agent, message, "crash-tool", "crash-tool")
        wait_until(lambda: runs_in(migrated, "crash-tool"), "the turn runs")
        migrated.crash()
        migrated.start()
        if turn.result().status_code != 200:
            wait_until(lambda: post(agent, message, "crash-tool", "crash-tool").status_code == 200, "a retry succeeds")
        assert [message["type"] for message in messages(agent, "crash-tool")] == ["human", "ai", "tool", "ai"]


class TestTurnIds:
    def test_the_same_one_adds_nothing(self, agent: Agent, model: Model) -> None:
        first = post(agent, "once", "turns", "same")
        again = post(agent, "once", "turns", "same")
        assert first.json() == again.json()
        assert len(model.requests()) == 1

    def test_at_the_same_time_in_two_workers(self, pair: tuple[Agent, Agent], threads: ThreadPoolExecutor) -> None:
        answers = list(threads.map(lambda n: post(pair[n % 2], "once [[delay 0.5]]", "turns-at-once", "at-once"), range(8)))
        assert [answer.status_code for answer in answers] == [200] * 8
        assert len({answer.json()["run_id"] for answer in answers}) == 1
        assert len(texts(pair[0], "turns-at-once")) == 2

    def test_as_a_header(self, agent: Agent) -> None:
        ask = {"message": "once"}, {"Idempotency-Key": "header-turn"}
        first, again = (agent.client.post("/chat", json=ask[0], headers=ask[1]) for _ in range(2))
        assert first.json() == again.json()

    @pytest.mark.parametrize(("message", "thread"), [("other", "turns-used"), ("once", "turns-other")])
    def test_for_something_else(self, agent: Agent, message: str, thread: str) -> None:
        turn = uuid4().hex
        assert post(agent, "once", "turns-used", turn).status_code == 200
        answer = post(agent, message, thread, turn)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "turn_conflict")

    def test_of_another_user_is_another_one(self, agent: Agent) -> None:
        assert post(agent, "mine", "turns-mine", "shared").status_code == 200
        body = {"message": "theirs", "turn_id": "shared"}
        answer = agent.client.post("/chat", json=body, headers={"X-Forwarded-User": "other"})
        assert answer.status_code == 200
        assert "theirs" in answer.json()["response"]

    def test_a_turn_that_failed_is_tried_again(self, agent: Agent, model: Model) -> None:
        model.control(fault="400")
        assert post(agent, "try", "turns-failed", "failed").status_code == 502
        model.control(fault=None)
        assert post(agent, "try", "turns-failed", "failed").status_code == 200
        assert questions(agent, "turns-failed") == ["try"]

    @pytest.mark.parametrize("turn", ["", "a b", "x" * 129, "\u00e9", 7])
    def test_that_are_none(self, agent: Agent, turn: Any) -> None:
        answer = agent.client.post("/chat", json={"message": "hi", "turn_id": turn})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")


class TestBusyThread:
    def test_reject(self, agent: Agent, migrated: Postgres) -> None:
        assert start_run(agent, "reject", "first [[delay 1]]").status_code == 200
        answer = start_run(agent, "reject", "second", multitask_strategy="reject")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "thread_busy")
        wait_until(lambda: status(migrated, "reject") == ["success"], "the first one ends")
        assert start_run(agent, "reject", "third", multitask_strategy="reject").status_code == 200

    def test_enqueue_keeps_the_order_in_two_workers(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        for number in range(6):
            assert start_run(pair[number % 2], "enqueue", f"{number} [[delay 0.1]]").status_code == 200
        wait_until(lambda: status(migrated, "enqueue") == ["success"] * 6, "all end")
        assert questions(pair[0], "enqueue") == [f"{number} [[delay 0.1]]" for number in range(6)]

    def test_interrupt_in_the_other_worker(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        assert start_run(pair[0], "interrupt", "first [[delay 15]]").status_code == 200
        wait_until(lambda: runs_in(migrated, "interrupt"), "the first one runs")
        started = time.monotonic()
        assert start_run(pair[1], "interrupt", "second", multitask_strategy="interrupt").status_code == 200
        wait_until(lambda: status(migrated, "interrupt") == ["interrupted", "success"], "the second one ends")
        assert time.monotonic() - started < 5
        # What the first one left has no answer, and many models refuse a conversation with a hole in it.
        assert questions(pair[0], "interrupt") == ["second"]

    def test_rollback(self, agent: Agent, migrated: Postgres) -> None:
        assert agent.chat("before", "rollback").status_code == 200
        message = '[[tool calculator {"expression": "6*7"}]] [[delay 1.5]]'
        assert start_run(agent, "rollback", message).status_code == 200
        stored = "SELECT count(*) FROM checkpoints WHERE thread_id = 'rollback'"
        wait_until(lambda: migrated.query(stored)[0][0] >= 4, "the tool's result is stored")
        assert start_run(agent, "rollback", "second", multitask_strategy="rollback").status_code == 200
        wait_until(lambda: status(migrated, "rollback") == ["success", "success"], "only the others are left")
        assert questions(agent, "rollback") == ["before", "second"]
        unused = (
            "SELECT count(*) FROM checkpoint_blobs b WHERE thread_id = 'rollback' AND NOT EXISTS"
            " (SELECT FROM checkpoints c WHERE c.thread_id = b.thread_id"
            " AND c.checkpoint->'channel_versions'->>b.channel = b.version)"
        )
        assert migrated.query(unused) == [(0,)]
        assert migrated.query("SELECT count(*) FROM checkpoint_blobs WHERE thread_id = 'rollback'")[0][0] >= 2


class TestCancel:
    def test_from_the_other_worker(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        run_id = start_run(pair[0], "cancel", "work [[delay 15]]").json()["run_id"]
        started = time.monotonic()
        path = f"/threads/cancel/runs/{run_id}/cancel?wait=true"
        assert pair[1].client.post(path).status_code == 204
        assert time.monotonic() - started < 3
        assert status(migrated, "cancel") == ["interrupted"]
        assert post(pair[1], "next", "cancel").status_code == 200

    def test_while_it_waits(self, agent: Agent, migrated: Postgres) -> None:
        start_run(agent, "cancel-pending", "first [[delay 1]]")
        run_id = start_run(agent, "cancel-pending", "second").json()["run_id"]
        assert agent.client.post(f"/threads/cancel-pending/runs/{run_id}/cancel?wait=true").status_code == 204
        wait_until(lambda: status(migrated, "cancel-pending") == ["success", "interrupted"], "the first one ends")
        assert questions(agent, "cancel-pending") == ["first [[delay 1]]"]

    @pytest.mark.parametrize("how", ["cancel", "delete"])
    def test_that_the_channel_did_not_tell(self, pair: tuple[Agent, Agent], migrated: Postgres, how: str) -> None:
        """As where the connection that listens is just being opened anew."""
        thread = f"cancel-untold-{how}"
        start_run(pair[0], thread, "work [[delay 15]]")
        wait_until(lambda: pair[0].metric("agent_turns_running") == 1, "it runs")
        change = {
            "cancel": "UPDATE runs SET cancel = 'interrupt' WHERE thread_id = %s RETURNING 1",
            "delete": "DELETE FROM threads WHERE thread_id = %s RETURNING 1",
        }
        assert migrated.query(change[how], thread) == [(1,)]
        wait_until(lambda: pair[0].metric("agent_turns_running") == 0, "it stops", 3)
        assert status(migrated, thread) == (["interrupted"] if how == "cancel" else [])

    def test_after_its_worker_died(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        run_id = start_run(pair[0], "cancel-dead", "work [[delay 15]]").json()["run_id"]
        pair[0].process.kill()
        assert pair[1].client.post(f"/threads/cancel-dead/runs/{run_id}/cancel").status_code == 204
        wait_until(lambda: status(migrated, "cancel-dead") == ["interrupted"], "it ends", 15)

    def test_a_deleted_thread_stops_its_run(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        start_run(pair[0], "deleted", "work [[delay 15]]")
        wait_until(lambda: pair[0].metric("agent_turns_running") == 1, "it runs")
        assert pair[1].client.delete("/threads/deleted").status_code == 204
        wait_until(lambda: pair[0].metric("agent_turns_running") == 0, "it stops")
        for table in ("threads", "runs", "checkpoints", "checkpoint_blobs", "checkpoint_writes"):
            query = f"SELECT count(*) FROM {table} WHERE thread_id = 'deleted'"  # noqa: S608  the names above
            assert migrated.query(query) == [(0,)]


class TestStop:
    def test_hands_back_what_takes_too_long(self, pair: tuple[Agent, Agent], migrated: Postgres) -> None:
        first, second = pair
        start_run(first, "handed-back", "work [[delay 8]]")
        wait_until(lambda: runs_in(migrated, "handed-back"), "it runs")
        started = time.monotonic()
        first.stop(signal.SIGTERM)
        assert time.monotonic() - started < 8
        try:
            wait_until(lambda: status(migrated, "handed-back") == ["success"], "the other one finishes it", 20)
        finally:
            print(
                migrated.query("SELECT * FROM runs WHERE thread_id = 'handed-back'"),
                first.log.read_text()[-3000:],
                second.log.read_text()[-3000:],
            )
        assert len(texts(second, "handed-back")) == 2
        assert migrated.query("SELECT first_attempt FROM runs WHERE thread_id = 'handed-back'") == [(2,)]


class TestStream:
    MESSAGE = "a b c d e f g h i j [[pace 0.1]]"

    def test_tells_everything_once(self, agent: Agent) -> None:
        stream = Stream(agent, {"message": "hello"}).join()
        assert stream.names()[0] == "run"
        assert stream.names()[-2:] == ["usage", "end"]
        assert "".join(stream.texts()) == stream.data("end")["response"]
        numbers = [number for number, _, _ in stream.events[1:]]
        assert numbers == sorted(set(numbers))

    def test_tells_of_tools(self, agent: Agent) -> None:
        stream = Stream(agent, {"message": '[[tool calculator {"expression": "6*7"}]]'}).join()
        tools = [data for _, name, data in stream.events if name == "tool"]
        assert [(tool["name"], tool["state"]) for tool in tools] == [("calculator", "start"), ("calculator", "end")]
        assert tools[0]["id"] == tools[1]["id"]

    def test_tells_of_a_failure(self, agent: Agent) -> None:
        stream = Stream(agent, {"message": "[[fault 400]]"}).join()
        assert stream.names()[-1] == "error"
        assert stream.data("error")["code"] == "model_failed"

    @pytest.mark.parametrize("where", [0, 1])
    def test_is_taken_up_without_loss(self, pair: tuple[Agent, Agent], where: int) -> None:
        first = Stream(pair[0], {"message": self.MESSAGE})
        first.break_after(tokens=4)
        rest = Stream(pair[where], run_id=first.run_id, after=first.last_id).join()
        assert rest.names()[-1] == "end"
        assert "".join(first.texts() + rest.texts()) == rest.data("end")["response"]

    @pytest.mark.parametrize("where", [0, 1])
    def test_is_taken_up_after_its_end(self, pair: tuple[Agent, Agent], where: int) -> None:
        first = Stream(pair[0], {"message": self.MESSAGE}).join()
        middle = first.events[5]
        rest = Stream(pair[where], run_id=first.run_id, after=middle[0]).join()
        assert rest.events == first.events[6:]
        again = Stream(pair[where], run_id=first.run_id).join()
        assert again.events == first.events

    def test_goes_on_when_its_worker_was_killed(self, pair: tuple[Agent, Agent]) -> None:
        first = Stream(pair[0], {"message": self.MESSAGE})
        wait_until(lambda: len(first.texts()) >= 4, "it streams")
        pair[0].process.kill()
        first.join()
        assert first.broken
        rest = Stream(pair[1], run_id=first.run_id, after=first.last_id).join()
        assert {"state": "restarted"} in [data for _, name, data in rest.events if name == "status"]
        after = rest.events[rest.names().index("status") :]
        assert "".join(data["text"] for _, name, data in after if name == "token") == rest.data("end")["response"]

    @pytest.mark.parametrize("how", ["stop", "freeze"])
    def test_redis_away(self, pair: tuple[Agent, Agent], redis: Redis, how: str) -> None:
        getattr(redis, how)()
        try:
            stream = Stream(pair[0], {"message": "hello"}).join()
            assert "".join(stream.texts()) == stream.data("end")["response"]
            # Its own worker has all of it in memory, the other one knows how it ended.
            again = Stream(pair[0], run_id=stream.run_id).join()
            assert again.events == stream.events
            other = Stream(pair[1], run_id=stream.run_id).join()
            assert other.data("end") == stream.data("end")
        finally:
            if how == "stop":
                redis.start()
            else:
                redis.thaw()

    def test_redis_lost_a_part(self, pair: tuple[Agent, Agent], redis: Redis) -> None:
        stream = Stream(pair[0], {"message": self.MESSAGE})
        wait_until(lambda: len(stream.texts()) >= 3, "it streams")
        redis.stop()
        time.sleep(0.3)
        redis.start()
        stream.join()
        other = Stream(pair[1], run_id=stream.run_id, after=stream.events[1][0]).join()
        assert other.data("end") == stream.data("end")

    def test_of_another_user_is_not_found(self, agent: Agent) -> None:
        run_id = Stream(agent, {"message": "hello"}).join().run_id
        for other in (run_id, str(uuid4()), "x"):
            answer = agent.client.get(f"/chat/stream/{other}", headers={"X-Forwarded-User": "other"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")

    @pytest.mark.parametrize("last", ["x", "-1", "9" * 19, "1.5"])
    def test_bad_last_event_ids(self, agent: Agent, last: str) -> None:
        answer = agent.client.get(f"/chat/stream/{uuid4()}", headers={"Last-Event-ID": last})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
