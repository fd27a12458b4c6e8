"""A completion's messages and parameters as the agent takes them."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from agent.api.messages import called_function
from agent.api.openai_schemas import (
    MAX_METADATA_BYTES,
    Answer,
    Completion,
    ImagePart,
    Instruction,
    NamedTool,
    Question,
    RefusalPart,
    Result,
    Sampling,
    TextFormat,
    TextPart,
    ToolsAllowed,
)
from agent.errors import ConversationTooLong, InvalidRequest
from agent.tokens import count_text

Content = str | Sequence[TextPart | ImagePart | RefusalPart] | None
# What the model is shown is cut where it is known what else it is shown. This only keeps out what it surely is not.
SHOWN_AT_MOST = 2


def conversation_of(asked: Completion, longest: int, context_tokens: int, *, goes_on: bool = False) -> list[dict[str, Any]]:
    """The whole conversation, without the turns that no model with such a context is shown; or what goes on with one.

    A question may have `longest` characters. Raises ConversationTooLong where the last one has more.
    """
    messages = messages_of(asked.messages)
    last = next((message for message in reversed(messages) if message["role"] == "user"), None)
    if last is None and not (goes_on and messages and messages[-1]["role"] == "tool"):
        raise InvalidRequest("messages: there must be a question, a message of the user's.")
    if last is not None and len(_text_of(last["content"])) > longest:
        raise ConversationTooLong(f"messages: the last question must have at most {longest} characters.")
    if not goes_on:
        _check_results(messages)
    return _newest(messages, SHOWN_AT_MOST * context_tokens)


def new_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a thread that remembers the rest does not have yet: results of tools, or the last question."""
    results = next((index for index in range(len(messages), 0, -1) if messages[index - 1]["role"] != "tool"), 0)
    if results < len(messages):
        return list(messages[results:])
    return [next(message for message in reversed(messages) if message["role"] == "user")]


def messages_of(given: Iterable[Instruction | Question | Answer | Result]) -> list[dict[str, Any]]:
    """The messages as LangChain takes them, with each instruction in its place, without empty ones.

    Many models take a system message at the start only, and that is the operator's. An instruction therefore stands in
    a user's message: the one that follows it, or else the one before it, or else one of its own.
    """
    messages: list[dict[str, Any]] = []
    instructions: list[str] = []
    for message in given:
        match message:
            case Instruction():
                instructions.extend(text for text in [_text(message.content)] if text)
            case Question():
                content = _content(message.content)
                for text in reversed(instructions):
                    content = _join(text, content)
                instructions.clear()
                if content:
                    messages.append({"role": "user", "content": content})
            case Answer():
                _instruct(messages, instructions)
                text = _text(message.content) or message.refusal or ""
                calls = [called_function(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
                if text or calls:  # an answer that was stopped at once is empty
                    messages.append({"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {}))
            case Result():
                messages.append({"role": "tool", "content": _text(message.content), "tool_call_id": message.tool_call_id})
    if any(message["role"] == "user" for message in messages):
        _instruct(messages, instructions)
    return messages


def _instruct(messages: list[dict[str, Any]], instructions: list[str]) -> None:
    """Put instructions that no question follows at the end of the conversation so far."""
    if instructions and messages and messages[-1]["role"] == "user":
        messages[-1]["content"] = _join(messages[-1]["content"], "\n\n".join(instructions))
    elif instructions:
        messages.append({"role": "user", "content": "\n\n".join(instructions)})
    instructions.clear()


def _text(content: Content) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content if not isinstance(part, ImagePart))


def _content(content: Content) -> str | list[dict[str, Any]]:
    """Text as long as there are no images. Blank text is none."""
    if not isinstance(content, str | None) and any(isinstance(part, ImagePart) for part in content):
        return [
            {"type": "image_url", "image_url": part.image_url.model_dump(exclude_none=True)} if isinstance(part, ImagePart) else _part(_text([part]))
            for part in content
        ]
    text = _text(content)
    return text if text.strip() else ""


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _join(before: Any, after: Any) -> Any:
    """Two contents in one, a blank line between their texts."""
    if isinstance(before, str) and isinstance(after, str):
        return f"{before}\n\n{after}" if before and after else before or after
    parts = [content if isinstance(content, list) else [_part(content)] for content in (before, after)]
    return [*parts[0], *parts[1]]


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _check_results(messages: Sequence[dict[str, Any]]) -> None:
    """Model servers refuse a result without its call, and a call without its result, each in words of its own."""
    waiting: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                raise InvalidRequest("messages: a tool's result must follow the message that calls the tool, once.")
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            break
        waiting = {call["id"] for call in message.get("tool_calls", ())}
    if waiting:
        raise InvalidRequest("messages: every tool call must be followed by its result.")


def _newest(messages: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The last turn, and as many whole turns before it as have about so many tokens."""
    start = len(messages)
    for index in range(len(messages) - 1, -1, -1):
        tokens -= count_text(_text_of(messages[index]["content"]))
        if messages[index]["role"] == "user":
            if tokens < 0 and start < len(messages):
                break
            start = index
    else:
        return list(messages)
    return list(messages[start:])


def parameters_of(asked: Completion, most_tokens: int) -> dict[str, Any]:
    """What the model is to be told, in its own words."""
    parameters = asked.model_dump(include=set(Sampling.model_fields), exclude_none=True)
    for name in ("logit_bias", "bad_words", "stop_token_ids", "allowed_token_ids", "chat_template_kwargs", "structured_outputs"):
        if not parameters.get(name, True):
            del parameters[name]
    if not parameters.get("logprobs"):
        parameters.pop("top_logprobs", None)
    if stop := [text for text in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()) if text]:
        parameters["stop"] = stop
    limits = [limit for limit in (asked.max_completion_tokens, asked.max_tokens) if limit]
    if limits:
        parameters["max_completion_tokens"] = min(*limits, most_tokens)
    if asked.response_format is not None and not isinstance(asked.response_format, TextFormat):
        parameters["response_format"] = asked.response_format.model_dump(by_alias=True, exclude_none=True)
    return parameters | _tools(asked)


def _tools(asked: Completion) -> dict[str, Any]:
    """The caller's tools that the model may use, and whether it must. The agent's own are always there to be used."""
    tools = [tool.model_dump(include={"type", "function"}, exclude_none=True) for tool in asked.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools: no two tools may have the same name.")
    choice: Any = asked.tool_choice
    if isinstance(choice, ToolsAllowed):
        wanted = {tool.function.name for tool in choice.allowed_tools.tools}
        tools = [tool for tool in tools if tool["function"]["name"] in wanted]
        choice = choice.allowed_tools.mode
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise InvalidRequest("tool_choice: must be one of the tools.")
        choice = choice.model_dump()
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice: there must be tools where one is required.")
    if choice == "none" or not tools:
        return {}
    parallel = {} if asked.parallel_tool_calls is None else {"parallel_tool_calls": asked.parallel_tool_calls}
    return {"tools": tools, **parallel} | ({} if choice in (None, "auto") else {"tool_choice": choice})


def metadata_of(asked: Completion) -> dict[str, Any]:
    """What is kept with the run."""
    if len(orjson.dumps(asked.metadata)) > MAX_METADATA_BYTES:
        raise InvalidRequest(f"metadata: must have at most {MAX_METADATA_BYTES} bytes of JSON.")
    return {**(asked.metadata or {}), **({"user": asked.user} if asked.user else {})}
