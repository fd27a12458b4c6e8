"""A completion's messages and parameters as the agent takes them."""

from typing import Any

from agent.api.openai_schemas import Completion, Instruction, Question
from agent.api.threads import text_of
from agent.errors import InvalidRequest


def messages_of(asked: Completion, longest: int) -> list[dict[str, Any]]:
    """The conversation with each instruction in its place.

    Many models take a system message at the start only, and that is the operator's. An instruction therefore stands in
    a user's message: the one that follows it, or else the one before it, or else one of its own.
    """
    messages: list[dict[str, Any]] = []
    instructions: list[str] = []
    for message in asked.messages:
        text = text_of(message.content)
        if isinstance(message, Instruction):
            instructions.append(text)
            continue
        if isinstance(message, Question):
            if len(text) > longest:
                raise InvalidRequest(f"messages: a question must have at most {longest} characters.")
            text = "\n\n".join([*instructions, text])
            instructions.clear()
        else:
            _instruct(messages, instructions)
        if text:  # an answer that was stopped at once is empty
            messages.append({"role": message.role, "content": text})
    if not any(message["role"] == "user" for message in messages):
        raise InvalidRequest("messages: there must be a question, a message of the user's.")
    _instruct(messages, instructions)
    return messages


def _instruct(messages: list[dict[str, Any]], instructions: list[str]) -> None:
    """Put instructions that no question follows at the end of the conversation so far."""
    if instructions and messages and messages[-1]["role"] == "user":
        instructions.insert(0, messages.pop()["content"])
    if instructions:
        messages.append({"role": "user", "content": "\n\n".join(instructions)})
        instructions.clear()


def parameters_of(asked: Completion, most_tokens: int) -> dict[str, Any]:
    """What the model is to be told, in its own words."""
    named = asked.model_dump(include={"temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop"}, exclude_none=True)
    limits = [limit for limit in (asked.max_completion_tokens, asked.max_tokens) if limit]
    return named | ({"max_completion_tokens": min(*limits, most_tokens)} if limits else {})
