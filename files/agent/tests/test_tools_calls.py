"""What the model asks for is input like any other: named tools only, checked, bounded, and never the end of a turn."""

import asyncio
import json
import logging
from typing import Annotated, Any, Literal

import pytest
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool, StructuredTool, ToolException, tool
from langgraph.errors import GraphRecursionError
from langgraph.prebuilt import InjectedState, ToolRuntime
from langgraph.types import Command
from pydantic import BaseModel, Field

from agent.errors import InvalidRequest, ModelFailed, TooManySteps
from agent.settings import SettingsError
from agent.tools import create_tools
from agent.tools.approval import check_answer
from agent.tools.toolbox import Toolbox
from graphs import Graph, settings
from servers import Model

SECRET = "postgresql://agent:canary@10.0.0.1/secret"


def call(name: str, **arguments: Any) -> str:
    return f"[[tool {name} {json.dumps(arguments)}]]"


class Address(BaseModel):
    city: str = Field(max_length=20)
    zip: int = Field(ge=1)


@tool
def echo(text: str, times: int = 1) -> str:
    """Repeat a text."""
    return text * times


@tool
def locate(address: Address, kind: Literal["a", "b"]) -> str:
    """Find a place."""
    return f"{address.city} {kind}"


@tool
def leak() -> str:
    """Fail."""
    raise RuntimeError(SECRET)


@tool
def refuse() -> str:
    """Fail with words for the model."""
    raise ToolException("the ticket is closed\0\ud800" + "x" * 10_000)


@tool
async def sleep() -> str:
    """Take long."""
    await asyncio.sleep(60)
    return "late"


@tool
def odd() -> Any:
    """Give something that is no text."""
    return [{"type": "text", "text": "seen"}, {"type": "image", "base64": "canary" * 1000}]


@tool
def injected(word: str, runtime: ToolRuntime, state: Annotated[dict[str, Any], InjectedState]) -> str:
    """Use what LangGraph hands to tools."""
    return f"{word} {runtime.config['configurable']['owner']} {len(state['messages'])}"


@tool
def bare(runtime: ToolRuntime) -> Command[Any]:
    """Answer with a command."""
    return Command(update={"messages": [ToolMessage("commanded", tool_call_id=runtime.tool_call_id)]})


def schema_tool(calls: list[Any]) -> BaseTool:
    """A tool that comes with a JSON schema, as those of MCP servers do."""

    async def run(**arguments: Any) -> str:
        calls.append(arguments)
        return "ran"

    schema = {
        "type": "object",
        "properties": {"path": {"type": "string", "maxLength": 10}, "mode": {"enum": ["r", "w"]}},
        "required": ["path"],
    }
    return StructuredTool(name="schema_tool", description="x", args_schema=schema, coroutine=run)


TOOLS = [echo, locate, leak, refuse, sleep, odd, injected, bare]


