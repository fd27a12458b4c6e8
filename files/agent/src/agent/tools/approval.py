"""Tools that a person must allow: the run stops before any tool of that step has run, and goes on with the answer."""

from fnmatch import fnmatchcase
from typing import Any

from langchain_core.messages import ToolCall, ToolMessage
from langgraph.errors import is_invalid_resume
from langgraph.types import interrupt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from agent.errors import InvalidRequest

EXPECTED = (
    'The answer to an approval must be {"approve": true} or {"approve": false, "reason": "..."}, and may name the call it is for with "id".'
    ' {"decisions": [{"type": "approve"}]} and [{"type": "accept"}] are as good; arguments cannot be edited.'
)


class Approval(BaseModel):
    """What a client answers when it is asked, in its own form or in those of LangChain's Agent Chat UI and Agent Inbox."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _of_other_forms(cls, value: Any) -> Any:
        # Questions are asked one by one, so there is one decision.
        match value:
            case {"decisions": [decision], **rest} if not rest:
                value = decision
            case [decision]:
                value = decision
        match value:
            case {"type": "approve" | "accept"}:
                return {"approve": True}
            case {"type": "reject" | "ignore" | "response"}:
                reason = value.get("message") or value.get("args")
                return {"approve": False, "reason": reason if isinstance(reason, str) else None}
        return value

    approve: bool
    reason: str | None = Field(None, max_length=500)
    id: str | None = Field(None, max_length=100, description="The call's id, to be sure that this one is meant.")


def _for_call(call_id: str | None) -> type[Approval]:
    class ApprovalOfThisCall(Approval):
        @field_validator("id")
        @classmethod
        def _is_this_call(cls, value: str | None) -> str | None:
            if value not in (None, call_id):
                raise ValueError("another call is asked about")
            return value

    return ApprovalOfThisCall


def check_answer(value: object) -> None:
    """Refuse a malformed answer before it is recorded as a run. Raises InvalidRequest."""
    try:
        Approval.model_validate(value)
    except ValidationError:
        raise InvalidRequest(EXPECTED) from None


def ask(calls: list[ToolCall], patterns: tuple[str, ...]) -> list[ToolMessage]:
    """Return the results of the calls that were not allowed.

    Asked one by one: answers belong to questions by their order. Which calls are asked about depends on nothing that
    may have changed when the answer comes, such as whether the tool's server can be reached.
    """
    refused = []
    for call in calls:
        if not any(fnmatchcase(call["name"], pattern) for pattern in patterns):
            continue
        question = {"type": "approval", "tool": call["name"], "arguments": call["args"], "id": call["id"]}
        try:
            # A value that does not fit the schema is not recorded, so that the question can be answered again.
            answer = interrupt(question, response_schema=_for_call(call["id"]))
        except ValidationError as error:
            if is_invalid_resume(error):
                raise InvalidRequest(EXPECTED) from None
            raise
        if not answer.approve:
            text = "The user did not allow this call." + (f" The reason: {answer.reason}" if answer.reason else "")
            # The mark tells clients that nothing failed. The model is told by the text.
            mark = {"refused": True}
            refused.append(ToolMessage(text, name=call["name"], tool_call_id=call["id"], status="error", additional_kwargs=mark))
    return refused
