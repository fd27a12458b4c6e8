"""Running what the model asks for. Its calls are input like any other: named tools only, checked, bounded, told apart.

Whatever a tool does, the turn goes on: the model gets a result or one sentence on what went wrong. It never gets an
exception's own text, which can hold addresses, paths and secrets, except that of a ToolException, which is written
for it.
"""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import jsonschema  # type: ignore[import-untyped]
from langchain_core.messages import AIMessage, ToolCall, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt import ToolNode
from langgraph.prebuilt.tool_node import ToolCallRequest, ToolInvocationError
from langgraph.types import Command

from agent.settings import Settings
from agent.tools.approval import ask
from agent.tools.toolbox import Toolbox
from agent.tracing import Tracing

logger = logging.getLogger(__name__)

MAX_ERROR_CHARACTERS = 1000
MAX_NAME_CHARACTERS = 64
ATTEMPTS_IF_IDEMPOTENT = 2
# Set by a tool's author in its metadata; the last two are what an MCP server says of its tools.
IDEMPOTENT = ("idempotent", "idempotentHint", "readOnlyHint")

Result = ToolMessage | Command[Any] | list[Any]
Execute = Callable[[ToolCallRequest], Awaitable[Any]]


class Results(Protocol):
    """What a run keeps of a step that is not done yet. The graph finds it in `configurable` as `results`."""

    @property
    def results(self) -> Mapping[str, ToolMessage]:
        """By the call's id."""

    async def keep_result(self, result: ToolMessage) -> None:
        """Let it survive a cancelled turn and the death of this worker."""


class ToolCalls:
    """The step that runs the calls of the model's last message, side by side."""

    def __init__(self, settings: Settings, toolbox: Toolbox, tracing: Tracing) -> None:
        self._toolbox = toolbox
        self._tracing = tracing
        self._approval = settings.tools_approval
        self._timeout_seconds = settings.tool_timeout_seconds
        self._max_characters = settings.tool_result_chars
        self._node: ToolNode | None = None
        self._tools: list[BaseTool] = []

    async def run(self, message: AIMessage, config: RunnableConfig) -> Any:
        refused = ask(message.tool_calls, self._approval)
        kept: Results | None = config["configurable"].get("results")
        # Some may have finished before this step was broken off.
        done = kept.results if kept is not None else {}
        there = [*refused, *(done[str(call["id"])] for call in message.tool_calls if call["id"] in done)]
        answered = {result.tool_call_id for result in there}
        allowed = [call for call in message.tool_calls if call["id"] not in answered]
        if not allowed:
            return {"messages": there}
        results: dict[str, Any] | list[Any] = await self._current_node().ainvoke(allowed, config)
        if isinstance(results, dict):
            return {"messages": [*there, *results["messages"]]}
        return [{"messages": there}, *results]

    def _current_node(self) -> ToolNode:
        """LangGraph's ToolNode knows how to hand state, store and runtime to tools that ask for them."""
        tools = list(self._toolbox)
        if self._node is None or tools != self._tools:
            self._tools = tools
            self._node = ToolNode(tools, handle_tool_errors=False, awrap_tool_call=self._call)
        return self._node

    async def _call(self, request: ToolCallRequest, execute: Execute) -> Any:
        call = request.tool_call
        event = {"type": "tool", "name": call["name"][:MAX_NAME_CHARACTERS], "id": call["id"]}
        request.runtime.stream_writer({**event, "state": "start"})
        with self._tracing.span("tool", {"tool": call["name"] if request.tool else "unknown"}):
            result = await self._result(request, execute)
        if isinstance(result, ToolMessage) and (kept := request.runtime.config.get("configurable", {}).get("results")) is not None:
            await kept.keep_result(result)
        status = result.status if isinstance(result, ToolMessage) else "success"
        request.runtime.stream_writer({**event, "state": "end", "status": status})
        return result

    async def _result(self, request: ToolCallRequest, execute: Execute) -> Any:
        call, tool = request.tool_call, request.tool
        only = request.runtime.config.get("configurable", {}).get("tools")
        if tool is None or (only is not None and call["name"] not in only):
            known = ", ".join(name for name in self._toolbox.names if only is None or name in only) or "none"
            return _error(call, f"{call['name'][:MAX_NAME_CHARACTERS]} is not a valid tool. The tools are: {known}.")
        if problem := _schema_problem(tool, call["args"]):
            return _error(call, f"The arguments do not fit. {problem}")
        attempts = ATTEMPTS_IF_IDEMPOTENT if any((tool.metadata or {}).get(key) for key in IDEMPOTENT) else 1
        while True:
            attempts -= 1
            try:
                async with asyncio.timeout(self._timeout_seconds) as limit:
                    return self._bounded(await execute(request))
            except GraphBubbleUp:
                raise
            except ToolInvocationError as error:
                return _error(call, f"The arguments do not fit. {_explain(error)}")
            except ToolException as error:
                return _error(call, str(error))
            except Exception as error:
                if limit.expired():
                    return _error(call, f"The tool did not finish within {self._timeout_seconds:g} seconds.")
                _log(tool, error, retry=attempts > 0)
                if not attempts:
                    return _error(call, "The tool failed.")

    def _bounded(self, result: Any) -> Any:
        if not isinstance(result, ToolMessage):
            return result
        text = _clean(_text(result.content))
        if len(text) > self._max_characters:
            text = f"{text[: self._max_characters]}\n[cut here: {len(text) - self._max_characters} more characters]"
        # An artifact is for programs around the graph. Here it would only be stored.
        return result.model_copy(update={"content": text, "artifact": None, "additional_kwargs": {}})


def _error(call: ToolCall, text: str) -> ToolMessage:
    text = _clean(text)[:MAX_ERROR_CHARACTERS]
    return ToolMessage(text, name=call["name"], tool_call_id=call["id"], status="error")


def _text(content: Any) -> str:
    blocks = content if isinstance(content, list) else [content]
    return "\n".join(_block(block) for block in blocks)


def _block(block: Any) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, dict) and isinstance(block.get("text"), str):
        return str(block["text"])
    return "[something that is no text was left out]"


def _clean(text: str) -> str:
    """Without what could be neither stored nor sent: NUL and halves of surrogate pairs."""
    return text.replace("\0", "").encode(errors="replace").decode()


def _schema_problem(tool: BaseTool, arguments: dict[str, Any]) -> str | None:
    """What LangChain checks for tools written in Python, checked here for those that come with a JSON schema."""
    schema = tool.args_schema
    if not isinstance(schema, dict):
        return None
    unknown = sorted(set(arguments) - set(schema.get("properties") or {}))
    if unknown:
        return f"There is no argument {unknown[0][:MAX_NAME_CHARACTERS]}."
    try:
        jsonschema.validate(arguments, schema)
    except jsonschema.ValidationError as error:
        return f"{error.json_path.removeprefix('$.')}: {error.validator} {error.validator_value}"[:MAX_ERROR_CHARACTERS]
    except (jsonschema.SchemaError, RecursionError):
        return "The tool's own description of them is broken."
    return None


def _explain(error: ToolInvocationError) -> str:
    errors = error.filtered_errors
    if errors is None:
        errors = error.source.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in errors)


def _log(tool: BaseTool, error: Exception, *, retry: bool) -> None:
    """Where it failed and with what, but not the error's text: it may quote the conversation."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    logger.warning("a tool failed", extra={"tool": tool.name, "error": type(error).__name__, "place": place, "retry": retry})
