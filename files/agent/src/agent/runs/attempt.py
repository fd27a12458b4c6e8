"""One attempt of a run: the graph is driven from where the thread is to the end of the turn.

A thread is a sequence of turns without holes. What an interrupted turn left behind (a message without an answer, a tool
call without a result, after a crash, a timeout or a model's failure) is mended in the step that adds the next message.
"""

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    AnyMessage,
    BaseMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.errors import EmptyInputError, GraphRecursionError
from langgraph.types import Command

from agent.errors import InvalidRequest, ModelFailed, TooManySteps
from agent.llm.graph import Agent
from agent.metrics import Metrics
from agent.runs._langgraph import CHECKPOINTER, INTERRUPT, without_internal
from agent.runs.checkpoints import RunSaver
from agent.runs.events import EventLog, plain
from agent.runs.mending import changes, is_answer, mend
from agent.runs.records import Outcome, Run
from agent.tokens import count, count_text

logger = logging.getLogger(__name__)


class Attempt:
    def __init__(
        self,
        run: Run,
        graph: Agent,
        saver: RunSaver,
        config: RunnableConfig,
        tools: frozenset[str],
        log: EventLog,
        metrics: Metrics,
    ) -> None:
        self._run = run
        self._graph = graph
        self._saver = saver
        self._config = config
        self._tools = tools
        self._log = log
        self._metrics = metrics
        self._started = time.monotonic()
        self._spoke = False
        # The ids of the messages from before the run, once they are known.
        self._before: frozenset[str | None] | None = None
        self._usage: dict[str, int] | None = None
        # The message that the model is writing, as far as it was told.
        self._writing: str | None = None
        # Whether what was written of an answer that was stopped is one of the messages.
        self._kept = False
        self._written = self._thought = ""

    async def work(self) -> Outcome:
        """Drive the graph to the end. Raises ServiceError where there is no answer."""
        loaded = await self._load()
        messages: list[AnyMessage] = self._saver.values.get("messages", [])
        taken_up = self._is_own(loaded)
        before = [message.id for message in messages]
        if taken_up and self._run.run_id in before:
            # What an earlier attempt did is this run's as well, and nobody has counted it.
            before = before[: before.index(self._run.run_id)]
        self._before = frozenset(before)
        if self._run.attempt > 1:
            self._log.publish("status", {"state": "restarted"})
        graph_input = None if taken_up else self._input(loaded, messages)
        try:
            async for mode, data, namespace in self._stream(graph_input):
                self._publish(mode, data, namespace)
        except GraphRecursionError:
            raise TooManySteps from None
        except EmptyInputError:
            if not taken_up:
                raise InvalidRequest("The thread has nothing to go on with.") from None
            # The answer was stored before the crash, only that the run is done was not.
        return self._outcome()

    def spent(self, window: int) -> int:
        """The tokens that the attempt cost, however it ended. The model is shown no more than `window` at once."""
        if self._before is None:
            return 0
        messages: list[AnyMessage] = self._saver.values.get("messages", [])
        tokens = self._used(messages)["total_tokens"]
        before = [message for message in messages if message.id != self._writing]
        if self._writing is not None and (self._kept or len(before) == len(messages)):
            # Broken off before the model could say what it cost, but its client has read it.
            shown = sum(count(message) for message in before)
            tokens += min(shown, window) + count_text(self._thought + self._written)
        return tokens

    async def keep_written(self) -> bool:
        """Keep what the client has read of an answer that was stopped, as the turn's answer. False where that is nothing."""
        messages: list[AnyMessage] = self._saver.values.get("messages", [])
        if not self._written or self._writing in {message.id for message in messages}:
            return False
        thought = {"reasoning_content": self._thought} if self._thought else {}
        answer = AIMessage(self._written, id=self._writing, additional_kwargs=thought, response_metadata={"finish_reason": "stopped"})
        place = {"thread_id": self._run.thread_id, "checkpoint_ns": "", CHECKPOINTER: self._saver}
        await self._graph.aupdate_state({"configurable": place}, {"messages": [answer]}, "model")
        self._kept = True
        return True

    async def _load(self) -> CheckpointTuple | None:
        """Where the attempt starts from: where its run was to start, or how far an earlier attempt came."""
        run = self._run
        if run.first and run.attempt == 1:
            return await self._saver.load(None)
        configurable = self._config["configurable"]
        if run.attempt > 1 and "checkpoint_id" in configurable:
            latest: RunnableConfig = {
                **self._config,
                "configurable": {name: value for name, value in configurable.items() if name != "checkpoint_id"},
            }
            loaded = await self._saver.load(latest)
            if self._is_own(loaded):
                self._config = latest
                return loaded
        return await self._saver.load(self._config)

    def _is_own(self, loaded: CheckpointTuple | None) -> bool:
        return loaded is not None and loaded.metadata.get("run_id") == self._run.run_id

    def _input(self, loaded: CheckpointTuple | None, stored: Sequence[AnyMessage]) -> Any:
        waits = loaded is not None and any(channel == INTERRUPT for _, channel, _ in loaded.pending_writes or ())
        match self._run.input:
            case None:
                if loaded is None:
                    raise InvalidRequest("The thread has nothing to go on with.")
                return None
            case {"resume": answer}:
                if not waits:
                    raise InvalidRequest("The thread waits for no answer.")
                return Command(resume=answer)
            case {"messages": given}:
                _check_results(given, stored)
                return {"messages": self._messages(given, stored, waits=waits)}
        raise InvalidRequest("The input must have messages or an answer.")

    def _messages(self, given: Sequence[Any], stored: Sequence[AnyMessage], *, waits: bool) -> list[BaseMessage]:
        sent = convert_to_messages(given)
        for index, message in enumerate(sent):
            # Known before the first attempt: another one replaces the messages of the first instead of adding to them.
            message.id = message.id or (f"{self._run.run_id}-{index}" if index else self._run.run_id)
        answered = {message.tool_call_id for message in sent if isinstance(message, ToolMessage)}
        if not stored or is_answer(stored[-1]):
            return sent
        mended = mend(stored, self._saver.results, answered, waits=waits)
        if answered and mended == list(stored):
            return sent
        self._metrics.threads_healed.inc()
        extra = {"thread_id": self._run.thread_id, "run_id": self._run.run_id, "messages": abs(len(mended) - len(stored))}
        logger.info("an interrupted turn is mended", extra=extra)
        self._before = frozenset(message.id for message in (*stored, *mended))
        return [*changes(stored, mended), *sent]

    async def _stream(self, graph_input: Any) -> AsyncIterator[tuple[str, Any, tuple[str, ...]]]:
        options = self._run.options
        config: RunnableConfig = {
            **self._config,
            "configurable": {**self._config["configurable"], CHECKPOINTER: self._saver, "results": self._saver},
        }
        modes: list[Any] = list({mode for wanted in options.stream for mode in MODES.get(wanted, ())})
        limits: dict[str, Any] = {
            name: list(nodes)
            for name, nodes in (
                ("interrupt_before", options.interrupt_before),
                ("interrupt_after", options.interrupt_after),
            )
            if nodes
        }
        # The saver decides what is stored when; "sync" lets it hold up the step that follows.
        stream = self._graph.astream(
            graph_input,
            config,
            stream_mode=modes,
            subgraphs=options.subgraphs,
            durability="sync",
            **limits,
        )
        async for item in stream:
            if options.subgraphs:
                namespace, mode, data = item
            else:
                namespace, (mode, data) = (), item
            yield mode, data, namespace

    def _publish(self, mode: str, data: Any, namespace: tuple[str, ...]) -> None:
        wanted = self._run.options.stream
        if mode == "messages":
            chunk, metadata = data
            if "messages" in wanted:
                self._log.publish(_name("messages", namespace), [chunk, without_internal(metadata)])
            if not isinstance(chunk, AIMessageChunk | AIMessage):
                return
            thought, text = chunk.additional_kwargs.get("reasoning_content"), chunk.text
            if thought or text:
                if self._writing != chunk.id:
                    self._writing, self._written, self._thought = chunk.id, "", ""
                self._written += text
                self._thought += thought or ""
            if thought and "tokens" in wanted and not namespace:
                self._log.publish("reasoning", {"text": str(thought)})
            if text:
                if not self._spoke:
                    self._spoke = True
                    self._metrics.first_token_seconds.observe(time.monotonic() - self._started)
                if "tokens" in wanted and not namespace:
                    self._log.publish("token", {"text": str(text)})
            return
        kind = data.get("type") if mode == "custom" and isinstance(data, dict) else None
        if kind == "status" or (kind == "tool" and "tools" in wanted):
            self._log.publish(kind, {name: value for name, value in data.items() if name != "type"})
        if mode in wanted:
            self._log.publish(_name(mode, namespace), self._shown(mode, data))

    def _shown(self, mode: str, data: Any) -> Any:
        """Without what a client must not see: what the graph was lent, and the text of errors, which may quote what a tool was told."""
        match mode:
            case "debug":
                return {**data, "payload": self._shown("checkpoints" if data["type"] == "checkpoint" else "tasks", data["payload"])}
            case "tasks":
                return {**data, "error": "error" if data["error"] else None} if "error" in data else data
            case "checkpoints":
                known = {"source", "step", "parents", "run_id", *self._run.options.metadata}
                return {
                    **data,
                    "metadata": {name: value for name, value in data["metadata"].items() if name in known},
                    "tasks": [self._shown("tasks", task) for task in data["tasks"]],
                    **{name: _place(data[name]) for name in ("config", "parent_config")},
                }
        return data

    def _outcome(self) -> Outcome:
        messages: list[AnyMessage] = self._saver.values.get("messages", [])
        usage = self._used(messages)
        interrupts = plain(self._saver.interrupts)
        result: dict[str, Any] = {"response": "", "usage": usage}
        if interrupts:
            return Outcome("success", "interrupted", {**result, "interrupts": interrupts})
        options = self._run.options
        if options.interrupt_before or options.interrupt_after:
            return Outcome("success", "interrupted", result)
        if not messages:
            raise ModelFailed
        last, theirs = messages[-1], options.client_tools
        if isinstance(last, AIMessage) and last.tool_calls and last.tool_calls[0]["name"] in theirs:
            result["tool_calls"] = last.tool_calls
        elif not is_answer(last):
            raise ModelFailed
        return Outcome("success", "idle", {**result, "response": str(last.text)})

    def _used(self, messages: Sequence[AnyMessage]) -> dict[str, int]:
        """What the model says that the run's messages cost. They are counted once."""
        if self._usage is not None:
            return self._usage
        usage = self._usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        for message in messages:
            if message.id in (self._before or ()):
                continue
            if isinstance(message, ToolMessage):
                tool = message.name if message.name in self._tools else "unknown"
                self._metrics.tool_calls.labels(tool, message.status).inc()
            elif isinstance(message, AIMessage) and message.usage_metadata:
                counted: Mapping[str, Any] = message.usage_metadata
                for name in usage:
                    usage[name] += counted.get(name, 0)
        if usage["total_tokens"]:
            self._metrics.model_tokens.labels("prompt").inc(usage["input_tokens"])
            self._metrics.model_tokens.labels("completion").inc(usage["output_tokens"])
        return usage


