"""The agent: a model and its tools in a loop, its state in a checkpointer."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import openai
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.exceptions import ContextOverflowError
from langchain_core.tools import BaseTool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph.state import CompiledStateGraph
from pydantic import SecretStr

from agent.errors import ConversationTooLong, ModelFailed, ModelUnavailable, ServiceError
from agent.settings import Settings

logger = logging.getLogger(__name__)

Agent = CompiledStateGraph[Any, Any, Any, Any]
AWAY = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)


def create_graph(settings: Settings, tools: list[BaseTool], checkpointer: BaseCheckpointSaver[Any]) -> Agent:
    return create_agent(
        create_model(settings),
        tools,
        system_prompt=settings.system_prompt,
        middleware=[name_model_errors],
        checkpointer=checkpointer,
    )


def create_model(settings: Settings) -> ChatOpenAI:
    return ChatOpenAI(
        model=settings.model_name,
        base_url=settings.model_base_url,
        # The client insists on a key; a server that was given none ignores it.
        api_key=settings.model_api_key or SecretStr("none"),
        temperature=settings.temperature,
        max_completion_tokens=settings.max_tokens,
        timeout=settings.turn_timeout_seconds,
        max_retries=1,
        use_responses_api=False,
    )


@wrap_model_call
async def name_model_errors(
    request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
) -> ModelResponse[Any]:
    """Tell the model's failures from everything else that can fail in a turn."""
    try:
        response = await handler(request)
        for message in response.result:
            message.model_dump_json()  # half a surrogate pair could be neither stored nor sent
        return response
    except Exception as error:
        failure = _name(error)
        # Not the error's text: a server may quote the conversation in it.
        logger.warning(
            "the model failed",
            extra={"code": failure.code, "error": type(error).__name__, "status": getattr(error, "status_code", None)},
        )
        raise failure from error


def _name(error: Exception) -> ServiceError:
    if isinstance(error, AWAY):
        return ModelUnavailable()
    if isinstance(error, ContextOverflowError) or "maximum context length" in str(error):
        return ConversationTooLong()
    return ModelFailed()
