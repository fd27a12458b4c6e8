"""Crons, made and changed through LangGraph's own client, and fired by one worker or several."""

import signal
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from langgraph_sdk.client import SyncLangGraphClient
from langgraph_sdk.errors import APIStatusError, NotFoundError

from agent.keys import revoke
from sdk import ASSISTANT_ID, connect, make_key, say, texts
from servers import Agent, Model, Postgres, wait_until

DAILY = "0 9 * * *"
HELLO: Any = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def user() -> str:
    return f"owner-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def client(agent: Agent, user: str) -> Iterator[SyncLangGraphClient]:
    with connect(agent, user=user) as client:
        yield client


def create(client: SyncLangGraphClient, **how: Any) -> Any:
    """The client's type says that it is a run."""
    given = {"schedule": DAILY, "input": HELLO, **how}
    thread = given.pop("thread_id", None)
    return client.crons.create_for_thread(thread, "agent", **given) if thread else client.crons.create("agent", **given)


def find(client: SyncLangGraphClient, cron_id: str) -> Any:
    return next(each for each in client.crons.search(limit=1000) if each["cron_id"] == cron_id)


def fall_due(postgres: Postgres, *crons: Any, ago: str = "1 second") -> None:
    ids = [cron["cron_id"] for cron in crons]
    assert len(postgres.query("UPDATE crons SET next_at = now() - %s::interval WHERE cron_id = ANY(%s::uuid[]) RETURNING 1", ago, ids)) == len(ids)


def runs_of(postgres: Postgres, cron: Any) -> list[str]:
    """The states of the runs that it has begun."""
    return [row[0] for row in postgres.query("SELECT status FROM runs WHERE options->'metadata'->>'cron_id' = %s ORDER BY created_at", cron["cron_id"])]


def wait_for_runs(postgres: Postgres, cron: Any, count: int = 1) -> None:
    # A dead worker's runs are taken over after its lease, and then wait for their turn on a machine with other work.
    wait_until(lambda: runs_of(postgres, cron) == ["success"] * count, "its run has ended", 60)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


# What is kept


def test_what_is_made_is_shown(client: SyncLangGraphClient) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=400)
    made = create(client, timezone=ZoneInfo("Asia/Kolkata"), end_time=end, metadata={"a": 1}, multitask_strategy="reject", config={"tags": ["x"]})
    assert (made["assistant_id"], made["thread_id"], made["schedule"], made["timezone"]) == (ASSISTANT_ID, None, DAILY, "Asia/Kolkata")
    assert (made["enabled"], made["on_run_completed"], made["metadata"], made["user_id"]) == (True, "delete", {"a": 1}, None)
    assert made["payload"] == {"assistant_id": "agent", "input": HELLO, "multitask_strategy": "reject", "config": {"tags": ["x"]}}
    assert moment(made["end_time"]) == end
    following = moment(made["next_run_date"])
    assert datetime.now(UTC) < following <= datetime.now(UTC) + timedelta(days=1)
    assert following.astimezone(ZoneInfo("Asia/Kolkata")).strftime("%H:%M:%S") == "09:00:00"
    assert client.crons.search() == [made]


def test_search_and_count(client: SyncLangGraphClient, agent: Agent) -> None:
    thread = client.threads.create()["thread_id"]
    first = create(client, metadata={"kind": "a"})
    second = create(client, thread_id=thread, metadata={"kind": "b", "n": 1}, enabled=False)
    with connect(agent, user=f"stranger-{uuid.uuid4().hex[:8]}") as stranger:
        create(stranger, metadata={"kind": "a"})

    def found(**how: Any) -> list[str]:
        return [each["cron_id"] for each in client.crons.search(**how)]

    both = [second["cron_id"], first["cron_id"]]
    assert found() == found(assistant_id="agent") == found(assistant_id=ASSISTANT_ID) == both
    assert found(sort_by="created_at", sort_order="asc") == both[::-1]
    assert found(sort_by="next_run_date", sort_order="asc") == both, "what has no next time comes first"
    assert found(thread_id=thread) == found(enabled=False) == found(metadata={"kind": "b"}) == [second["cron_id"]]
    assert found(enabled=True) == found(limit=1, offset=1) == [first["cron_id"]]
    assert found(assistant_id=str(uuid.uuid4())) == found(thread_id="other") == found(metadata={"kind": "c"}) == []
    assert client.crons.search(thread_id=thread, select=["cron_id", "enabled"]) == [{"cron_id": second["cron_id"], "enabled": False}]
    assert "now" in client.crons.search(select=["now"])[0]
    assert (client.crons.count(), client.crons.count(thread_id=thread), client.crons.count(metadata={"kind": "c"})) == (2, 1, 0)


