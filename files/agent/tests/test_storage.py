"""What one owner may store and read at once: the others, and the workers, do not notice it."""

import re
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from langgraph_sdk.client import SyncLangGraphClient
from langgraph_sdk.errors import APIStatusError

from agent.access.in_flight import MAX_BYTES, SMALL_BYTES, InFlight
from agent.errors import MIB, RateLimited
from sdk import connect, say, texts
from servers import PROXY_SECRET, Agent, Postgres, wait_until

KIB = 1024


@contextmanager
def refused(status: int, code: str, text: str = "") -> Iterator[None]:
    with pytest.raises(APIStatusError) as caught:
        yield
    error: Any = caught.value.body
    assert (caught.value.status_code, error["error"]["code"]) == (status, code)
    assert re.search(text, error["error"]["message"]), error["error"]["message"]


def write(client: SyncLangGraphClient, thread: str, kib: int, character: str = "x") -> None:
    client.threads.update_state(thread, {"messages": [{"role": "user", "content": character * kib * KIB}]}, as_node="model")


def large_thread(client: SyncLangGraphClient, updates: int) -> str:
    """A thread whose last state has 48 KiB for each update, and whose history has the sum of all."""
    thread = client.threads.create()["thread_id"]
    for number in range(updates):
        write(client, thread, 48, chr(ord("a") + number % 26))
    return thread


def resident(agent: Agent) -> int:
    """The most that any worker ever held, in bytes."""
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in [agent.process.pid, *agent.workers()]]
    return max(int(peak[1]) * KIB for peak in peaks if peak)


# Memory


def test_four_histories_at_once_stay_within_bounds(start_agent: Callable[..., Agent]) -> None:
    """The states of this thread together are 38 MiB as they are stored, and were ten times that in memory."""
    agent = start_agent()
    with connect(agent) as client, connect(agent, user="stranger") as stranger:
        thread = large_thread(client, 40)
        before = resident(agent)
        other = stranger.threads.create()["thread_id"]
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(client.http.post, f"/threads/{thread}/history", json={"limit": 1000}) for _ in range(4)]
            said = pool.submit(say, stranger, other, "hello")
            histories = [each.result() for each in asked]
            assert said.result()["messages"][-1]["content"].startswith("I see 1 user message")
        assert resident(agent) - before < 100 * MIB
        assert all(0 < len(history) < 40 for history in histories)


def test_a_history_is_paged_by_bytes_and_loses_nothing(client: SyncLangGraphClient) -> None:
    thread = large_thread(client, 24)
    seen: list[str] = []
    before: Any = None
    pages = 0
    while page := client.threads.get_history(thread, limit=1000, before=before):
        seen += [str(state["checkpoint"]["checkpoint_id"]) for state in page]
        before = page[-1]["checkpoint"]
        pages += 1
    assert pages > 1
    lengths = [len(client.threads.get_state(thread, checkpoint_id=each)["values"]["messages"]) for each in seen]
    assert lengths == list(range(24, 0, -1))
    one: Any = client.threads.get_history(thread, limit=1)
    assert [state["checkpoint"]["checkpoint_id"] for state in one] == seen[:1]
    place: Any = {"checkpoint_id": seen[3]}
    assert [state["checkpoint"]["checkpoint_id"] for state in client.threads.get_history(thread, checkpoint=place)] == [seen[3]]


def test_a_search_is_paged_by_bytes_and_loses_nothing(client: SyncLangGraphClient) -> None:
    mark = uuid.uuid4().hex
    first = large_thread(client, 30)
    client.threads.update(first, metadata={"mark": mark})
    names = [first, *(client.threads.copy(first)["thread_id"] for _ in range(8))]  # type: ignore[index]
    found: list[str] = []
    while page := client.threads.search(metadata={"mark": mark}, limit=100, offset=len(found), sort_by="created_at", sort_order="asc"):
        assert len(page) < len(names)
        assert all(len(thread["values"]["messages"]) == 30 for thread in page)  # type: ignore[arg-type,index]
        found += [thread["thread_id"] for thread in page]
    assert found == names
    few = client.threads.search(metadata={"mark": mark}, limit=100, select=["thread_id"])
    assert len(few) == len(names), "what is not asked for is not read"