class TestInjection:
    """The scripted model asks for what a text in the conversation could make a real one ask for."""

    @pytest.mark.parametrize("name", ["shell", "python", "__import__", "os.system", "Echo", "eval", "x" * 5000, "ech\u043e"])
    def test_unknown_tools_are_refused(self, model: Model, name: str) -> None:
        outcome = Graph(model, TOOLS).say(f"[[tool {name} {{}}]]")
        (result,) = outcome.results
        assert result.status == "error"
        assert "is not a valid tool" in result.text
        assert "echo, locate" in result.text
        assert len(result.text) < 500

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"text": None},
            {"text": ["a"]},
            {"text": {"$ref": "x"}},
            {"text": "a", "times": "many"},
            {"text": "a", "times": 1.5},
            {"times": 1},
        ],
    )
    def test_arguments_are_checked(self, model: Model, arguments: dict[str, Any]) -> None:
        (result,) = Graph(model, TOOLS).say(call("echo", **arguments)).results
        assert result.status == "error"
        assert result.text.startswith("The arguments do not fit.")
        assert "Traceback" not in result.text
        assert "pydantic" not in result.text

    @pytest.mark.parametrize(
        "arguments",
        [
            {"address": {"city": "x" * 21, "zip": 1}, "kind": "a"},
            {"address": {"city": "x", "zip": 0}, "kind": "a"},
            {"address": "Berlin", "kind": "a"},
            {"address": {"city": "x", "zip": 1}, "kind": "c"},
        ],
    )
    def test_nested_arguments_are_checked(self, model: Model, arguments: dict[str, Any]) -> None:
        (result,) = Graph(model, TOOLS).say(call("locate", **arguments)).results
        assert result.text.startswith("The arguments do not fit.")

    @pytest.mark.parametrize(
        ("arguments", "fits"),
        [
            ({"path": "a"}, True),
            ({"path": "a", "mode": "r"}, True),
            ({}, False),
            ({"path": 7}, False),
            ({"path": "x" * 11}, False),
            ({"path": "a", "mode": "x"}, False),
            ({"path": "a", "runtime": {}}, False),
            ({"path": "a", "other": 1}, False),
        ],
    )
    def test_json_schemas_are_checked(self, model: Model, arguments: dict[str, Any], fits: bool) -> None:
        calls: list[Any] = []
        (result,) = Graph(model, [schema_tool(calls)]).say(call("schema_tool", **arguments)).results
        assert (result.status, calls) == (("success", [arguments]) if fits else ("error", []))

    def test_what_is_injected_cannot_be_given_by_the_model(self, model: Model) -> None:
        script = call("injected", word="x", runtime={"config": {"configurable": {"owner": "user:eve"}}}, state={})
        assert Graph(model, TOOLS).say(script, owner="user:ada").results[0].text == "x user:ada 2"

    def test_steps_are_bounded(self, model: Model) -> None:
        with pytest.raises((TooManySteps, GraphRecursionError)):
            Graph(model, TOOLS).say('[[loop echo {"text": "a"}]]')
        assert len(model.requests()) <= 13

    def test_calls_are_bounded(self, model: Model) -> None:
        with pytest.raises(TooManySteps, match="tool calls"):
            Graph(model, TOOLS, turn_tool_calls=3).say('[[loop echo {"text": "a"}]]')
        assert len(model.requests()) == 4

    def test_calls_of_one_step_are_bounded(self, model: Model) -> None:
        graph = Graph(model, TOOLS, turn_tool_calls=3)
        with pytest.raises(TooManySteps):
            graph.say(call("echo", text="a") * 4)
        state = graph.graph.get_state({"configurable": {"thread_id": "thread"}})
        assert not [message for message in state.values["messages"] if isinstance(message, ToolMessage)]
        assert len(Graph(model, TOOLS, turn_tool_calls=3).say(call("echo", text="a") * 3).results) == 3

    def test_the_limits_are_those_of_a_turn(self, model: Model) -> None:
        graph = Graph(model, TOOLS, turn_tool_calls=3)
        for _ in range(4):
            assert graph.say(call("echo", text="a")).answer == "The tool says: a"

    def test_tokens_are_bounded(self, model: Model) -> None:
        with pytest.raises(TooManySteps, match="tokens"):
            Graph(model, TOOLS, turn_tokens=60).say('[[loop echo {"text": "a"}]]')
        assert len(model.requests()) < 6

    def test_arguments_that_are_no_json(self, model: Model) -> None:
        with pytest.raises(ModelFailed):
            Graph(model, TOOLS).say("[[tool echo {oops]]")


class TestResults:
    def test_tools_run_side_by_side_and_are_told_of(self, model: Model) -> None:
        outcome = Graph(model, TOOLS).say(call("echo", text="a") + call("shell"))
        assert outcome.answer == "The tool says: a; " + outcome.results[1].text
        events = [(event["name"], event["state"], event.get("status")) for event in outcome.events]
        assert sorted(events, key=str) == sorted(
            [("echo", "start", None), ("echo", "end", "success"), ("shell", "start", None), ("shell", "end", "error")],
            key=str,
        )
        assert {event["id"] for event in outcome.events} == {result.tool_call_id for result in outcome.results}

    def test_exceptions_do_not_reach_the_model(self, model: Model, caplog: pytest.LogCaptureFixture) -> None:
        outcome = Graph(model, TOOLS).say(call("leak") + call("echo", text="b"))
        assert [(result.text, result.status) for result in outcome.results] == [
            ("The tool failed.", "error"),
            ("b", "success"),
        ]
        record = next(record for record in caplog.records if record.name == "agent.tools.calls")
        assert record.__dict__["error"] == "RuntimeError"
        assert "canary" not in str([vars(record) for record in caplog.records])

    def test_words_for_the_model_reach_it(self, model: Model) -> None:
        (result,) = Graph(model, TOOLS).say(call("refuse")).results
        assert result.text.startswith("the ticket is closed?x")
        assert len(result.text) == 1000

    def test_time_is_bounded(self, model: Model) -> None:
        (result,) = Graph(model, TOOLS, tool_timeout_seconds=1).say(call("sleep")).results
        assert result.text == "The tool did not finish within 1 seconds."

    def test_size_is_bounded(self, model: Model) -> None:
        (result,) = Graph(model, TOOLS, tool_result_chars=200).say(call("echo", text="ab", times=1000)).results
        assert result.text == "ab" * 100 + "\n[cut here: 1800 more characters]"

    def test_what_is_no_text_is_left_out(self, model: Model) -> None:
        (result,) = Graph(model, TOOLS).say(call("odd")).results
        assert result.text == "seen\n[something that is no text was left out]"

    def test_a_tool_may_answer_with_a_command(self, model: Model) -> None:
        assert Graph(model, TOOLS).say(call("bare")).answer == "The tool says: commanded"

    @pytest.mark.parametrize(
        ("metadata", "attempts"),
        [
            (None, 1),
            ({}, 1),
            ({"idempotent": True}, 2),
            ({"readOnlyHint": True}, 2),
            ({"idempotentHint": True}, 2),
            ({"readOnlyHint": False, "idempotentHint": None}, 1),
        ],
    )
    def test_only_idempotent_tools_are_tried_again(self, model: Model, metadata: dict[str, Any] | None, attempts: int) -> None:
        tried = []

        async def flaky() -> str:
            tried.append(1)
            raise ConnectionError(SECRET)

        flaky_tool = StructuredTool.from_function(coroutine=flaky, name="flaky", description="x", metadata=metadata)
        assert Graph(model, [flaky_tool]).say(call("flaky")).results[0].text == "The tool failed."
        assert len(tried) == attempts

    def test_an_idempotent_tool_may_succeed_in_the_end(self, model: Model) -> None:
        tried = []

        async def flaky() -> str:
            tried.append(1)
            if len(tried) == 1:
                raise ConnectionError
            return "done"

        flaky_tool = StructuredTool.from_function(coroutine=flaky, name="flaky", description="x", metadata={"idempotent": True})
        assert Graph(model, [flaky_tool]).say(call("flaky")).answer == "The tool says: done"