def test_an_update_changes_what_is_given(client: SyncLangGraphClient) -> None:
    end = datetime.now(UTC) + timedelta(days=400)
    made = create(client, end_time=end, metadata={"a": 1, "b": 1})
    cron = made["cron_id"]
    changed: Any = client.crons.update(cron, metadata={"b": 2}, input={"messages": "other"})
    assert (changed["metadata"], changed["payload"]["input"], changed["payload"]["assistant_id"]) == ({"a": 1, "b": 2}, {"messages": "other"}, "agent")
    assert (changed["next_run_date"], changed["end_time"]) == (made["next_run_date"], made["end_time"])
    off: Any = client.crons.update(cron, enabled=False)
    assert (off["enabled"], off["next_run_date"]) == (False, None)
    on: Any = client.crons.update(cron, enabled=True, schedule="30 * * * *", timezone="Europe/Berlin")
    assert moment(on["next_run_date"]).minute == 30
    assert client.crons.update(cron, end_time=None)["end_time"] is None
    near: Any = client.crons.update(cron, schedule="@yearly", end_time=datetime.now(UTC) + timedelta(seconds=20))
    assert near["next_run_date"] is None, "it ends before its next time"
    assert client.crons.update(cron, on_run_completed="keep")["on_run_completed"] == "keep"


def test_a_foreign_one_is_none(client: SyncLangGraphClient, agent: Agent) -> None:
    cron, thread = create(client)["cron_id"], client.threads.create()["thread_id"]
    with connect(agent, user=f"stranger-{uuid.uuid4().hex[:8]}") as stranger:
        attempts: list[Callable[[], Any]] = [
            lambda: stranger.crons.update(cron, enabled=False),
            lambda: stranger.crons.delete(cron),
            lambda: create(stranger, thread_id=thread),
        ]
        for attempt in attempts:
            with pytest.raises(NotFoundError):
                attempt()
        assert (stranger.crons.search(), stranger.crons.count()) == ([], 0)
    assert find(client, cron)["enabled"] is True


