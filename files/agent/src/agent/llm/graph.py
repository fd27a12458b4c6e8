"""The agent: a model and its tools in a loop, its state in a checkpointer.

Two steps take turns, `model` and `tools`, until the model answers without calling a tool. They are written out, and
not taken from create_agent, because each of its middlewares costs a fifth of what the whole loop costs here.
"""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from langchain_core.messages import AIMessage, AnyMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore
from typing_extensions import TypedDict

from agent.errors import TooManySteps, TurnTimeout
from agent.llm import context
from agent.llm.model import ChatModel, ContextOverflow, create_model
from agent.llm.parameters import client_tools, with_own_tools
from agent.llm.turn import TURN, Turn
from agent.settings import Settings
from agent.tokens import TOKENS_PER_MESSAGE, count_text
from agent.tools.calls import ToolCalls
from agent.tools.toolbox import Toolbox
from agent.tracing import Tracing

Agent = CompiledStateGraph[Any, Any, Any, Any]


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


def create_graph(
    settings: Settings,
    tools: Toolbox | Sequence[BaseTool],
    checkpointer: BaseCheckpointSaver[Any] | None,
    store: BaseStore | None = None,
    *,
    tracing: Tracing | None = None,
) -> Agent:
    """The graph. What it reads from a run's `configurable`, besides LangGraph's own keys:

    deadline  when the turn must have ended, on the event loop's clock; without it, turn_timeout_seconds from now
    owner     whose memories the memory tools see
    model     parameters for the model, such as its temperature, that go before the settings. `tools` are the client's:
              the turn ends with the model's calls of them, whose results come with the next
    system_prompt, tools  an assistant's own prompt, which follows the service's, and the names of the only tools that it may use
    """
    toolbox = tools if isinstance(tools, Toolbox) else Toolbox(tools)
    steps = Steps(settings, create_model(settings), toolbox, tracing or Tracing())
    graph = StateGraph(State)
    graph.add_node("model", steps.ask_model)
    graph.add_node("tools", steps.run_tools)
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", steps.next_step)
    graph.add_edge("tools", "model")
    return graph.compile(checkpointer=checkpointer, store=store, name="agent")


class Steps:
    def __init__(self, settings: Settings, model: ChatModel, toolbox: Toolbox, tracing: Tracing) -> None:
        self._settings = settings
        self._model = model
        self._toolbox = toolbox
        self._tool_calls = ToolCalls(settings, toolbox, tracing)
        self._tracing = tracing
        self._system_tokens = TOKENS_PER_MESSAGE + count_text(settings.system_prompt)
        # Less than the setting once a server has said that it takes less.
        self._context_tokens = settings.context_tokens

    async def ask_model(self, state: State, config: RunnableConfig) -> dict[str, Any]:
        if self._settings.turn_tokens:
            self._check_tokens(context.last_turn(state["messages"]))
        deadline = config["configurable"].get("deadline")
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + self._settings.turn_timeout_seconds
        TURN.set(Turn(deadline, get_stream_writer()))
        try:
            async with asyncio.timeout_at(deadline):
                with self._tracing.span("model", {"model": self._settings.model_name}) as span:
                    answer = await self._answer(state["messages"], config)
                    if span is not None and answer.usage_metadata:
                        span.set_attribute("tokens.input", answer.usage_metadata["input_tokens"])
                        span.set_attribute("tokens.output", answer.usage_metadata["output_tokens"])
        except TimeoutError:
            raise TurnTimeout from None
        return {"messages": [_for_the_client(answer, config)]}

    async def run_tools(self, state: State, config: RunnableConfig) -> Any:
        message = state["messages"][-1]
        if not isinstance(message, AIMessage):
            raise TypeError("the step before this one is always the model's")
        done = sum(isinstance(earlier, ToolMessage) for earlier in context.last_turn(state["messages"]))
        if done + len(message.tool_calls) > self._settings.turn_tool_calls:
            raise TooManySteps("The agent found no answer within the number of tool calls it may make.")
        return await self._tool_calls.run(message, config)

    async def next_step(self, state: State, config: RunnableConfig) -> Literal["tools", "__end__"]:
        # Asynchronous, because LangGraph would hand any other function to a thread.
        # Nothing is there where a client removed it and said that this was the model's step.
        message = state["messages"][-1] if state["messages"] else None
        if not isinstance(message, AIMessage) or not message.tool_calls:
            return "__end__"
        return "__end__" if message.tool_calls[0]["name"] in client_tools(config["configurable"].get("model", {})) else "tools"

    def _check_tokens(self, turn: Sequence[AnyMessage]) -> None:
        used = sum(message.usage_metadata["total_tokens"] for message in turn if isinstance(message, AIMessage) and message.usage_metadata)
        if used >= self._settings.turn_tokens:
            raise TooManySteps("The agent found no answer within the number of tokens it may use.")

    async def _answer(self, messages: Sequence[AnyMessage], config: RunnableConfig) -> AIMessage:
        configurable = config["configurable"]
        parameters: dict[str, Any] = configurable.get("model", {})
        only, own = configurable.get("tools"), configurable.get("system_prompt")
        offered = [tool for tool in self._toolbox.descriptions if only is None or tool["function"]["name"] in only]
        more = with_own_tools(parameters, offered)
        theirs = count_text(orjson.dumps(parameters["tools"]).decode()) if "tools" in parameters else 0
        try:
            return await self._model.ainvoke(self._prompt(messages, self._context_tokens - theirs, own), config, **more)
        except ContextOverflow as overflow:
            if overflow.limit and overflow.limit < self._context_tokens:
                self._context_tokens = overflow.limit
            # The estimate was wrong by some factor: half as much is short enough unless it was wrong by two.
            smaller = self._prompt(messages, self._context_tokens // 2 - theirs, own)
            return await self._model.ainvoke(smaller, config, **more)

    def _prompt(self, messages: Sequence[AnyMessage], context_tokens: int, own: str | None) -> list[AnyMessage]:
        fixed = self._system_tokens + self._toolbox.tokens + self._settings.max_tokens + (count_text(own) if own else 0)
        # Never nothing: what is refused for its length is told to the client as such.
        fitting, left_out = context.fit(context.instructed(messages), max(context_tokens - fixed, context.SHORTEST_RESULT_TOKENS))
        prompt = f"{self._settings.system_prompt}\n\n{own}" if own else self._settings.system_prompt
        if left_out:
            prompt = f"{prompt}\n\n{context.LEFT_OUT}"
        return [SystemMessage(prompt), *context.alternating(fitting)]


def _for_the_client(answer: AIMessage, config: RunnableConfig) -> AIMessage:
    """The answer without calls of the agent's own tools beside some of the client's, who is to go on."""
    if not answer.tool_calls:
        return answer
    theirs = client_tools(config["configurable"].get("model", {}))
    calls = [call for call in answer.tool_calls if call["name"] in theirs]
    return answer.model_copy(update={"tool_calls": calls}) if calls and len(calls) < len(answer.tool_calls) else answer
