"""The model: any server that speaks OpenAI's chat completions, asked at little cost and with much patience.

`ChatModel` is langchain-openai's ChatOpenAI with the transport replaced: it sends what ChatOpenAI would send and
returns the same messages. What differs:

- A server that is away is waited for (the hold), because a model that is being swapped is back within a minute.
- A request is repeated once at most, and only before the first token: nobody sees half an answer twice.
- Pieces of a stream that arrive together are handed on together, so that a fast model costs no more than a slow one.
- What a model thinks before it answers (reasoning) stands beside its answer, and the model is not shown it again: it
  would fill the context window. A status event tells that it is thinking.
"""

import asyncio
import logging
import random
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from pydantic import PrivateAttr, SecretStr

from agent.errors import CannotSee, ConversationTooLong, ModelFailed, ModelUnavailable, ServiceError
from agent.llm import answers
from agent.llm.answers import AnswerStream, Garbage, Refused, read_message
from agent.llm.turn import TURN
from agent.settings import Settings
from agent.wire import Answer, BrokenError, Client, ConnectError, WireError

logger = logging.getLogger(__name__)

MAX_ERROR_BYTES = 1 << 16
RETRY_SECONDS = 0.1
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 2.0
# Of a message's additional_kwargs, what the model is not shown again.
SHOWN_ONCE = frozenset({answers.REASONING})
AWAY = frozenset({429, 502, 503, 504})
REFUSED_FOR_ITS_CONTENT = frozenset({400, 413, 422})
NO_IMAGES = re.compile(r"image|multi-?modal|vision", re.IGNORECASE)
TOO_LONG = re.compile(
    r"context[ _](length|window|size)|maximum model length|(prompt|input|request)\b.{0,40}\btoo (long|large)"
    r"|too many (input )?tokens|input tokens exceed",
    re.IGNORECASE,
)
SERVER_LIMIT = re.compile(r"maximum (?:context|model) length (?:is|of) (\d{2,8})", re.IGNORECASE)


