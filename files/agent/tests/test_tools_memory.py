import json

import pytest
from langgraph.store.memory import InMemoryStore

from agent.tools.memory import MAX_NOTES, memory_tools, namespace
from graphs import RUNNER, Graph
from servers import Model


def tool(name: str, **arguments: str) -> str:
    return f"[[tool {name} {json.dumps(arguments)}]]"


@pytest.fixture
def store() -> InMemoryStore:
    return InMemoryStore()


@pytest.fixture
def graph(model: Model, store: InMemoryStore) -> Graph:
    return Graph(model, memory_tools(), store=store, memory_enabled=True)


def say(graph: Graph, text: str, owner: str | None = "user:ada") -> str:
    return graph.say(text, **({"owner": owner} if owner else {})).answer.removeprefix("The tool says: ")


def test_notes_last_across_threads(graph: Graph) -> None:
    key = say(graph, tool("remember", note="likes tea")).removeprefix("Remembered as ").rstrip(".")
    say(graph, tool("remember", note="has a cat named Tom"))
    assert graph.say(tool("recall", query="tea?"), thread="another", owner="user:ada").answer.splitlines()[0].endswith(f"{key}: likes tea")
    assert say(graph, tool("forget", key=key)) == "Forgotten."
    assert "tea" not in say(graph, tool("recall", query="tea"))
    assert "cat" in say(graph, tool("recall", query=""))


@pytest.mark.parametrize("other", ["user:eve", "user:ad", "user:ada2", "key:ada", "user:ada.x", "user:*"])
def test_notes_belong_to_their_owner(graph: Graph, other: str) -> None:
    key = say(graph, tool("remember", note="likes tea")).removeprefix("Remembered as ").rstrip(".")
    assert say(graph, tool("recall", query="tea"), other) == "Nothing is remembered."
    assert say(graph, tool("forget", key=key), other) == "no note has this key"
    assert "tea" in say(graph, tool("recall", query="tea"))


@pytest.mark.parametrize("owner", ["user:a.b", "user:a%2Eb", "user:\u00e9", "key:x" * 20])
def test_any_owner_can_have_notes(graph: Graph, owner: str) -> None:
    say(graph, tool("remember", note="likes tea"), owner)
    assert "likes tea" in say(graph, tool("recall", query="tea"), owner)


def test_different_owners_have_different_places() -> None:
    owners = ["user:a.b", "user:a%2Eb", "user:a%252Eb", "user:ab"]
    assert len({namespace(owner) for owner in owners}) == len(owners)
    assert not any("." in label for owner in owners for label in namespace(owner))


def test_without_an_owner_there_is_no_memory(graph: Graph) -> None:
    assert say(graph, tool("remember", note="x"), None) == "there is no memory here"


def test_without_a_store_there_is_no_memory(model: Model) -> None:
    assert say(Graph(model, memory_tools()), tool("remember", note="x")) == "there is no memory here"


@pytest.mark.parametrize(("note", "reason"), [("", "1 to 500"), (" \n ", "1 to 500"), ("x" * 501, "1 to 500"), ("a" * 500, "Remembered")])
def test_notes_are_short(graph: Graph, note: str, reason: str) -> None:
    assert reason in say(graph, tool("remember", note=note))


def test_notes_can_be_stored(graph: Graph, store: InMemoryStore) -> None:
    say(graph, tool("remember", note="nul \u0000 and\nlines"))
    assert [item.value["note"] for item in store.search(namespace("user:ada"))] == ["nul and lines"]


def test_a_note_is_kept_once(graph: Graph, store: InMemoryStore) -> None:
    for _ in range(3):
        say(graph, tool("remember", note="likes tea"))
    assert len(store.search(namespace("user:ada"))) == 1


def test_the_memory_is_bounded(graph: Graph, store: InMemoryStore) -> None:
    async def fill() -> None:
        for number in range(MAX_NOTES):
            await store.aput(namespace("user:ada"), f"{number:08x}", {"note": f"note {number}"})

    RUNNER.run(fill())
    assert "the memory is full" in say(graph, tool("remember", note="one more"))
    assert len(say(graph, tool("recall", query="note")).splitlines()) == 20


@pytest.mark.parametrize("key", ["", "../x", "0000000g", "x" * 100])
def test_keys_are_checked(graph: Graph, key: str) -> None:
    assert say(graph, tool("forget", key=key)) == "no note has this key"
