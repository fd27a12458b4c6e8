"""What is shown to the model fits its window, and is never a conversation with a hole in it."""

import random

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage

from agent.errors import ConversationTooLong
from agent.llm.context import CUT, LEFT_OUT, fit, last_turn, turns
from agent.tokens import count
from graphs import Graph
from servers import Model


def turn(number: int, words: int = 10, calls: int = 0, result: str = "result") -> list[AnyMessage]:
    messages: list[AnyMessage] = [HumanMessage(f"question {number} " + "word " * words)]
    for call in range(calls):
        identity = f"call-{number}-{call}"
        messages.append(AIMessage("", tool_calls=[{"name": "x", "args": {"a": call}, "id": identity}]))
        messages.append(ToolMessage(result, tool_call_id=identity))
    return [*messages, AIMessage(f"answer {number}")]


def assert_whole(messages: list[AnyMessage]) -> None:
    """Starts with a user, and every result follows its call."""
    assert isinstance(messages[0], HumanMessage)
    open_calls: set[str] = set()
    for message in messages:
        if isinstance(message, ToolMessage):
            open_calls.remove(message.tool_call_id)
        else:
            assert not open_calls
        if isinstance(message, AIMessage):
            open_calls |= {call["id"] for call in message.tool_calls}


def test_what_fits_is_left_alone() -> None:
    messages = turn(1) + turn(2)
    assert fit(messages, 10_000) == (messages, False)
    assert fit([], 100) == ([], False)


def test_the_oldest_turns_go_first_and_whole() -> None:
    messages = [message for number in range(20) for message in turn(number, calls=2)]
    shown, left_out = fit(messages, sum(count(message) for message in messages[-12:]))
    assert left_out
    assert shown == messages[-12:]
    assert_whole(list(shown))


def test_the_last_turn_stays_when_nothing_else_fits() -> None:
    messages = turn(1) + turn(2, calls=1)[:-1]
    shown, left_out = fit(messages, sum(count(message) for message in messages[3:]))
    assert (shown, left_out) == (messages[2:], True)


def test_long_results_of_the_last_turn_are_shortened() -> None:
    question, *rest = turn(1, calls=3)[:-1]
    contents = ["short", "x" * 30_000, "y" * 9_000]
    rest = [message.model_copy(update={"content": contents.pop(0)}) if isinstance(message, ToolMessage) else message for message in rest]
    shown, left_out = fit([question, *rest], 2_000)
    assert left_out
    assert_whole(list(shown))
    results = [message.text for message in shown if isinstance(message, ToolMessage)]
    assert results[0] == "short"
    assert results[1].startswith("xxx")
    assert results[1].endswith(CUT)
    assert results[2].startswith("yyy")
    assert results[2].endswith(CUT)
    assert sum(count(message) for message in shown) <= 2_000
    assert "x" * 30_000 in [message.text for message in rest]  # the thread itself keeps them


def test_any_conversation_and_any_budget() -> None:
    chance = random.Random(7)
    for _ in range(300):
        messages = [
            message
            for number in range(chance.randint(1, 8))
            for message in turn(number, chance.randint(0, 200), chance.randint(0, 4), "r" * chance.randint(0, 5000))
        ]
        if chance.random() < 0.5:
            messages.pop()
        budget = chance.randint(50, 8000)
        shown, left_out = fit(messages, budget)
        assert_whole(list(shown))
        assert shown[0] in messages
        assert [message.id for message in last_turn(shown)] == [message.id for message in last_turn(messages)]
        if not left_out:
            assert shown == messages
        smallest = sum(min(count(m), 100) if isinstance(m, ToolMessage) else count(m) for m in last_turn(messages))
        if smallest <= budget:
            assert sum(count(message) for message in shown) <= budget


def test_turns() -> None:
    messages = turn(1, calls=1) + turn(2)
    assert turns(messages) == [messages[:4], messages[4:]]
    assert turns(messages[1:]) == [messages[1:4], messages[4:]]


@pytest.mark.parametrize("text", ["plain words " * 50, "\u6f22\u5b57" * 100, "\U0001f600" * 100, "", "\ud800"])
def test_every_text_can_be_counted(text: str) -> None:
    assert count(HumanMessage(text)) >= len(text.split()) / 2


class TestAgainstAModel:
    def test_a_long_conversation_goes_on(self, model: Model) -> None:
        graph = Graph(model, context_tokens=1000, max_tokens=200, system_prompt="Be brief.")
        for number in range(30):
            graph.say(f"message {number} " + "word " * 20)
        sent = model.requests()[-1]["messages"]
        assert sent[0]["content"] == f"Be brief.\n\n{LEFT_OUT}"
        assert sent[-1]["content"].startswith("message 29 ")
        assert 5 < len(sent) < 40
        assert sent[1]["role"] == "user"
        first = model.requests()[0]["messages"]
        assert first[0]["content"] == "Be brief."

    def test_a_refusal_is_answered_with_half_as_much_once(self, model: Model) -> None:
        graph = Graph(model, context_tokens=2000, max_tokens=200, system_prompt="Be brief.")
        for number in range(12):
            graph.say(f"message {number} " + "word " * 60)
        model.control(fault="overflow", times=1)
        before = len(model.requests())
        assert "message" in graph.say("and now?").answer
        refused, accepted = model.requests()[before:]
        assert len(accepted["messages"]) < len(refused["messages"])
        assert accepted["messages"][-1]["content"] == "and now?"

    def test_a_second_refusal_is_told_to_the_client(self, model: Model) -> None:
        graph = Graph(model)
        model.control(fault="overflow")
        with pytest.raises(ConversationTooLong):
            graph.say("hello")
        assert len(model.requests()) == 2

    def test_the_servers_own_limit_is_learned(self, model: Model) -> None:
        """The scripted server says 8192 when it refuses."""
        graph = Graph(model, context_tokens=100_000, max_tokens=256, system_prompt="Be brief.")
        model.control(fault="overflow", times=1)
        graph.say("hello")
        graph.say("x" * 30_000)
        graph.say("y" * 30_000)
        assert len(model.requests()[-1]["messages"]) == 2
