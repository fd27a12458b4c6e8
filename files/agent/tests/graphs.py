"""The agent's graph alone, over the scripted model: no HTTP in front of it and its state in memory."""

import asyncio
import atexit
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from langchain_core.messages import AnyMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.base import BaseStore
from langgraph.types import Command

from agent.llm.graph import create_graph
from agent.settings import Settings, variable
from agent.tools.toolbox import Toolbox
from agent.tracing import Tracing
from servers import Model

# One event loop for all calls: the graph keeps connections to its model, which belong to a loop.
RUNNER = asyncio.Runner()
atexit.register(RUNNER.close)


# Passwords, all of them; whatever a new component needs is one more here by itself.
REQUIRED = {name: info for name, info in Settings.model_fields.items() if info.is_required()}


def settings(**values: Any) -> Settings:
    return Settings.model_validate({**dict.fromkeys(REQUIRED, "x"), **values})


def secret_files(file: Path) -> dict[str, str]:
    """The variables of the secrets that the service cannot do without, each with the same file."""
    return {variable(name, info): str(file) for name, info in REQUIRED.items()}


@dataclass
class Outcome:
    messages: list[AnyMessage]
    events: list[dict[str, Any]] = field(default_factory=list)
    question: Any = None

    @property
    def answer(self) -> str:
        return str(self.messages[-1].text)

    @property
    def results(self) -> list[ToolMessage]:
        return [message for message in self.messages if isinstance(message, ToolMessage)]


class Graph:
    def __init__(
        self,
        model: Model,
        tools: Toolbox | Sequence[BaseTool] = (),
        *,
        store: BaseStore | None = None,
        tracing: Tracing | None = None,
        **values: Any,
    ) -> None:
        values = {"model_base_url": f"{model.url}/v1", "model_hold_seconds": 0, **values}
        self.graph = create_graph(settings(**values), tools, InMemorySaver(), store, tracing=tracing)

    def say(self, text: str, thread: str = "thread", **configurable: Any) -> Outcome:
        return RUNNER.run(self.asay(text, thread, **configurable))

    async def asay(self, text: str, thread: str = "thread", **configurable: Any) -> Outcome:
        return await self._run({"messages": [HumanMessage(text, id=str(uuid4()))]}, thread, configurable)

    def resume(self, value: object, thread: str = "thread") -> Outcome:
        return RUNNER.run(self._run(Command(resume=value), thread, {}))

    async def _run(self, graph_input: Any, thread: str, configurable: dict[str, Any]) -> Outcome:
        config = {"configurable": {"thread_id": thread, **configurable}, "recursion_limit": 25}
        events = []
        async for mode, data in self.graph.astream(graph_input, config, stream_mode=["custom", "values"]):
            if mode == "custom":
                events.append(data)
        state = await self.graph.aget_state(config)
        question = state.interrupts[0].value if state.interrupts else None
        return Outcome(state.values["messages"], events, question)
