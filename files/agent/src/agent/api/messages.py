"""Messages as LangGraph's clients write them, as the agent takes them."""

from collections.abc import Sequence
from typing import Any

import orjson
from langchain_core.messages import RemoveMessage

from agent.api.schemas import (
    Answer,
    AnyTextBlock,
    Call,
    FunctionCall,
    GivenMessage,
    GivenMessages,
    Instruction,
    Removal,
    Result,
    StateValues,
    TextBlock,
    UserSaid,
    WrittenMessage,
)
from agent.errors import InvalidRequest


def given_messages(given: GivenMessages, longest: int) -> list[dict[str, Any]]:
    """The input of a run. Raises InvalidRequest where a user's message is too long, or no model could answer.

    longest: of a user's message, in characters
    """
    listed: Sequence[GivenMessage] = given if isinstance(given, list) else [given]
    # An answer that was stopped at once is empty, and says nothing to a model.
    messages = [each for each in map(plain, listed) if each["role"] != "assistant" or each["content"] or each.get("tool_calls")]
    if any(message["role"] == "user" and len(message["content"]) > longest for message in messages):
        raise InvalidRequest(f"messages: each must have at most {longest} characters.")
    said = [message for message in messages if message["role"] != "system"]
    if not said or said[-1]["role"] not in ("user", "tool"):
        raise InvalidRequest("messages: the last one must be the user's, or a tool's result.")
    waiting: set[str] = set()
    for message in said:
        if message["role"] == "tool":
            waiting.discard(message["tool_call_id"])
            continue
        if waiting:
            break
        waiting = {call["id"] for call in message.get("tool_calls", ())}
    if waiting:
        raise InvalidRequest("messages: every tool call must be followed by its result.")
    return messages


def open_results(messages: Sequence[dict[str, Any]]) -> set[str]:
    """The ids of the calls that results belong to and that are not among these messages."""
    calls = {call["id"] for message in messages for call in message.get("tool_calls", ())}
    return {message["tool_call_id"] for message in messages if message["role"] == "tool"} - calls


def written(values: StateValues | None) -> dict[str, Any] | None:
    """What a client puts into a thread's state by hand."""
    if values is None:
        return None
    given: Sequence[WrittenMessage] = values.messages if isinstance(values.messages, list) else [values.messages]
    return {"messages": [RemoveMessage(id=message.id) if isinstance(message, Removal) else plain(message) for message in given]}


def plain(message: GivenMessage) -> dict[str, Any]:
    """In the form that LangChain reads."""
    if isinstance(message, str):
        return {"role": "user", "content": message}
    said: dict[str, Any] = {"role": "user", "content": _text(message.content)}
    if message.id:
        said["id"] = message.id
    match message:
        case UserSaid():
            pass
        case Instruction():
            said["role"] = "system"
        case Answer():
            said["role"] = "assistant"
            if message.tool_calls:
                said["tool_calls"] = [_call(call) for call in message.tool_calls]
        case Result():
            said |= {"role": "tool", "tool_call_id": message.tool_call_id, "status": message.status}
            if message.name:
                said["name"] = message.name
    return said


def _text(content: str | Sequence[TextBlock | AnyTextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _call(call: Call | FunctionCall) -> dict[str, Any]:
    if isinstance(call, Call):
        return {"name": call.name, "args": call.args, "id": call.id, "type": "tool_call"}
    return called_function(call.id, call.function.name, call.function.arguments)


def called_function(call_id: str, name: str, text: str) -> dict[str, Any]:
    """A call that OpenAI's API writes, in the form that LangChain reads. `text` are its arguments. Raises InvalidRequest."""
    try:
        arguments = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest("messages: the arguments of a tool call must be a JSON object.")
    return {"name": name, "args": arguments, "id": call_id, "type": "tool_call"}
