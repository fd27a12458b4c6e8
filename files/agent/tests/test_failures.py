"""What happens to a conversation when something breaks under it."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg
import pytest

from agent.api.admission import SUBMIT_SECONDS
from servers import Agent, Model, Postgres, wait_until


def error_code(answer: httpx.Response) -> str:
    return answer.json()["error"]["code"]


def sent_messages(model: Model) -> list[tuple[str, str]]:
    return [(message["role"], message.get("content")) for message in model.requests()[-1]["messages"][1:]]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("500", 503, "model_unavailable"),
        ("503", 503, "model_unavailable"),
        ("429", 503, "model_unavailable"),
        ("reset", 503, "model_unavailable"),
        ("truncate", 503, "model_unavailable"),
        ("400", 502, "model_failed"),
        ("401", 502, "model_failed"),
        ("404", 502, "model_failed"),
        ("garbage", 502, "model_failed"),
        ("surrogate", 502, "model_failed"),
        ("overflow", 422, "conversation_too_long"),
        ("hang", 504, "turn_timeout"),
    ],
)
def test_a_failing_model_fails_one_turn_only(agent: Agent, model: Model, fault: str, status: int, code: str) -> None:
    thread = f"fault-{fault}"
    assert agent.chat("before", thread).status_code == 200
    outcomes = agent.metric(f'agent_turns_total{{outcome="{code}"}}')
    started = time.monotonic()
    answer = agent.chat(f"secret-canary [[fault {fault}]]", thread)
    assert time.monotonic() - started < 6.5
    assert (answer.status_code, error_code(answer)) == (status, code)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert answer.json()["error"].get("id") == (answer.headers["X-Request-ID"] if status >= 500 else None)
    assert "canary" not in answer.text
    assert agent.metric(f'agent_turns_total{{outcome="{code}"}}') == outcomes + 1
    assert agent.chat("after", thread).status_code == 200
    assert [text for role, text in sent_messages(model) if role == "user"] == ["before", "after"]


def test_one_retry_hides_a_hiccup(agent: Agent, model: Model) -> None:
    model.control(fault="500", times=1)
    assert agent.chat("hello").status_code == 200
    assert len(model.requests()) == 2


def test_a_failing_model_is_asked_twice_at_most(agent: Agent, model: Model) -> None:
    model.control(fault="500")
    assert agent.chat("hello").status_code == 503
    assert len(model.requests()) == 2


def test_a_turn_that_dies_between_its_steps_keeps_what_its_tools_did(agent: Agent, model: Model, migrated: Postgres) -> None:
    """The tool was called and its result stored, then the model hung until the deadline."""
    thread = "dangling"
    assert agent.chat("before", thread).status_code == 200
    healed = agent.metric("agent_threads_healed_total")
    answer = agent.chat('[[tool calculator {"expression": "1+1"}]] [[delay 3]]', thread)
    assert (answer.status_code, error_code(answer)) == (504, "turn_timeout")
    answer = agent.chat("after", thread)
    assert answer.status_code == 200
    assert agent.metric("agent_threads_healed_total") == healed + 1
    answer = agent.chat("again", thread)
    assert answer.status_code == 200
    assert agent.metric("agent_threads_healed_total") == healed + 1, "once is enough"
    roles = ["user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant", "user"]
    assert [role for role, _ in sent_messages(model)] == roles
    assert [text for role, text in sent_messages(model) if role == "tool"] == ["2"]


def test_a_killed_service_finishes_its_turns_when_it_is_back(start_agent: Callable[..., Agent], model: Model) -> None:
    service = start_agent()
    assert service.chat("before", "killed").status_code == 200
    threading.Timer(2, service.process.kill).start()
    with pytest.raises(httpx.TransportError):
        service.chat('[[tool calculator {"expression": "1+1"}]] [[delay 1.5]]', "killed")
    service.process.wait()
    service.start()
    assert service.chat("after", "killed").status_code == 200
    roles = ["user", "assistant", "user", "assistant", "tool", "assistant", "user"]
    assert [role for role, _ in sent_messages(model)] == roles


def test_a_stopping_service_finishes_its_turns(start_agent: Callable[..., Agent]) -> None:
    service = start_agent()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(service.chat, "[[delay 2]]")
        wait_until(lambda: service.metric("agent_turns_running") == 1, "the turn runs")
        started = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert running.result().status_code == 200
    # uvicorn raises the signal again once it has shut down in order.
    assert service.process.wait(10) in (0, -signal.SIGTERM)
    assert time.monotonic() - started < 8
    service.process = None


class TestPostgres:
    def test_a_restart_is_not_noticed(self, agent: Agent, migrated: Postgres) -> None:
        answers = agent.chats([("[[delay 0.2]]", f"warm-{number}") for number in range(16)])
        assert {answer.status_code for answer in answers} == {200}
        migrated.stop()
        migrated.start()
        answers = agent.chats([("hello", f"restart-{number}") for number in range(8)])
        assert [answer.status_code for answer in answers] == [200] * 8

    def test_one_message_after_a_restart(self, agent: Agent, migrated: Postgres) -> None:
        """All the pool's connections are dead, and one request alone must get past them."""
        agent.chats([("[[delay 0.2]]", f"warm-{number}") for number in range(16)])
        migrated.stop()
        migrated.start()
        started = time.monotonic()
        assert agent.chat("hello").status_code == 200
        assert time.monotonic() - started < 3

    def test_while_it_is_away(self, agent: Agent, migrated: Postgres) -> None:
        thread = agent.chat("before").json()["thread_id"]
        migrated.stop()
        started = time.monotonic()
        answer = agent.chat("lost", thread)
        assert time.monotonic() - started < 10
        assert (answer.status_code, error_code(answer)) in ((503, "storage_unavailable"), (504, "turn_timeout"))
        assert agent.client.get("/health").status_code == 200
        time.sleep(10)
        migrated.start()
        wait_until(lambda: agent.chat("after", thread).status_code == 200, "the service recovers", 10)
        assert "before" in agent.chat("again", thread).json()["response"]

    def test_a_restart_in_the_middle_of_a_turn(self, agent: Agent, migrated: Postgres) -> None:
        thread = agent.chat("before").json()["thread_id"]
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(agent.chat, "[[delay 4]]", thread)
            wait_until(lambda: agent.metric("agent_turns_running") == 1, "the turn runs")
            migrated.stop()
            migrated.start()
            assert running.result().status_code == 200
        assert "I see 3 user messages" in agent.chat("after", thread).json()["response"]

    def test_frozen(self, start_agent: Callable[..., Agent], migrated: Postgres) -> None:
        """Nothing is accepted, and who asks need not wait as long as a turn may take to learn it."""
        service = start_agent(AGENT_TURN_TIMEOUT_SECONDS="60")
        assert service.chat("hello").status_code == 200
        migrated.freeze()
        try:
            started = time.monotonic()
            answer = service.chat("hello")
            assert time.monotonic() - started < SUBMIT_SECONDS + 1
            assert (answer.status_code, error_code(answer)) == (503, "storage_unavailable")
            assert answer.headers["Retry-After"] == "5"
        finally:
            migrated.thaw()
        wait_until(lambda: service.chat("hello").status_code == 200, "the service recovers", 10)

    def test_what_it_refuses_ends_one_turn(self, agent: Agent, migrated: Postgres) -> None:
        """Not a failure that passes: the same again would be refused for ever."""
        with refusing(migrated, "refused"):
            started = time.monotonic()
            answer = agent.chat("secret-canary", "refused")
            assert time.monotonic() - started < 2
            assert (answer.status_code, error_code(answer)) == (500, "internal_error")
            assert agent.chat("hello", "not-refused").status_code == 200
        assert migrated.query("SELECT status FROM runs WHERE thread_id = 'refused'") == [("error",)]
        assert "I see 1 user message." in agent.chat("after", "refused").json()["response"]


@contextlib.contextmanager
def refusing(database: Postgres, thread: str) -> Iterator[None]:
    """Let Postgres refuse every checkpoint of a thread, and quote it, as it does with what is no JSON."""
    with psycopg.connect(database.admin("agent"), autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'bad value secret-canary' USING ERRCODE = '22P05'; END $$"
        )
        connection.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON checkpoints FOR EACH ROW WHEN (NEW.thread_id = '{thread}') EXECUTE FUNCTION refuse()")
        try:
            yield
        finally:
            connection.execute("DROP FUNCTION refuse CASCADE")


def test_what_users_write_is_never_logged(agent: Agent) -> None:
    assert list(agent.log_lines())
    assert "secret-canary" not in agent.log.read_text()
