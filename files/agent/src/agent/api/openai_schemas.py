"""What the OpenAI routes take and answer. The names are OpenAI's."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from pydantic_core import PydanticCustomError

from agent.api.openai_errors import MODEL
from agent.api.schemas import WHOLE, Body, Text, TextBlock

# What they take


def _refuse_true(value: bool) -> bool:
    if value:
        raise PydanticCustomError("not_false", "Input can only be false")
    return value


# Literal[False] would take 0 as well.
No = Annotated[bool, AfterValidator(_refuse_true), Field(json_schema_extra={"const": False})]


class Instruction(Body):
    """Put before the next question: the agent's own instructions are the operator's."""

    role: Literal["system", "developer"]
    content: str | list[TextBlock]
    name: str | None = None


class Question(Body):
    role: Literal["user"]
    content: Text | Annotated[list[TextBlock], Field(min_length=1)]
    name: str | None = None


class Answer(Body):
    role: Literal["assistant"]
    content: str | list[TextBlock]
    name: str | None = None
    refusal: None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: No = False


A_QUESTION = {"contains": {"type": "object", "required": ["role"], "properties": {"role": {"const": "user"}}}}
StopText = Annotated[str, StringConstraints(min_length=1, max_length=100)]
MaxTokens = Annotated[int, Field(ge=1, le=131_072, description="Not more than the service's AGENT_MAX_TOKENS."), WHOLE]


class Completion(Body):
    model: Annotated[str, Field(json_schema_extra={"enum": [MODEL]})]
    messages: Annotated[list[Instruction | Question | Answer], Field(min_length=1, json_schema_extra=A_QUESTION)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256, description="Kept with the run.")] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16, description="Kept with the run.")] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**31), le=2**31 - 1), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(min_length=1, max_length=4)] | None = None
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    store: No | None = None
    logprobs: No | None = None


# What they answer


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Said(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    index: int
    message: Said
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completed(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
