"""Long-term memory: short notes in the LangGraph store that the agent keeps for their owner across threads."""

import re
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from langchain_core.tools import BaseTool, StructuredTool, ToolException
from langgraph.prebuilt import ToolRuntime
from langgraph.store.base import BaseStore

MAX_NOTES = 200
MAX_CHARACTERS = 500
MAX_RECALLED = 20
ROOT = "memories"

Runtime = ToolRuntime[Any, Any]


def namespace(owner: str) -> tuple[str, str]:
    """Where an owner's notes are. The store takes no dots in a name, and owners may have some."""
    return ROOT, owner.replace("%", "%25").replace(".", "%2E")


def _place(runtime: Runtime) -> tuple[BaseStore, tuple[str, str]]:
    owner = runtime.config.get("configurable", {}).get("owner")
    if runtime.store is None or not isinstance(owner, str) or not owner:
        raise ToolException("there is no memory here")
    return runtime.store, namespace(owner)


async def remember(note: str, runtime: Runtime) -> str:
    store, place = _place(runtime)
    # The store keeps JSON in Postgres, which takes neither NUL nor half a surrogate pair.
    note = " ".join(note.replace("\0", "").encode(errors="replace").decode().split())
    if not note or len(note) > MAX_CHARACTERS:
        raise ToolException(f"a note must have 1 to {MAX_CHARACTERS} characters")
    items = await store.asearch(place, limit=MAX_NOTES)
    if any(item.value.get("note") == note for item in items):
        return "This is remembered already."
    if len(items) >= MAX_NOTES:
        raise ToolException(f"the memory is full: {MAX_NOTES} notes; forget some first")
    key = uuid4().hex[:8]
    await store.aput(place, key, {"note": note, "noted": datetime.now(UTC).isoformat(timespec="seconds")}, index=False)
    return f"Remembered as {key}."


async def recall(query: str, runtime: Runtime) -> str:
    store, place = _place(runtime)
    items = await store.asearch(place, limit=MAX_NOTES)
    words = _words(query)
    # The store returns the newest first, and sorting keeps that order among notes with as many words in common.
    notes = [(item.key, str(item.value.get("note"))) for item in items]
    notes.sort(key=lambda note: -len(words & _words(note[1])))
    lines = [f"{key}: {note}" for key, note in notes[:MAX_RECALLED]]
    return "\n".join(lines) or "Nothing is remembered."


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{2,}", text.lower()))


async def forget(key: str, runtime: Runtime) -> str:
    store, place = _place(runtime)
    if not re.fullmatch(r"[0-9a-f]{8}", key) or await store.aget(place, key) is None:
        raise ToolException("no note has this key")
    await store.adelete(place, key)
    return "Forgotten."


def memory_tools() -> list[BaseTool]:
    return [
        StructuredTool.from_function(
            coroutine=remember,
            name="remember",
            description="Keep a short note about the user for later conversations, such as a preference or a name.",
            handle_tool_error=True,
        ),
        StructuredTool.from_function(
            coroutine=recall,
            name="recall",
            description="Find notes about the user from earlier conversations, the best matches first.",
            handle_tool_error=True,
            metadata={"idempotent": True},
        ),
        StructuredTool.from_function(
            coroutine=forget,
            name="forget",
            description="Delete a note, given the key that remember and recall tell.",
            handle_tool_error=True,
            metadata={"idempotent": True},
        ),
    ]
