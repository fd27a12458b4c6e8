"""A turn: one message of a user, worked on until the thread holds the answer.

A thread is a sequence of complete turns. What an interrupted turn left behind (a message without an answer, a tool
call without a result, after a crash, a timeout or a model's failure) is erased in the step that adds the next message:
its sender was never told that it was accepted, and many models refuse a conversation with a hole in it.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from uuid import uuid4
from weakref import WeakValueDictionary

import psycopg
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, RemoveMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphRecursionError

from agent.errors import ModelFailed, ServiceError, ShuttingDown, StorageUnavailable, TooManySteps, TurnTimeout
from agent.graph import Agent
from agent.metrics import Metrics

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5


class Turns:
    def __init__(
        self, agent: Agent, tools: Sequence[str], metrics: Metrics, *, timeout_seconds: float, recursion_limit: int
    ) -> None:
        self._agent = agent
        self._tools = frozenset(tools)
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._recursion_limit = recursion_limit
        # An entry lives as long as a turn holds or awaits its lock.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._running: set[asyncio.Task[str]] = set()
        self._closing = False

    async def answer(self, thread_id: str, message: str) -> str:
        """Return the agent's answer once it is stored.

        The work does not depend on its caller: a client that hangs up leaves a finished turn in the thread.
        """
        if self._closing:
            raise ShuttingDown
        task = asyncio.create_task(self._turn(thread_id, message))
        self._running.add(task)
        self._metrics.turns_running.inc()
        task.add_done_callback(self._finished)
        started = time.monotonic()
        done, _ = await asyncio.wait({task}, timeout=self._timeout_seconds)
        outcome = "ok"
        try:
            if not done:
                # Not awaited: a driver may take seconds to give up a dead connection, and the client has waited enough.
                task.cancel()
                raise TurnTimeout
            return task.result()
        except ServiceError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = ShuttingDown.code
            raise ShuttingDown from None
        except Exception:
            outcome = ServiceError.code
            raise
        finally:
            self._metrics.turns.labels(outcome).inc()
            self._metrics.turn_seconds.observe(time.monotonic() - started)

    async def close(self) -> None:
        """Give running turns a moment, then cancel them: the next message heals their threads."""
        self._closing = True
        if self._running:
            await asyncio.wait(self._running, timeout=SHUTDOWN_SECONDS)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _finished(self, task: asyncio.Task[str]) -> None:
        self._running.discard(task)
        self._metrics.turns_running.dec()
        if not task.cancelled():
            task.exception()  # seen, even where no caller is left to see it

    async def _turn(self, thread_id: str, message: str) -> str:
        async with self._locks.setdefault(thread_id, asyncio.Lock()):
            try:
                return await self._invoke(thread_id, message)
            except GraphRecursionError:
                raise TooManySteps from None
            except psycopg.Error as error:
                logger.error("the storage failed", extra={"error": f"{type(error).__name__}: {error}"})
                raise StorageUnavailable from error

    async def _invoke(self, thread_id: str, message: str) -> str:
        config: RunnableConfig = {"configurable": {"thread_id": thread_id}, "recursion_limit": self._recursion_limit}
        stored: list[AnyMessage] = (await self._agent.aget_state(config)).values.get("messages", [])
        remains = unfinished(stored)
        if remains:
            self._metrics.threads_healed.inc()
            logger.info("an interrupted turn is erased", extra={"thread_id": thread_id, "messages": len(remains)})
        sent = HumanMessage(message, id=str(uuid4()))
        change: list[BaseMessage] = [*(RemoveMessage(id=str(left.id)) for left in remains), sent]
        # Only "sync" has stored the last step when the answer goes out.
        state = await self._agent.ainvoke({"messages": change}, config, durability="sync")
        messages: list[AnyMessage] = state["messages"]
        self._count(messages[len(stored) - len(remains) :])
        if not is_answer(messages[-1]):
            raise ModelFailed
        return messages[-1].text

    def _count(self, messages: Sequence[AnyMessage]) -> None:
        for message in messages:
            if isinstance(message, ToolMessage):
                tool = message.name if message.name in self._tools else "unknown"
                self._metrics.tool_calls.labels(tool, message.status).inc()
            elif isinstance(message, AIMessage) and message.usage_metadata:
                self._metrics.model_tokens.labels("prompt").inc(message.usage_metadata["input_tokens"])
                self._metrics.model_tokens.labels("completion").inc(message.usage_metadata["output_tokens"])


def is_answer(message: BaseMessage) -> bool:
    return isinstance(message, AIMessage) and not message.tool_calls and not message.invalid_tool_calls


def unfinished(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    """The messages after the last complete turn."""
    complete = next((index for index in range(len(messages), 0, -1) if is_answer(messages[index - 1])), 0)
    return messages[complete:]