# What LangGraph must stream for each thing that can be asked for.
MODES = {
    "tokens": ("messages", "custom"),
    "tools": ("custom",),
    "messages": ("messages",),
    "values": ("values",),
    "updates": ("updates",),
    "custom": ("custom",),
    "checkpoints": ("checkpoints",),
    "tasks": ("tasks",),
    "debug": ("debug",),
}


def _check_results(given: Sequence[Any], stored: Sequence[AnyMessage]) -> None:
    """A result without its call would stand in the thread for good, and model servers refuse it."""
    calls = {call["id"] for message in stored if isinstance(message, AIMessage) for call in message.tool_calls}
    calls |= {call["id"] for message in given if isinstance(message, dict) for call in message.get("tool_calls", ())}
    if any(message.get("role") == "tool" and message["tool_call_id"] not in calls for message in given if isinstance(message, dict)):
        raise InvalidRequest("The thread has no tool call that this is the result of.")


def _place(config: RunnableConfig | None) -> dict[str, Any] | None:
    """Where a checkpoint is, of its config."""
    if config is None:
        return None
    names = ("thread_id", "checkpoint_ns", "checkpoint_id", "checkpoint_map")
    return {"configurable": {name: config["configurable"][name] for name in names if name in config["configurable"]}}


def _name(event: str, namespace: tuple[str, ...]) -> str:
    return "|".join((event, *namespace))
