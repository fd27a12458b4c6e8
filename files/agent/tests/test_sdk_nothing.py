"""What means nothing is accepted, and the fields are those that LangGraph's client sends."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langgraph_sdk._async import assistants, cron, runs, store, threads
from langgraph_sdk.client import SyncLangGraphClient
from pydantic import BaseModel, ValidationError

from agent.api import schemas
from agent.api.requests import NOT_SUPPORTED
from sdk import connect, say
from servers import Agent

NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
TEXT = {"messages": "hello"}
# Each body, the least that is taken, and its fields that the client sends in the address instead.
BODIES: dict[type[BaseModel], dict[str, Any]] = {
    schemas.AssistantSearch: {},
    schemas.AssistantCount: {},
    schemas.ThreadCreate: {},
    schemas.ThreadUpdate: {},
    schemas.ThreadSearch: {},
    schemas.ThreadCount: {},
    schemas.StateAt: {"checkpoint": {"thread_id": "a", "checkpoint_ns": ""}},
    schemas.StateUpdate: {},
    schemas.History: {},
    schemas.RunCreate: {"assistant_id": "agent"},
    schemas.StatelessRunCreate: {"assistant_id": "agent", "input": TEXT},
    schemas.RunsCancel: {"thread_id": "a", "run_ids": ["00000000-0000-0000-0000-000000000000"]},
    schemas.ItemPut: {"namespace": ["a"], "key": "a", "value": {}},
    schemas.ItemDelete: {"namespace": ["a"], "key": "a"},
    schemas.ItemSearch: {},
    schemas.NamespaceList: {},
    schemas.RunConfig: {},
    schemas.Command: {},
    schemas.Checkpoint: {},
    schemas.CronCreate: {"assistant_id": "agent", "schedule": "@daily", "input": TEXT},
    schemas.StatelessCronCreate: {"assistant_id": "agent", "schedule": "@daily", "input": TEXT},
    schemas.CronSearch: {},
    schemas.CronCount: {},
}
# What takes each method's body.
TAKES: dict[Callable[..., Any], list[type[BaseModel]]] = {
    assistants.AssistantsClient.search: [schemas.AssistantSearch],
    assistants.AssistantsClient.count: [schemas.AssistantCount],
    threads.ThreadsClient.create: [schemas.ThreadCreate],
    threads.ThreadsClient.update: [schemas.ThreadUpdate],
    threads.ThreadsClient.search: [schemas.ThreadSearch],
    threads.ThreadsClient.count: [schemas.ThreadCount],
    threads.ThreadsClient.update_state: [schemas.StateUpdate],
    threads.ThreadsClient.get_history: [schemas.History],
    runs.RunsClient.create: [schemas.RunCreate, schemas.StatelessRunCreate],
    runs.RunsClient.stream: [schemas.RunCreate, schemas.StatelessRunCreate],
    runs.RunsClient.wait: [schemas.RunCreate, schemas.StatelessRunCreate],
    runs.RunsClient.cancel_many: [schemas.RunsCancel],
    cron.CronClient.create: [schemas.StatelessCronCreate],
    cron.CronClient.create_for_thread: [schemas.CronCreate],
    cron.CronClient.update: [schemas.CronUpdate],
    cron.CronClient.search: [schemas.CronSearch],
    cron.CronClient.count: [schemas.CronCount],
    store.StoreClient.put_item: [schemas.ItemPut],
    store.StoreClient.delete_item: [schemas.ItemDelete],
    store.StoreClient.search_items: [schemas.ItemSearch],
    store.StoreClient.list_namespaces: [schemas.NamespaceList],
}
# Keys of dictionaries in these methods that are no field of a body.
INNER = {
    "assistants", "next", "Prefer", "Last-Event-ID", "ttl", "strategy", "updates", "values", "command", "as_node", "graph_id", "action",
    "subgraphs", "select",
}  # fmt: skip


def sent(method: Callable[..., Any]) -> set[str]:
    """The names that a method of the client puts into a body: the keys of its dictionaries, and what it assigns to them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    keys = {key.value for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if isinstance(key, ast.Constant)}
    assigned = {
        target.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant)
    }
    return {str(name) for name in keys | assigned}


@pytest.mark.parametrize("method", TAKES, ids=lambda method: method.__qualname__)
def test_every_field_that_the_client_sends_is_known(method: Callable[..., Any]) -> None:
    names = sent(method)
    assert names, "the client's source is not as it was"
    for model in TAKES[method]:
        assert names - model.model_fields.keys() - INNER == set()


def test_the_fields_of_a_method_are_found() -> None:
    assert {"assistant_id", "stream_mode", "webhook", "on_completion", "feedback_keys"} <= sent(runs.RunsClient.stream)
    assert "thread_id" in sent(threads.ThreadsClient.create)
    assert {"schedule", "timezone", "on_run_completed"} <= sent(cron.CronClient.create)


FIELDS = [(model, name) for model, least in BODIES.items() for name in model.model_fields if name not in least]


@pytest.mark.parametrize(("model", "name"), FIELDS)
def test_null_is_as_good_as_left_out(model: type[BaseModel], name: str) -> None:
    least = BODIES[model]
    assert model.model_validate({**least, name: None}) == model.model_validate(least)