def test_it_goes_with_its_thread_or_its_assistant(client: SyncLangGraphClient) -> None:
    thread, assistant = client.threads.create()["thread_id"], client.assistants.create("agent")["assistant_id"]
    create(client, thread_id=thread)
    client.crons.create(assistant, schedule=DAILY, input=HELLO)
    assert client.crons.count(assistant_id=assistant) == 1
    client.threads.delete(thread)
    assert client.crons.count() == 1
    client.assistants.delete(assistant)
    assert client.crons.count() == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no schedule": ({"schedule": None}, "schedule: must be given"),
    "each second": ({"schedule": "* * * * * *"}, "A minute is the shortest time"),
    "nonsense": ({"schedule": "daily"}, "five fields"),
    "long": ({"schedule": "1," * 200 + "1 * * * *"}, "schedule"),
    "number": ({"schedule": 5}, "schedule"),
    "never": ({"schedule": "0 0 31 2 *"}, "no such day"),
    "time zone": ({"timezone": "Mars/Olympus"}, "IANA"),
    "the past": ({"end_time": "2020-01-01T00:00:00Z"}, "in the future"),
    "no time": ({"end_time": "soon"}, "must be a date and a time"),
    "number of a time": ({"end_time": 1e300}, "must be a date and a time"),
    "last year": ({"end_time": "9999-12-31T23:59:59-12:00"}, "must be a date and a time"),
    "no input": ({"input": None}, "input: must be given"),
    "blank": ({"input": {"messages": " "}}, "input"),
    "long message": ({"input": {"messages": "x" * 20_000}}, "at most 16000 characters"),
    "webhook": ({"webhook": "http://127.0.0.1"}, "Webhooks"),
    "typo": ({"interupt_before": ["tools"]}, "not known"),
    "option": ({"context": {"model": "x"}}, "the options are"),
    "step": ({"interrupt_before": ["x"]}, "interrupt_before"),
    "strategy": ({"multitask_strategy": "x"}, "multitask_strategy"),
    "completed": ({"on_run_completed": "x"}, "on_run_completed"),
    "enabled": ({"enabled": "yes"}, "enabled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_crons(agent: Agent, client: SyncLangGraphClient, name: str) -> None:
    wrong, says = REFUSED[name]
    thread, cron = client.threads.create()["thread_id"], create(client)["cron_id"]
    http = client.http.client
    body = {"assistant_id": "agent", "schedule": DAILY, "input": HELLO} | wrong
    answers = [http.post("/runs/crons", json=body), http.post(f"/threads/{thread}/runs/crons", json=body)]
    if None not in wrong.values():
        answers.append(http.patch(f"/runs/crons/{cron}", json=wrong))
    for answer in answers:
        assert answer.status_code == 422, answer.text
    told = [answer.json()["error"]["message"] for answer in answers]
    assert says in told[0], told
    assert client.crons.count() == 1


def test_wrong_ids(client: SyncLangGraphClient) -> None:
    http = client.http.client
    assert http.patch(f"/runs/crons/{uuid.uuid4()}", json={"enabled": False}).status_code == 404
    assert http.patch("/runs/crons/x", json={"enabled": False}).status_code == 404
    assert http.delete("/runs/crons/x").status_code == 404
    with pytest.raises(NotFoundError):
        create(client, thread_id="none")
    with pytest.raises(NotFoundError):
        client.crons.create(str(uuid.uuid4()), schedule=DAILY, input=HELLO)


def test_an_owner_has_no_more_than_a_hundred(client: SyncLangGraphClient, migrated: Postgres, user: str) -> None:
    create(client)
    migrated.query(
        "INSERT INTO crons (cron_id, owner, schedule, enabled, payload, metadata) SELECT gen_random_uuid(), owner, schedule, false, payload, metadata"
        " FROM crons, generate_series(1, 99) WHERE owner = %s RETURNING 1",
        f"user:{user}",
    )
    with pytest.raises(APIStatusError) as refused:
        create(client)
    assert refused.value.response.json()["error"]["code"] == "too_many_crons"
    assert client.crons.count() == 100


# What is run


def test_a_run_on_a_thread(client: SyncLangGraphClient, migrated: Postgres) -> None:
    thread = client.threads.create()["thread_id"]
    say(client, thread, "first")
    cron = create(client, thread_id=thread, metadata={"kind": "report"})
    before = moment(cron["next_run_date"])
    fall_due(migrated, cron)
    wait_until(lambda: len(texts(client, thread)) == 4, "it has run")
    assert texts(client, thread)[2] == "hello"
    run = client.runs.list(thread)[0]
    assert run["metadata"] == {"kind": "report", "cron_id": cron["cron_id"]}
    assert moment(find(client, cron["cron_id"])["next_run_date"]) == before, "once a day"


def test_a_run_on_a_thread_of_its_own(client: SyncLangGraphClient, migrated: Postgres, model: Model) -> None:
    assistant = client.assistants.create("agent", config={"configurable": {"system_prompt": "You are a pirate."}})["assistant_id"]
    kept: Any = client.crons.create(assistant, schedule=DAILY, input=HELLO, on_run_completed="keep")
    gone = create(client, input={"messages": "to be deleted"})
    fall_due(migrated, kept, gone)
    wait_for_runs(migrated, kept)
    wait_until(lambda: any("to be deleted" in str(request["messages"]) for request in model.requests()), "the other has run")
    wait_until(lambda: len(client.threads.search()) == 1, "and its thread is gone")
    [thread] = client.threads.search()
    assert texts(client, thread["thread_id"])[0] == "hello"
    assert any("You are a pirate." in str(request["messages"][0]) for request in model.requests())
    client.assistants.delete(assistant)


def test_one_run_makes_up_for_all_that_were_missed(client: SyncLangGraphClient, migrated: Postgres) -> None:
    cron = create(client, schedule="*/5 * * * *", on_run_completed="keep")
    fall_due(migrated, cron, ago="3 days")
    wait_for_runs(migrated, cron)
    assert moment(find(client, cron["cron_id"])["next_run_date"]) > datetime.now(UTC)
    time.sleep(2.5)
    assert len(runs_of(migrated, cron)) == 1


def test_an_end_and_a_pause_are_heeded(client: SyncLangGraphClient, migrated: Postgres) -> None:
    last = create(client, on_run_completed="keep")
    migrated.query("UPDATE crons SET end_time = now(), next_at = now() - interval '1 minute' WHERE cron_id = %s RETURNING 1", last["cron_id"])
    wait_for_runs(migrated, last)
    assert find(client, last["cron_id"])["next_run_date"] is None, "that was its last"
    paused = create(client, on_run_completed="keep")
    client.crons.update(paused["cron_id"], enabled=False)
    time.sleep(2.5)
    assert runs_of(migrated, paused) == []


@pytest.mark.parametrize(("strategy", "count"), [("enqueue", 2), ("reject", 1), ("interrupt", 2)])
def test_a_busy_thread(client: SyncLangGraphClient, migrated: Postgres, strategy: str, count: int) -> None:
    thread = client.threads.create()["thread_id"]
    cron = create(client, thread_id=thread, multitask_strategy=strategy)
    busy = client.runs.create(thread, "agent", input={"messages": "[[delay 3]]"})
    fall_due(migrated, cron)
    wait_until(lambda: moment(find(client, cron["cron_id"])["next_run_date"]) > datetime.now(UTC), "its time is used up")
    client.runs.join(thread, busy["run_id"])
    wait_until(lambda: all(run["status"] not in ("pending", "running") for run in client.runs.list(thread)), "all have ended")
    assert len(client.runs.list(thread)) == count
    assert client.runs.get(thread, busy["run_id"])["status"] == ("interrupted" if strategy == "interrupt" else "success")


def test_runs_do_not_pile_up(client: SyncLangGraphClient, migrated: Postgres) -> None:
    thread = client.threads.create()["thread_id"]
    cron = create(client, thread_id=thread)
    client.runs.create(thread, "agent", input={"messages": "[[delay 4]]"})
    for _ in range(2):
        fall_due(migrated, cron)
        time.sleep(1.5)
    assert runs_of(migrated, cron) == ["pending"], "the second waits for the first to begin"
    wait_for_runs(migrated, cron, 2)


def test_the_limits_of_its_owner_count(agent: Agent, migrated: Postgres) -> None:
    key = make_key(migrated, f"k{uuid.uuid4().hex[:8]}", {"concurrent_runs": 1})
    time.sleep(1)
    with connect(agent, key=key) as client:
        cron = create(client, on_run_completed="keep")
        busy = client.runs.create(None, "agent", input={"messages": "[[delay 3]]"}, on_completion="keep")
        fall_due(migrated, cron)
        time.sleep(2)
        assert runs_of(migrated, cron) == []
        client.runs.join(busy["thread_id"], busy["run_id"])
        wait_for_runs(migrated, cron)


def test_the_crons_of_a_revoked_key_rest(agent: Agent, migrated: Postgres) -> None:
    name = f"k{uuid.uuid4().hex[:8]}"
    key = make_key(migrated, name)
    time.sleep(1)
    with connect(agent, key=key) as client:
        cron = create(client, on_run_completed="keep")
    fall_due(migrated, cron)
    wait_for_runs(migrated, cron)
    with psycopg.connect(migrated.admin("agent"), row_factory=psycopg.rows.dict_row) as connection:
        revoke(connection, name)
    fall_due(migrated, cron)
    wait_until(lambda: migrated.query("SELECT next_at > now() FROM crons WHERE cron_id = %s", cron["cron_id"]) == [(True,)], "its time passes")
    assert len(runs_of(migrated, cron)) == 1


def test_several_workers_begin_each_once(start_agent: Callable[..., Agent], migrated: Postgres, user: str) -> None:
    service = start_agent(AGENT_WORKERS="3")
    with connect(service, user=user) as client:
        crons = [create(client, on_run_completed="keep", input={"messages": f"cron {number}"}) for number in range(30)]
        for turn in (1, 2):
            fall_due(migrated, *crons)
            for cron in crons:
                wait_for_runs(migrated, cron, turn)
        assert len(client.threads.search(limit=1000)) == 60


def test_restarts_lose_and_double_nothing(start_agent: Callable[..., Agent], migrated: Postgres, user: str) -> None:
    service = start_agent(AGENT_WORKERS="2")
    with connect(service, user=user) as client:
        crons = [create(client, on_run_completed="keep") for _ in range(20)]
    fall_due(migrated, *crons)
    wait_until(lambda: any(runs_of(migrated, cron) for cron in crons), "the first have begun")
    service.stop(signal.SIGKILL)
    # The dead workers' leases would end after half a minute.
    migrated.query("UPDATE crons SET taken_until = now() RETURNING 1")
    service.start()
    for cron in crons:
        wait_for_runs(migrated, cron)