def test_a_search_of_the_store_is_paged_by_bytes(client: SyncLangGraphClient) -> None:
    room = uuid.uuid4().hex
    for number in range(160):
        client.store.put_item([room], key=str(number), value={"text": "x" * 60_000})
    found: list[str] = []
    while page := client.store.search_items([room], limit=100, offset=len(found))["items"]:
        found += [item["key"] for item in page]
    assert sorted(map(int, found)) == list(range(160))


@pytest.fixture
def client(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent, user=f"owner-{uuid.uuid4().hex[:8]}") as client:
        yield client


def test_what_is_not_read_is_bounded() -> None:
    answers = InFlight()
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(answers.of("one", MAX_BYTES // 4))
        with pytest.raises(RateLimited), answers.of("one", SMALL_BYTES + 1):
            pass
        with answers.of("one", SMALL_BYTES), answers.of("other", MAX_BYTES):
            pass
    with answers.of("one", 2 * MAX_BYTES):
        pass  # nothing else is on its way
    assert not answers._sent


def test_clients_that_do_not_read_are_told_so(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent()
    with connect(agent) as client, ExitStack() as stack:
        thread = large_thread(client, 40)
        before = resident(agent)
        body = b'{"limit": 1000}'
        user = f"X-Forwarded-User: tester\r\nX-Proxy-Secret: {PROXY_SECRET}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        for _ in range(12):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", agent.port))
            connection.sendall(f"POST /threads/{thread}/history HTTP/1.1\r\nHost: x\r\n{user}\r\n".encode() + body)

        def answer(**headers: str) -> int:
            return agent.client.post(f"/threads/{thread}/history", json={"limit": 1000}, headers=headers).status_code

        wait_until(lambda: answer() == 429, "too much is not read", 30)
        assert answer(**{"X-Forwarded-User": "other"}) == 404, "another owner is not concerned"
        stack.close()
        wait_until(lambda: answer() == 200, "they are gone", 30)
        assert resident(agent) - before < 150 * MIB


# Limits


def test_what_costs_like_a_turn_is_counted_like_one(start_agent: Callable[..., Agent], client: SyncLangGraphClient, migrated: Postgres) -> None:
    agent = start_agent(AGENT_RATE_LIMIT="3/minute")
    name = f"limited-{uuid.uuid4().hex[:8]}"
    large = large_thread(client, 8)
    migrated.query("UPDATE threads SET owner = %s WHERE thread_id = %s RETURNING 1", f"user:{name}", large)
    attempts: dict[str, Callable[[SyncLangGraphClient], Any]] = {
        "update": lambda c: write(c, large, 1),
        "copy": lambda c: c.threads.copy(large),
        "history": lambda c: c.threads.get_history(large, limit=100),
        "state": lambda c: c.threads.get_state(large),
        "thread": lambda c: c.threads.get(large),
    }
    allowed = 0
    with connect(agent, user=name) as limited:
        for attempt in [*attempts.values()][:3]:
            attempt(limited)
            allowed += 1
        for attempt in attempts.values():
            with refused(429, "rate_limited"):
                attempt(limited)
        # What costs little is not counted, so a chat page can always be drawn.
        small = limited.threads.create()["thread_id"]
        for _ in range(5):
            limited.threads.get_state(small)
            limited.threads.get_history(small)
            limited.threads.search(select=["thread_id"])
    assert allowed == 3


def test_an_owner_has_so_much_storage(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(AGENT_STORAGE_MIB="1")
    words = r"[0-9.]+ MiB of the 1\.0 MiB that one user or key may store are used"
    with connect(agent, user=f"full-{uuid.uuid4().hex[:8]}") as client, connect(agent, user=f"other-{uuid.uuid4().hex[:8]}") as stranger:
        small = client.threads.create()["thread_id"]
        say(client, small, "hello")
        thread = client.threads.create()["thread_id"]
        with refused(403, "storage_full", words):
            for _ in range(20):
                write(client, thread, 48)
        assert client.http.client.headers["x-forwarded-user"]
        attempts: list[Callable[[], Any]] = [
            lambda: client.threads.copy(thread),
            lambda: client.threads.create(metadata={"a": "x" * 60_000}),
            lambda: client.threads.update(small, metadata={"a": "x" * 60_000}),
            lambda: client.store.put_item(["a"], key="a", value={"a": "x" * 60_000}),
            lambda: client.runs.create(small, "agent", input={"messages": "hello"}),
            lambda: client.runs.create(None, "agent", input={"messages": "hello"}),
            lambda: write(client, small, 1),
        ]
        for attempt in attempts:
            with refused(403, "storage_full", words):
                attempt()
        answer = agent.client.post("/chat", json={"message": "x"}, headers={"X-Forwarded-User": client.http.client.headers["x-forwarded-user"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "storage_full")
        assert len(texts(client, small)) == 2, "what is there can be read"
        say(stranger, None, "hello")  # another owner is not concerned
        client.threads.delete(thread)
        say(client, small, "again")


def test_what_a_thread_takes_is_known(client: SyncLangGraphClient, migrated: Postgres) -> None:
    """What is added up as it comes is what there is."""
    thread = client.threads.create(metadata={"a": "b"})["thread_id"]
    for number in range(3):
        say(client, thread, f'[[tool calculator {{"expression": "{number}"}}]]')
    write(client, thread, 20)
    client.threads.update(thread, metadata={"c": "x" * 1000})
    copy = client.threads.copy(thread)["thread_id"]  # type: ignore[index]
    known = dict(migrated.query("SELECT thread_id, bytes FROM threads WHERE thread_id = ANY(%s)", [thread, copy]))
    stored = migrated.query(
        "SELECT (SELECT sum(octet_length(checkpoint::text) + octet_length(metadata::text)) FROM checkpoints WHERE thread_id = %(t)s)"
        " + (SELECT sum(octet_length(blob)) FROM checkpoint_blobs WHERE thread_id = %(t)s)"
        " + (SELECT sum(octet_length(blob)) FROM checkpoint_writes WHERE thread_id = %(t)s)".replace("%(t)s", f"'{thread}'")
    )[0][0]
    assert 0.8 * float(stored) < known[thread] < 1.3 * float(stored)
    assert known[copy] == known[thread]


def test_a_thread_has_a_largest_state(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(AGENT_THREAD_MIB="1")
    words = r"have 1\.[0-9] MiB, and 1\.0 MiB are allowed"
    with connect(agent) as client:
        thread = client.threads.create()["thread_id"]
        with refused(422, "thread_too_large", words):
            for _ in range(30):
                write(client, thread, 48)
        number = len(texts(client, thread))
        assert number in (20, 21)
        assert client.threads.get(thread)["status"] == "idle"
        filler: Any = {"messages": [{"role": "user", "content": "x" * 12_000}] * 5}
        ended = [client.runs.wait(thread, "agent", input=filler, raise_error=False) for _ in range(2)]
        assert "thread_too_large" in [str(values.get("__error__", {}).get("error")) for values in ended]  # type: ignore[union-attr]
        remains = client.threads.get_state(thread)["values"]["messages"]
        client.threads.update_state(thread, {"messages": [{"type": "remove", "id": each["id"]} for each in remains[:10]]}, as_node="model")
        assert say(client, thread, "again")["messages"][-1]["type"] == "ai"


def test_metadata_is_bounded(client: SyncLangGraphClient) -> None:
    thread = client.threads.create(metadata={"0": "x" * 40_000})["thread_id"]
    with pytest.raises(httpx.HTTPStatusError, match="65536 bytes"):
        client.threads.update(thread, metadata={"1": "x" * 40_000})
    assert client.threads.update(thread, metadata={"0": "y" * 40_000})["metadata"]["0"][0] == "y", "what replaces is no more"


def test_threads_of_before_are_measured_when_they_are_read(client: SyncLangGraphClient, migrated: Postgres) -> None:
    thread = large_thread(client, 3)
    known = migrated.query(
        "UPDATE threads SET bytes = NULL FROM threads old WHERE threads.thread_id = %s AND old.thread_id = threads.thread_id RETURNING old.bytes", thread
    )
    client.threads.get(thread)
    measured = migrated.query("SELECT bytes FROM threads WHERE thread_id = %s", thread)
    assert 0.9 * known[0][0] < measured[0][0] < 1.1 * known[0][0]