class TestApproval:
    @pytest.fixture
    def ran(self) -> list[str]:
        return []

    @pytest.fixture
    def graph(self, model: Model, ran: list[str]) -> Graph:
        @tool
        def delete(path: str) -> str:
            """Delete a file."""
            ran.append(path)
            return f"deleted {path}"

        @tool
        def look(path: str) -> str:
            """Look at a file."""
            ran.append(f"look {path}")
            return f"saw {path}"

        return Graph(model, [delete, look], tools_approval=("del*",))

    def test_nothing_runs_before_the_answer(self, graph: Graph, ran: list[str]) -> None:
        outcome = graph.say(call("look", path="a") + call("delete", path="b"))
        assert ran == []
        question = outcome.question
        assert (question["type"], question["tool"], question["arguments"]) == ("approval", "delete", {"path": "b"})
        assert question["id"]
        assert graph.resume({"approve": True}).answer == "The tool says: saw a; deleted b"
        assert sorted(ran) == ["b", "look a"]

    def test_a_refusal_is_told_to_the_model(self, graph: Graph, ran: list[str]) -> None:
        graph.say(call("delete", path="b") + call("look", path="a"))
        outcome = graph.resume({"approve": False, "reason": "not on a Friday"})
        assert ran == ["look a"]
        assert "did not allow this call. The reason: not on a Friday" in outcome.answer
        assert {result.status for result in outcome.results} == {"success", "error"}

    def test_a_refusal_of_all(self, graph: Graph, ran: list[str]) -> None:
        graph.say(call("delete", path="b"))
        assert graph.resume({"approve": False}).answer == "The tool says: The user did not allow this call."
        assert ran == []

    def test_each_call_is_asked_about(self, graph: Graph, ran: list[str]) -> None:
        outcome = graph.say(call("delete", path="a") + call("delete", path="b"))
        assert outcome.question["arguments"] == {"path": "a"}
        outcome = graph.resume({"approve": False})
        assert outcome.question["arguments"] == {"path": "b"}
        assert ran == []
        outcome = graph.resume({"approve": True, "id": outcome.question["id"]})
        assert ran == ["b"]
        assert outcome.answer.endswith("; deleted b")

    @pytest.mark.parametrize(
        "answer",
        [
            "yes",
            True,
            1,
            [],
            {"approve": "true"},
            {"approve": 1},
            {"approve": True, "reason": 7},
            {"approve": True, "reason": "x" * 501},
            {"approve": True, "more": 1},
            {"reason": "x"},
            {"approve": True, "id": "another-call"},
        ],
    )
    def test_a_malformed_answer_is_refused_and_can_be_mended(self, graph: Graph, ran: list[str], answer: object) -> None:
        graph.say(call("delete", path="b"))
        with pytest.raises(InvalidRequest):
            graph.resume(answer)
        assert ran == []
        assert graph.resume({"approve": True}).answer == "The tool says: deleted b"
        assert ran == ["b"]

    def test_the_answer_can_be_checked_before(self) -> None:
        check_answer({"approve": True})
        check_answer({"approve": False, "reason": "x", "id": "call-1"})
        for wrong in ("yes", None, {}, {"approve": 1}, {"approve": True, "x": 1}):
            with pytest.raises(InvalidRequest):
                check_answer(wrong)

    def test_a_misspelt_name_is_found_at_the_start(self) -> None:
        create_tools(settings(tools_approval=("calculator", "current_*", "files_delete"), mcp_servers={"files": "http://x"}))
        with pytest.raises(SettingsError, match="AGENT_TOOLS_APPROVAL: no tool is named calcalator"):
            create_tools(settings(tools_approval=("calcalator",)))


def test_names_are_unique() -> None:
    with pytest.raises(SettingsError, match="two tools are named echo"):
        Toolbox([echo, echo])


def test_tools_may_be_off() -> None:
    assert create_tools(settings(tools_enabled=False, mcp_servers={"a": "http://x"})).names == []


def test_the_tools_that_are_there() -> None:
    assert create_tools(settings()).names == ["calculator", "current_time"]
    full = settings(searxng_url="http://search", fetch_allow="example.com", memory_enabled=True)
    assert create_tools(full).names == [*("calculator", "current_time", "web_search", "fetch_page", "remember", "recall", "forget")]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
