"""Errors as OpenAI's API tells them, and whether its clients are to try again."""

from typing import Any

from pydantic import BaseModel

from agent.api.answers import Json
from agent.errors import BodyTooLarge, ConversationTooLong, NotFound, NotSupported, RateLimited, ServiceError, ThreadBusy, TurnTimeout

# The model's name for the agent.
MODEL = "agent"
# What OpenAI's clients wait at most before they ask again. A limit that lasts longer is not over by then.
LONGEST_WAIT_SECONDS = 60
# Statuses of the model server that are about the request, and not about who sends it or where to.
ABOUT_THE_REQUEST = frozenset({400, 413, 415, 422})
TOO_LARGE = "The request is larger than the service takes. Send a shorter conversation."
REFUSED = "The model server refused the request: it takes no such message or parameter."
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    BodyTooLarge.code: "context_length_exceeded",
    ConversationTooLong.code: "context_length_exceeded",
    NotSupported.code: "unsupported_parameter",
}


class OpenAIErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    error: OpenAIErrorBody


class ApprovalNeeded(ServiceError):
    status = 409
    code = "approval_needed"
    message = "The agent waits for an approval. It cannot be given here, but by the LangGraph API on a kept thread."


class ModelNotFound(NotFound):
    code = "model_not_found"
    message = f"There is no such model. The agent is called `{MODEL}`."


def openai_error(error: ServiceError) -> Json:
    """The same failure as OpenAI would tell it.

    What OpenAI's API calls a bad request has one status there. Its clients repeat a request by the status alone, unless
    the answer says whether that can help.
    """
    headers = {"X-Should-Retry": "true" if can_be_mended(error) else "false"}
    if error.retry_after:
        headers["Retry-After"] = str(error.retry_after)
    return Json(describe(error), status_of(error), headers)


def status_of(error: ServiceError) -> int:
    """The status in OpenAI's API."""
    return 400 if error.status in ABOUT_THE_REQUEST or error.refused in ABOUT_THE_REQUEST else error.status


def can_be_mended(error: ServiceError) -> bool:
    """Whether the same request can succeed some seconds later."""
    if error.refused or error.status == TurnTimeout.status or (error.retry_after or 0) > LONGEST_WAIT_SECONDS:
        return False
    return error.status >= 500 or error.code in (RateLimited.code, ThreadBusy.code)


def describe(error: ServiceError) -> dict[str, Any]:
    """The body of an error, which is also what a stream ends with."""
    status = status_of(error)
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    param = error.param if isinstance(error, NotSupported) else None
    message = error.message
    if error.refused in ABOUT_THE_REQUEST:
        message = REFUSED
    elif isinstance(error, BodyTooLarge):
        message = TOO_LARGE
    return {"error": {"message": message, "type": kind, "param": param, "code": CODES.get(error.code, error.code)}}
