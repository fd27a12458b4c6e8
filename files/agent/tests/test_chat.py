import time
from collections.abc import Callable
from uuid import UUID, uuid4

import httpx
import pytest

from servers import Agent, Model, Postgres, wait_until
from streams import Stream


def user_texts(request: dict) -> list[str]:
    return [message["content"] for message in request["messages"] if message["role"] == "user"]


def test_answers_on_a_new_thread(agent: Agent) -> None:
    answer = agent.chat("hello")
    assert answer.status_code == 200
    assert answer.json().keys() == {"response", "thread_id", "run_id"}
    assert "hello" in answer.json()["response"]
    assert UUID(answer.json()["thread_id"])


def test_the_model_sees_earlier_turns(agent: Agent, model: Model) -> None:
    thread = agent.chat("my name is Ada").json()["thread_id"]
    answer = agent.chat("what is my name?", thread)
    assert answer.json()["thread_id"] == thread
    assert "I see 2 user messages" in answer.json()["response"]
    assert "my name is Ada" in answer.json()["response"]
    assert user_texts(model.requests()[-1]) == ["my name is Ada", "what is my name?"]
    assert model.requests()[-1]["messages"][0]["role"] == "system"


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_tools_are_offered_to_the_model_only_where_they_are_enabled(start_agent: Callable[..., Agent], model: Model, enabled: str) -> None:
    assert start_agent(AGENT_TOOLS_ENABLED=enabled).chat("hello").status_code == 200
    assert ("tools" in model.requests()[-1]) is (enabled == "true")


def test_an_answer_is_stored_when_it_is_given(agent: Agent, migrated: Postgres) -> None:
    thread = agent.chat("remember this").json()["thread_id"]
    assert migrated.query("SELECT count(*) FROM checkpoints WHERE thread_id = %s", thread)[0][0] > 0


def test_threads_do_not_mix(agent: Agent) -> None:
    agent.chat("first", "thread-a")
    assert "I see 1 user message." in agent.chat("second", "thread-b").json()["response"]


def test_five_posts_at_once_on_one_thread_are_all_kept(agent: Agent, model: Model) -> None:
    answers = agent.chats([(f"message {number} [[delay 0.1]]", "five-at-once") for number in range(5)])
    assert [answer.status_code for answer in answers] == [200] * 5
    agent.chat("and now?", "five-at-once")
    seen = user_texts(model.requests()[-1])
    assert sorted(seen[:5]) == [f"message {number} [[delay 0.1]]" for number in range(5)]


def test_different_threads_run_side_by_side(agent: Agent) -> None:
    started = time.monotonic()
    answers = agent.chats([("[[delay 1]]", f"side-{number}") for number in range(8)])
    assert [answer.status_code for answer in answers] == [200] * 8
    assert time.monotonic() - started < 4


def test_a_client_that_hangs_up_leaves_a_finished_turn(agent: Agent, model: Model) -> None:
    with pytest.raises(httpx.ReadTimeout):
        agent.client.post("/chat", json={"message": "bye [[delay 1]]", "thread_id": "hung-up"}, timeout=0.3)
    answer = agent.chat("still there?", "hung-up")
    assert answer.status_code == 200
    assert user_texts(model.requests()[-1]) == ["bye [[delay 1]]", "still there?"]


def test_unusual_but_legal_text_round_trips(agent: Agent) -> None:
    text = "e\u0301 \u00e9 \u202eRTL\u202c zero\u200bwidth \U0001f600 \ufeff\x01 " + "a" + "\u0301" * 10_000
    answer = agent.chat(text)
    assert answer.status_code == 200
    assert text in answer.json()["response"]


def test_the_longest_message_is_accepted(agent: Agent) -> None:
    assert agent.chat("x" * 16_000).status_code == 200


class TestTools:
    def test_calculator(self, agent: Agent) -> None:
        before = agent.metric('agent_tool_calls_total{status="success",tool="calculator"}')
        answer = agent.chat('[[tool calculator {"expression": "6*7"}]]')
        assert answer.json()["response"] == "The tool says: 42"
        assert agent.metric('agent_tool_calls_total{status="success",tool="calculator"}') == before + 1

    def test_parallel_calls(self, agent: Agent) -> None:
        answer = agent.chat('[[tool calculator {"expression": "1+1"}]] [[tool calculator {"expression": "2*4"}]]')
        assert answer.json()["response"] == "The tool says: 2; 8"

    def test_a_tool_error_is_told_to_the_model(self, agent: Agent) -> None:
        answer = agent.chat('[[tool calculator {"expression": "1/0"}]]')
        assert "division by zero" in answer.json()["response"]

    def test_arguments_that_do_not_fit_are_told_to_the_model(self, agent: Agent) -> None:
        answer = agent.chat('[[tool calculator {"expression": ["1"], "more": 1}]]')
        assert answer.status_code == 200
        assert "expression" in answer.json()["response"]

    def test_an_unknown_tool_is_refused(self, agent: Agent) -> None:
        before = agent.metric('agent_tool_calls_total{status="error",tool="unknown"}')
        answer = agent.chat('[[tool shell {"command": "id"}]]')
        assert answer.status_code == 200
        assert "shell is not a valid tool" in answer.json()["response"]
        assert agent.metric('agent_tool_calls_total{status="error",tool="unknown"}') == before + 1

    def test_arguments_that_are_not_json_end_the_turn(self, agent: Agent) -> None:
        answer = agent.chat("[[tool calculator {oops]]", "malformed-call")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "model_failed")
        assert agent.chat("next", "malformed-call").status_code == 200

    def test_endless_calls_are_stopped(self, agent: Agent) -> None:
        answer = agent.chat('[[loop calculator {"expression": "1"}]]', "endless")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too_many_steps")
        # What its tools did stays, and so does the question.
        assert "I see 2 user messages." in agent.chat("next", "endless").json()["response"]


def test_what_was_read_of_a_stopped_answer_stays(agent: Agent) -> None:
    thread = f"stopped-{uuid4().hex}"
    text = "[[think two and two]] " + " ".join(f"w{number}" for number in range(100)) + " [[pace 0.05]]"
    stream = Stream(agent, {"message": text, "thread_id": thread})
    wait_until(lambda: len(stream.texts()) > 5, "it is being answered")
    assert agent.client.post(f"/threads/{thread}/runs/{stream.run_id}/cancel?wait=true").status_code == 204
    stream.join()
    assert stream.data("error")["code"] == "cancelled"
    question, answer = agent.client.get(f"/threads/{thread}/state").json()["values"]["messages"]
    assert (question["content"], answer["type"], answer["content"]) == (text, "ai", "".join(stream.texts()))
    assert answer["additional_kwargs"] == {"reasoning_content": "two and two"}
    assert "".join(data["text"] for _, name, data in stream.events if name == "reasoning") == "two and two"
    assert agent.client.get(f"/threads/{thread}").json()["status"] == "idle"
    assert agent.chat("and now?", thread).json()["response"].startswith("I see 2 user messages.")
