"""What an interrupted turn left in a thread, made fit for the message that comes next.

A model must not be shown a conversation with a hole in it (a call without a result), and must not forget what its tools
did. So a turn that called a tool stays: the results that there are stay with it, and each call without one is closed by
a message that says so. Of a turn that called none, the message that its run was given is erased: its sender knows that it
failed. What a client wrote into the thread by hand, or under an id of its own, stays.
"""

from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

from langchain_core.messages import AIMessage, AnyMessage, RemoveMessage, ToolMessage
from langgraph.graph.message import REMOVE_ALL_MESSAGES

# What answers the messages that a turn begins with.
OURS = (AIMessage, ToolMessage)
# As new_run_id() makes them.
RUN_ID_CHARACTERS = 36
RUN_ID_VERSION = 7
# Of a call that was still waiting for its turn or for a person, and of one that had begun.
WAITED = "This call was not run: the user sent another message before it was allowed."
STOPPED = "This call was not run to its end: the turn was stopped before. It may have had an effect."


def is_answer(message: AnyMessage) -> bool:
    return isinstance(message, AIMessage) and not message.tool_calls and not message.invalid_tool_calls


def mend(
    messages: Sequence[AnyMessage],
    results: Mapping[str, ToolMessage],
    answered: Collection[str],
    *,
    waits: bool,
) -> list[AnyMessage]:
    """Return the thread's messages as they must be before a new one is added.

    results: what finished of the last step's calls, by the call's id, where the step as a whole did not finish
    answered: ids of the calls whose results come with the new message
    waits: nothing of the last step has run, it waits for a person
    """
    complete = next((index for index in range(len(messages), 0, -1) if is_answer(messages[index - 1])), 0)
    mended = list(messages[:complete])
    for turn in _turns(messages[complete:]):
        if any(isinstance(message, AIMessage) and message.tool_calls for message in turn):
            mended += _closed(turn, results, answered, STOPPED if not waits else WAITED)
        else:
            mended += [message for message in turn if not isinstance(message, OURS) and not _of_a_run(message)]
    return mended


def changes(before: Sequence[AnyMessage], after: Sequence[AnyMessage]) -> list[AnyMessage | RemoveMessage]:
    """What the reducer of a thread's messages must be given to make `after` of `before`."""
    kept = {message.id for message in after} & {message.id for message in before}
    if [message.id for message in after[: len(kept)]] == [message.id for message in before if message.id in kept]:
        return [*(RemoveMessage(id=str(message.id)) for message in before if message.id not in kept), *after[len(kept) :]]
    # The reducer can only append, so whatever stands after a hole has to be given anew.
    return [RemoveMessage(id=REMOVE_ALL_MESSAGES), *after]


def _of_a_run(message: AnyMessage) -> bool:
    """Whether the id is what a run gives to the messages of its input."""
    try:
        return UUID(str(message.id)[:RUN_ID_CHARACTERS]).version == RUN_ID_VERSION
    except ValueError:
        return False


def _turns(messages: Sequence[AnyMessage]) -> list[list[AnyMessage]]:
    turns: list[list[AnyMessage]] = []
    for message in messages:
        if not turns or (isinstance(turns[-1][-1], OURS) and not isinstance(message, OURS)):
            turns.append([])
        turns[-1].append(message)
    return turns


def _closed(turn: Sequence[AnyMessage], results: Mapping[str, ToolMessage], answered: Collection[str], text: str) -> list[AnyMessage]:
    there = {message.tool_call_id for message in turn if isinstance(message, ToolMessage)} | set(answered)
    closed: list[AnyMessage] = []
    hole: list[AnyMessage] = []
    for message in turn:
        if not isinstance(message, ToolMessage):
            closed += hole
            hole = []
        if isinstance(message, AIMessage):
            if not message.tool_calls:
                continue  # a call that could not be read: it would stand there without a result for ever
            hole = [
                results.get(str(call["id"])) or ToolMessage(text, name=call["name"], tool_call_id=call["id"], id=f"{message.id}-{index}", status="error")
                for index, call in enumerate(message.tool_calls)
                if call["id"] not in there
            ]
        closed.append(message)
    return closed + hole
