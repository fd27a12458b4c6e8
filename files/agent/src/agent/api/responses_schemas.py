"""What the routes of OpenAI's Responses API take and answer, and a request of theirs as one for a completion."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from agent.api.openai_errors import MODEL
from agent.api.openai_schemas import (
    CallId,
    Completion,
    History,
    ImageUrl,
    JsonFormat,
    MaxTokens,
    Meaningless,
    RefusalPart,
    TextFormat,
    TextPart,
    ToolFunction,
    ToolName,
)
from agent.api.schemas import UUID_TEXT, WHOLE, Body
from agent.errors import InvalidRequest

RESPONSE_ID = rf"^resp_{UUID_TEXT[1:]}"
MEANINGLESS = Meaningless(
    hints=("access_programs", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier"),
    no_ops={
        "background": (False,),
        "background_options": ({},),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
    },
)

ResponseId = Annotated[str, StringConstraints(pattern=RESPONSE_ID)]


class InputImage(History):
    type: Literal["input_image"]
    image_url: Annotated[str, StringConstraints(pattern=r"^data:image/(png|jpeg|jpg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}$")]
    detail: Literal["auto", "low", "high", "original"] | None = None


class InputMessage(History):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart | RefusalPart | InputImage] | None = None


class InputCall(History):
    """A call of one of the caller's tools, as an earlier answer had it."""

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    arguments: str = ""


class InputResult(History):
    type: Literal["function_call_output"]
    call_id: CallId
    output: str | list[TextPart]


class InputReasoning(History):
    """Ignored: the model is not shown again what it thought."""

    type: Literal["reasoning"]


InputItem = InputMessage | InputCall | InputResult | InputReasoning


class FunctionTool(ToolFunction):
    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})

    type: Literal["function"]


class NamedTool(Body):
    type: Literal["function"]
    name: ToolName


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: ToolName
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | JsonFormat | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(History):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponseCreate(Body):
    model_config = ConfigDict(json_schema_extra=MEANINGLESS.describe)

    model: Annotated[str, Field(json_schema_extra={"enum": [MODEL]})]
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: Annotated[str, Field(description="For this request alone.")] | None = None
    previous_response_id: Annotated[ResponseId, Field(description="What is said goes on from that response.")] | None = None
    store: Annotated[bool, Field(description="Whether the conversation stays, so that another request can go on from it.")] | None = None
    stream: bool | None = None
    stream_options: Annotated[dict[str, Any], Field(description="Ignored.")] | None = None
    include: Annotated[list[str], Field(max_length=32, description="What is not there is not included.")] | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16, description="Kept with the response.")] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    truncation: Annotated[Literal["auto", "disabled"], Field(description="What does not fit the model is left out, oldest first.")] | None = None
    user: Annotated[str, Field(max_length=256, description="Kept with the response.")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, value: Any) -> Any:
        return MEANINGLESS.drop(value)

    def completion(self) -> Completion:
        """The same as a request for a completion, which says all that the agent needs to know. Raises InvalidRequest."""
        logprobs = "message.output_text.logprobs" in (self.include or ())
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": list(self._messages()),
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "user": self.user,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "logprobs": logprobs or None,
            "top_logprobs": self.top_logprobs if logprobs else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()],
            "tool_choice": _choice(self.tool_choice),
            "response_format": _format(self.text.format if self.text else None),
        }
        if not asked["messages"]:
            raise InvalidRequest("input: there must be a question, a message of the user's.")
        try:
            return Completion.model_validate(asked)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            raise InvalidRequest(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions:
            yield {"role": "developer", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        # Calls are part of the message that the assistant wrote before them, if it wrote one.
        answer: dict[str, Any] | None = None
        for item in self.input:
            if isinstance(item, InputReasoning):
                continue
            if isinstance(item, InputCall):
                answer = answer or {"role": "assistant", "content": None}
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                answer.setdefault("tool_calls", []).append(call)
                continue
            if answer is not None:
                yield answer
                answer = None
            if isinstance(item, InputResult):
                output = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
                yield {"role": "tool", "tool_call_id": item.call_id, "content": output}
            elif item.role == "assistant":
                answer = {"role": "assistant", "content": _content(item.content)}
            else:
                yield {"role": item.role, "content": _content(item.content)}
        if answer is not None:
            yield answer


def _content(content: str | Sequence[TextPart | RefusalPart | InputImage] | None) -> Any:
    if content is None or isinstance(content, str):
        return content
    return [_image(part) if isinstance(part, InputImage) else part.model_dump() for part in content]


def _image(part: InputImage) -> dict[str, Any]:
    return {"type": "image_url", "image_url": ImageUrl(url=part.image_url, detail=part.detail).model_dump(exclude_none=True)}


def _choice(choice: str | NamedTool | AllowedTools | None) -> Any:
    match choice:
        case NamedTool():
            return {"type": "function", "function": {"name": choice.name}}
        case AllowedTools():
            tools = [_choice(tool) for tool in choice.tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def _format(wanted: TextFormat | JsonFormat | SchemaFormat | None) -> Any:
    if isinstance(wanted, SchemaFormat):
        return {"type": "json_schema", "json_schema": wanted.model_dump(by_alias=True, exclude={"type"})}
    return wanted.model_dump() if wanted else None


# What they answer


class Response(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete", "failed", "cancelled", "in_progress", "queued"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    metadata: dict[str, Any]


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: bool