def is_absent(model: type[BaseModel], name: str) -> bool:
    return any(getattr(extra, "func", None) is schemas._nothing for extra in model.model_fields[name].metadata)


@pytest.mark.parametrize(("model", "name"), [field for field in FIELDS if is_absent(*field)])
def test_what_is_not_there_takes_only_what_means_nothing(model: type[BaseModel], name: str) -> None:
    least = BODIES[model]
    for value in NOTHING:
        model.model_validate({**least, name: value})
    for value in (1, True, "x", ["x"], {"a": 1}):
        with pytest.raises(ValidationError) as refused:
            model.model_validate({**least, name: value})
        assert refused.value.errors()[0]["type"] == "not_supported"
    assert name in NOT_SUPPORTED or name in {"configurable", "graph", "command", "checkpoint", "checkpoint_id"}


@pytest.mark.parametrize("model", [model for model in BODIES if issubclass(model, schemas.Search)], ids=lambda model: model.__name__)
def test_what_is_looked_for_may_have_fields_of_newer_clients(model: type[BaseModel]) -> None:
    assert model.model_validate({**BODIES[model], "of_the_future": 1}) == model.model_validate(BODIES[model])


@pytest.mark.parametrize("model", [schemas.RunCreate, schemas.StatelessRunCreate, schemas.StateUpdate, schemas.RunsCancel, schemas.ItemPut])
def test_what_is_run_or_written_may_not(model: type[BaseModel]) -> None:
    """`interupt_before` would run what was to wait."""
    with pytest.raises(ValidationError):
        model.model_validate({**BODIES[model], "interupt_before": ["tools"]})


# The service


@pytest.fixture
def client(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent) as client:
        yield client


def test_a_run_with_all_that_clients_send_for_nothing(client: SyncLangGraphClient) -> None:
    thread = client.threads.create(supersteps=[], ttl=None)["thread_id"]
    body = {
        "assistant_id": "agent", "input": {**TEXT}, "command": {"resume": None, "goto": [], "update": None}, "context": {}, "webhook": None,
        "config": {"configurable": {}, "tags": ["a"], "metadata": {"b": 2}, "recursion_limit": 25, "callbacks": [], "run_name": "x"},
        "metadata": {"a": 1}, "feedback_keys": [], "after_seconds": 0, "checkpoint": None, "checkpoint_during": True, "stream_mode": None,
        "interrupt_before": [], "interrupt_after": None, "langsmith_tracer": None, "on_completion": "keep", "on_disconnect": "cancel",
        "if_not_exists": "create", "multitask_strategy": None, "stream_subgraphs": False, "stream_resumable": None, "durability": None,
    }  # fmt: skip
    for path in (f"/threads/{thread}/runs/wait", "/runs/wait"):
        values = client.http.post(path, json=body)
        assert [message["type"] for message in values["messages"]] == ["human", "ai"], path
    [run] = client.runs.list(thread, limit=1000)
    assert run["metadata"] == {"a": 1, "b": 2}
    assert client.http.get(f"/threads/{thread}/runs/{run['run_id']}/join", params={"cancel_on_disconnect": "0"})["messages"]
    assert client.threads.search(limit=1000, metadata=None, ids=None, status=None)
    asked = {"namespace_prefix": ["nothing"], "filter": None, "query": "", "refresh_ttl": True, "limit": 500}
    assert client.http.post("/store/items/search", json=asked) == {"items": []}
    client.store.put_item(["nothing"], key="a", value={"a": None}, index=False)
    assert client.store.get_item(["nothing"], key="a", refresh_ttl=False)["value"] == {"a": None}


@pytest.mark.parametrize("empty", [None, {}], ids=["null", "empty"])
def test_an_empty_input_beside_a_command(client: SyncLangGraphClient, empty: Any) -> None:
    thread = client.threads.create()["thread_id"]
    say(client, thread, '[[tool calculator {"expression": "6*7"}]]', interrupt_before=["tools"])
    # The thread waits for no answer, which is another refusal than that of the two together.
    answer = client.http.client.post(f"/threads/{thread}/runs/wait", json={"assistant_id": "agent", "input": empty, "command": {"resume": 1}})
    assert answer.json()["error"]["code"] == "nothing_waits"
    values = client.http.post(f"/threads/{thread}/runs/wait", json={"assistant_id": "agent", "input": empty, "command": {}})
    assert values["messages"][-1]["content"] == "The tool says: 42"
    again = client.http.client.post(f"/threads/{thread}/runs/wait", json={"assistant_id": "agent", "input": empty, "command": {}})
    assert (again.status_code, again.json()["error"]["code"]) == (422, "invalid_request")


def test_a_run_is_followed_without_its_thread(client: SyncLangGraphClient) -> None:
    run = client.runs.create(None, "agent", input={"messages": "[[delay 0.5]] hello"}, stream_mode=["values"])
    text = client.http.client.get(f"/runs/{run['run_id']}/stream", params={"cancel_on_disconnect": "0"}).text
    assert "event: values" in text
    assert "event: end" in text
