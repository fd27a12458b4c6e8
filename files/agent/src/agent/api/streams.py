"""A run's events in the forms that LangGraph's clients ask for."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, message_chunk_to_message
from pydantic import ValidationError

from agent.api.answers import sse
from agent.runs.events import Event
from agent.runs.followers import Followers

# Which events of a run a stream mode is made of.
SOURCES = {
    "values": "values",
    "updates": "updates",
    "custom": "custom",
    "checkpoints": "checkpoints",
    "tasks": "tasks",
    "debug": "debug",
    "messages": "messages",
    "messages-tuple": "messages",
}


def sources(modes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(SOURCES[mode] for mode in modes))


class WholeMessages:
    """The mode `messages`: each message so far, whole, each time that a piece of it comes."""

    def __init__(self) -> None:
        self._open: dict[str, AIMessageChunk] = {}
        self._known: set[str] = set()

    def take(self, data: Any) -> list[tuple[str, Any]]:
        message, metadata = data
        message_id = str(message.get("id"))
        events: list[tuple[str, Any]] = []
        if message_id not in self._known:
            self._known.add(message_id)
            events.append(("messages/metadata", {message_id: {"metadata": metadata}}))
        piece = _chunk(message)
        if piece is None:
            self._open.pop(message_id, None)
            return [*events, ("messages/complete", [message])]
        so_far = self._open.get(message_id)
        whole = piece if so_far is None else so_far + piece
        self._open[message_id] = whole
        if piece.chunk_position == "last":
            del self._open[message_id]
            return [*events, ("messages/complete", [_message(whole)])]
        return [*events, ("messages/partial", [_message(whole)])]

    def rest(self) -> list[tuple[str, Any]]:
        """What nobody said is complete, when the run has ended."""
        rest = [("messages/complete", [_message(whole)]) for whole in self._open.values()]
        self._open.clear()
        return rest


def _chunk(message: dict[str, Any]) -> AIMessageChunk | None:
    if message.get("type") != "AIMessageChunk":
        return None
    try:
        return AIMessageChunk.model_validate(message)
    except ValidationError:
        return None


def _message(whole: AIMessageChunk) -> dict[str, Any]:
    return message_chunk_to_message(whole).model_dump()


async def translate(events: AsyncIterator[Event], modes: Sequence[str], run_id: str, after: int) -> AsyncGenerator[bytes]:
    """The server-sent events with a number above `after`.

    An event of a run may become several. Only the last one carries the number, so that a stream that broke between
    them is taken up before the first.
    """
    whole = WholeMessages() if "messages" in modes else None
    async for event in events:
        translated = list(_translate(event, modes, whole, run_id))
        if event.id <= after:
            continue
        for index, (name, data) in enumerate(translated, 1):
            yield sse(name, data, str(event.id) if index == len(translated) else None)


def _translate(event: Event, modes: Sequence[str], whole: WholeMessages | None, run_id: str) -> Sequence[tuple[str, Any]]:
    kind, _, namespace = event.event.partition("|")
    match kind:
        case "metadata":
            return [("metadata", event.data)]
        case "messages":
            told = whole.take(event.data) if whole else []
            if namespace:
                told = [(f"{name}|{namespace}", data) for name, data in told]
            return [*told, (event.event, event.data)] if "messages-tuple" in modes else told
        case "values" | "updates" | "custom" | "checkpoints" | "tasks" | "debug":
            return [(event.event, event.data)] if kind in modes else []
        case "error":
            return [("error", describe_error(event.data))]
        case "end":
            rest = whole.rest() if whole else []
            return [*rest, ("end", {"run_id": run_id, "status": event.data["status"]})]
    return []


async def stream(followers: Followers, owner: str, run_id: str, modes: Sequence[str], after: int = 0) -> AsyncGenerator[bytes]:
    # Whole messages are made of their first pieces too, so those are read again.
    start = 0 if "messages" in modes else after
    async with aclosing(followers.events(owner, run_id, start)) as events:
        async for piece in translate(events, modes, run_id, after):
            yield piece


async def last_values(followers: Followers, owner: str, run_id: str) -> dict[str, Any]:
    """What a run left in its thread, for one that tells its values; or what went wrong."""
    values: dict[str, Any] = {}
    async with aclosing(followers.events(owner, run_id)) as events:
        async for event in events:
            if event.event == "values":
                values = event.data
            elif event.event == "error":
                return {"__error__": describe_error(event.data)}
            elif event.event == "end" and not values and event.data.get("response"):
                # Told by another worker, which has only the answer.
                values = {"messages": [AIMessage(event.data["response"])]}
    return values


def describe_error(error: Mapping[str, Any]) -> dict[str, Any]:
    told = {"error": error["code"], "message": error["message"]}
    return told | ({"retry_after": error["retry_after"]} if error.get("retry_after") else {})
