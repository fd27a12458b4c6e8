"""What of a conversation is shown to the model: as much as its window holds, the newest first to be kept.

A conversation is a sequence of turns, each a user's message and all that followed it. Only whole turns are left out,
from the oldest on, so that a tool's result never stands without its call. Of the last turn everything is kept; where
that alone is too much, its tool results are shortened, the longest first.
"""

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage

from agent.tokens import BYTES_PER_TOKEN, TOKENS_PER_MESSAGE, count

SHORTEST_RESULT_TOKENS = 100
LEFT_OUT = "Earlier messages of this conversation are not shown: they no longer fit."
NO_ANSWER = "This turn ended without an answer."
CUT = "\n[cut here: the rest does not fit]"


def alternating(messages: Sequence[AnyMessage]) -> list[AnyMessage]:
    """With an answer to every turn that has none: some models' templates refuse a question that follows a tool's result."""
    shown: list[AnyMessage] = []
    for message in messages:
        if shown and isinstance(shown[-1], ToolMessage) and isinstance(message, HumanMessage):
            shown.append(AIMessage(NO_ANSWER))
        shown.append(message)
    return shown


def instructed(messages: Sequence[AnyMessage]) -> list[AnyMessage]:
    """Without system messages: their text stands in the user's message that follows, or else in the one before, or else in one of its own.

    Many models take a system message at the start only, and that is the operator's.
    """
    shown: list[AnyMessage] = []
    texts: list[str] = []
    for message in messages:
        if isinstance(message, SystemMessage):
            texts.append(message.text)
            continue
        if texts and isinstance(message, HumanMessage):
            message = _with_text("\n\n".join(texts), message)
            texts = []
        elif texts and not isinstance(message, ToolMessage):  # a result must follow its call
            shown.append(HumanMessage("\n\n".join(texts)))
            texts = []
        shown.append(message)
    if texts and shown and isinstance(shown[-1], HumanMessage):
        shown[-1] = _with_text("\n\n".join(texts), shown[-1], after=True)
    elif texts:
        shown.append(HumanMessage("\n\n".join(texts)))
    return shown


def _with_text(text: str, message: HumanMessage, *, after: bool = False) -> HumanMessage:
    if isinstance(message.content, str):
        content: Any = f"{message.content}\n\n{text}" if after else f"{text}\n\n{message.content}"
    else:
        part = {"type": "text", "text": text}
        content = [*message.content, part] if after else [part, *message.content]
    return message.model_copy(update={"content": content})


def turns(messages: Sequence[AnyMessage]) -> list[Sequence[AnyMessage]]:
    starts = [index for index, message in enumerate(messages) if isinstance(message, HumanMessage)]
    if not starts or starts[0] > 0:
        starts.insert(0, 0)
    return [messages[start:end] for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)]


def last_turn(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    for index in range(len(messages) - 1, -1, -1):
        if isinstance(messages[index], HumanMessage):
            return messages[index:]
    return messages


def fit(messages: Sequence[AnyMessage], budget: int) -> tuple[Sequence[AnyMessage], bool]:
    """The messages to send within about so many tokens, and whether any were left out or shortened."""
    counts = [count(message) for message in messages]
    if sum(counts) <= budget:
        return messages, False
    turn = last_turn(messages)
    start = len(messages) - len(turn)
    left = budget - sum(counts[start:])
    if left < 0:
        return _shorten(turn, counts[start:], budget), True
    for earlier in reversed(turns(messages[:start])):
        size = sum(counts[start - len(earlier) : start])
        if size > left:
            break
        start -= len(earlier)
        left -= size
    return messages[start:], True


def _shorten(turn: Sequence[AnyMessage], counts: list[int], budget: int) -> Sequence[AnyMessage]:
    """The turn with its tool results cut to a common length that lets it fit, if any length does."""
    results = sorted(size for message, size in zip(turn, counts, strict=True) if isinstance(message, ToolMessage))
    room = budget - (sum(counts) - sum(results))
    longest = SHORTEST_RESULT_TOKENS
    for position, size in enumerate(results):
        # Shared evenly among this one and all that are longer.
        share = room // (len(results) - position)
        if size > share:
            longest = max(share, SHORTEST_RESULT_TOKENS)
            break
        room -= size
    return [_cut(message, longest) if isinstance(message, ToolMessage) and size > longest else message for message, size in zip(turn, counts, strict=True)]


def _cut(message: ToolMessage, tokens: int) -> ToolMessage:
    text = message.text.encode(errors="replace")[: (tokens - TOKENS_PER_MESSAGE - 1) * BYTES_PER_TOKEN - len(CUT)]
    return message.model_copy(update={"content": text.decode(errors="ignore") + CUT})