class ContextOverflow(ConversationTooLong):
    """The server counted the tokens and refused; `limit` is how many it takes, if it said so."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = limit


class ChatModel(ChatOpenAI):
    """ChatOpenAI over a transport of the agent's own. Only the asynchronous methods use it."""

    hold_seconds: float = 60

    _client: Client = PrivateAttr()
    _parameters: dict[str, Any] = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        key = self.openai_api_key
        headers = {"Accept-Encoding": "identity", "User-Agent": "agent"}
        if isinstance(key, SecretStr):
            headers["Authorization"] = f"Bearer {key.get_secret_value()}"
        self._client = Client(str(self.openai_api_base), headers)
        parameters = self._get_request_payload([])
        self._parameters = parameters | (parameters.pop("extra_body", None) or {})

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        callbacks = (config or {}).get("callbacks")
        watched = getattr(callbacks, "handlers", callbacks)
        if watched or stop or not isinstance(input, list):
            return await super().ainvoke(input, config, stop=stop, **kwargs)
        # Nobody listens: the callbacks would cost more than the request.
        return await self._complete(input, **kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        message = await self._complete(messages, **({"stop": stop} if stop else {}), **kwargs)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        *,
        stream_usage: bool | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if stop:
            kwargs["stop"] = stop
        body = self._body(messages, {**kwargs, "stream": True, "stream_options": {"include_usage": True}})
        patience = _Patience(self.hold_seconds)
        while True:
            try:
                async with await self._post(body, patience) as answer:
                    stream = AnswerStream()
                    async for data in answer.chunks():
                        piece = stream.feed(data)
                        if piece:
                            patience.started = True
                            chunk = ChatGenerationChunk(message=piece.chunk())
                            if run_manager:
                                await run_manager.on_llm_new_token(piece.text, chunk=chunk)
                            yield chunk
                        if stream.ended:
                            break
                yield ChatGenerationChunk(message=stream.last_chunk())
                return
            except (WireError, Refused, Garbage) as error:
                await patience.again(error)

    async def _complete(self, messages: Sequence[BaseMessage], **kwargs: Any) -> AIMessage:
        body = self._body(messages, kwargs)
        patience = _Patience(self.hold_seconds)
        while True:
            try:
                async with await self._post(body, patience) as answer:
                    return read_message(await answer.read(answers.MAX_ANSWER_BYTES))
            except (WireError, Refused, Garbage) as error:
                await patience.again(error)

    async def _post(self, body: bytes, patience: "_Patience") -> Answer:
        answer = await self._client.post("/chat/completions", body, fresh=patience.failed)
        if answer.status == 200:
            return answer
        async with answer:
            try:
                text = (await answer.read(MAX_ERROR_BYTES)).decode(errors="replace")
            except WireError:
                text = ""
        wait = answer.headers.get("retry-after", "")
        raise Refused(answer.status, text, float(wait) if wait.isdecimal() else None, images=b'"image_url"' in body)

    def _body(self, messages: Sequence[BaseMessage], parameters: Mapping[str, Any]) -> bytes:
        payload = {**self._parameters, **parameters, "messages": [_to_wire(self, message) for message in messages]}
        try:
            return orjson.dumps(payload)
        except TypeError as error:
            raise ModelFailed from error


class _Patience:
    """Decides, for one call of the model, whether a failure is answered with another attempt."""

    def __init__(self, hold_seconds: float) -> None:
        self.started = False  # a token has been handed on
        self.failed = False
        self._retried = False
        self._hold_seconds = hold_seconds
        self._away_since: float | None = None
        self._wait = FIRST_WAIT_SECONDS

    async def again(self, error: Exception) -> None:
        """Return when it is time for the next attempt, or raise what the client is told."""
        self.failed = True
        if not self.started:
            if isinstance(error, ConnectError) or (isinstance(error, Refused) and error.status in AWAY):
                if await self._hold(error):
                    return
            elif not self._retried and (isinstance(error, BrokenError) or (isinstance(error, Refused) and error.status >= 500)):
                self._retried = True
                await asyncio.sleep(RETRY_SECONDS)
                return
        failure = _failure(error)
        # Not the error's text: a server may quote the conversation in it.
        logger.warning(
            "the model failed",
            extra={"code": failure.code, "error": type(error).__name__, "status": getattr(error, "status", None)},
        )
        raise failure from error

    async def _hold(self, error: Exception) -> bool:
        now = asyncio.get_running_loop().time()
        turn = TURN.get()
        if self._away_since is None:
            self._away_since = now
            # A transport's error names a kind of failure; it holds nothing of the conversation.
            logger.warning("waiting for the model", extra={"error": f"{type(error).__name__}: {error}"})
            if turn and self._hold_seconds > 0:
                turn.notify({"type": "status", "state": "waiting", "message": "waiting for the model"})
        until = self._away_since + self._hold_seconds
        if turn:
            # A second before the deadline, so that the client is told why and not only that it took too long.
            until = min(until, turn.deadline - 1)
        # Many turns may be waiting: not all of them at the same instant.
        wait = max(self._wait * random.uniform(0.75, 1.25), getattr(error, "retry_after", None) or 0)  # noqa: S311
        self._wait = min(self._wait * 2, LONGEST_WAIT_SECONDS)
        if now >= until:
            return False
        await asyncio.sleep(min(wait, until - now))
        return True


def _failure(error: Exception) -> ServiceError:
    match error:
        case Refused(status=status, text=text) if status in REFUSED_FOR_ITS_CONTENT and TOO_LONG.search(text):
            limit = SERVER_LIMIT.search(text)
            return ContextOverflow(int(limit[1]) if limit else None)
        case Refused(status=status) if status >= 500 or status == 429:
            return ModelUnavailable()
        case Refused(images=True, text=text, status=status) if status in REFUSED_FOR_ITS_CONTENT and NO_IMAGES.search(text):
            return CannotSee()
        case Refused(status=status) if 400 <= status < 500:
            return ModelFailed(refused=status)
        case ConnectError() | BrokenError():
            return ModelUnavailable()
        case _:
            return ModelFailed()


def _to_wire(model: ChatModel, message: BaseMessage) -> dict[str, Any]:
    """A message as the server expects it; ChatOpenAI's own conversion costs ten times as much."""
    content = message.content
    if isinstance(content, str) and message.additional_kwargs.keys() <= SHOWN_ONCE and message.name is None:
        if isinstance(message, HumanMessage):
            return {"role": "user", "content": content}
        if isinstance(message, SystemMessage):
            return {"role": "system", "content": content}
        if isinstance(message, AIMessage) and not message.invalid_tool_calls:
            if not message.tool_calls:
                return {"role": "assistant", "content": content}
            calls = [
                {
                    "type": "function",
                    "id": call["id"],
                    "function": {"name": call["name"], "arguments": orjson.dumps(call["args"]).decode()},
                }
                for call in message.tool_calls
            ]
            return {"role": "assistant", "content": content or None, "tool_calls": calls}
    if isinstance(content, str) and isinstance(message, ToolMessage):
        return {"role": "tool", "content": content, "tool_call_id": message.tool_call_id}
    converted: dict[str, Any] = model._get_request_payload([message])["messages"][0]
    return converted


def create_model(settings: Settings) -> ChatModel:
    return ChatModel(
        model=settings.model_name,
        base_url=settings.model_base_url,
        # The client insists on a key; a server that was given none ignores it.
        api_key=settings.model_api_key or SecretStr("none"),
        temperature=settings.temperature,
        max_completion_tokens=settings.max_tokens,
        extra_body=settings.model_extra_body or None,
        use_responses_api=False,
        hold_seconds=settings.model_hold_seconds,
    )
