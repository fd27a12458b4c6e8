"""What the OpenAI routes take and answer. The names are OpenAI's, and vLLM's where OpenAI has none.

A field is in one of four places: it is declared and passed on to the model; declared and used here; in HINTS, which
change nothing that can be kept, so that any value is ignored; or in NO_OPS, whose values say what is true anyway. Every
other value is refused by its field's name. `null` is always the same as nothing.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from agent.api.openai_errors import MODEL
from agent.api.schemas import WHOLE, Body

# They save work, or sort and bill it, where there is something to choose.
HINTS = (
    "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "request_id", "safety_identifier", "service_tier",
)  # fmt: skip
# What a field may say that means nothing, besides null.
NO_OPS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": ([], ["text"]),
    "moderation": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
MAX_METADATA_BYTES = 16_384


def _refuse_true(value: bool) -> bool:
    if value:
        raise PydanticCustomError("not_false", "Input can only be false")
    return value


# Literal[False] would take 0 as well.
No = Annotated[bool, AfterValidator(_refuse_true), Field(json_schema_extra={"const": False})]


@dataclass(frozen=True, slots=True)
class Meaningless:
    """The fields of a request that are taken only where they mean nothing."""

    hints: tuple[str, ...]
    no_ops: dict[str, tuple[Any, ...]]

    def drop(self, value: Any) -> Any:
        """The request without them."""
        if not isinstance(value, dict):
            return value
        return {name: inner for name, inner in value.items() if not (name in self.hints or (name in self.no_ops and self._is_no_op(name, inner)))}

    def describe(self, schema: dict[str, Any]) -> None:
        """Put them into the request's schema."""
        schema["properties"] |= {name: {"description": "Ignored."} for name in self.hints}
        schema["properties"] |= {name: {"enum": [None, *values]} for name, values in self.no_ops.items()}

    def _is_no_op(self, name: str, value: Any) -> bool:
        # To Python true is 1 as well.
        return value is None or any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in self.no_ops[name])


class History(Body):
    """Something that was said before: what a client keeps with it and nobody needs is ignored."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})


# Contents


class TextPart(History):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(History):
    type: Literal["refusal"]
    refusal: str


class ImageUrl(Body):
    url: Annotated[
        str,
        StringConstraints(pattern=r"^data:image/(png|jpeg|jpg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}$"),
        Field(description="The image itself. The service fetches none."),
    ]
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(History):
    type: Literal["image_url"]
    image_url: ImageUrl


# Messages


class Instruction(Body):
    """Kept in its place as text of a question: the agent's own instructions are the operator's."""

    role: Literal["system", "developer"]
    content: str | list[TextPart] | None = None
    name: str | None = None


class Question(Body):
    role: Literal["user"]
    content: str | list[TextPart | ImagePart] | None = None
    name: str | None = None


class Function(History):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    arguments: Annotated[str, Field(description="A JSON object, or nothing.")] = ""


CallId = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}$")]


class Call(History):
    id: CallId
    type: Literal["function"] = "function"
    function: Function


class Answer(History):
    role: Literal["assistant"]
    content: str | list[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    tool_calls: list[Call] | None = None
    function_call: None = None


class Result(History):
    """What came of a call of one of the caller's tools."""

    role: Literal["tool"]
    tool_call_id: CallId
    content: str | list[TextPart] | None = None


# Tools and formats

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class ToolFunction(Body):
    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any], Field(description="A JSON schema.")] | None = None
    strict: bool | None = None


class Tool(History):
    """One of the caller's. The model's call of it is answered with finish_reason `tool_calls`."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Body):
    name: ToolName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolsAllowed(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TextFormat(Body):
    type: Literal["text"]


class JsonFormat(Body):
    type: Literal["json_object"]


class SchemaOfAnswer(Body):
    name: ToolName
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: SchemaOfAnswer


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, Field(description="Nothing is obfuscated: answers go over TLS only.")] | None = None
    # vLLM's
    continuous_usage_stats: No | None = None


A_QUESTION = {"contains": {"type": "object", "required": ["role"], "properties": {"role": {"const": "user"}}}}
StopText = Annotated[str, StringConstraints(max_length=100)]
MaxTokens = Annotated[int, Field(ge=1, le=131_072, description="Not more than the service's AGENT_MAX_TOKENS."), WHOLE]
Count = Annotated[int, Field(ge=-1, le=1_000_000), WHOLE]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=10_000_000)]], Field(max_length=1000)]


class Sampling(Body):
    """Passed on to the model as it is."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # vLLM's
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[StopText], Field(max_length=100)] | None = None
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    ignore_eos: bool | None = None
    include_reasoning: bool | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=131_072), WHOLE] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    stop_token_ids: TokenIds | None = None
    structured_outputs: Annotated[dict[str, Any], Field(max_length=8)] | None = None
    top_k: Count | None = None


class Completion(Sampling):
    model_config = ConfigDict(json_schema_extra=Meaningless(HINTS, NO_OPS).describe)

    model: Annotated[str, Field(json_schema_extra={"enum": [MODEL]})]
    messages: Annotated[list[Instruction | Question | Answer | Result], Field(min_length=1, json_schema_extra=A_QUESTION)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256, description="Kept with the run.")] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16, description=f"Kept with the run. At most {MAX_METADATA_BYTES} bytes of JSON.")] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    store: No | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | ToolsAllowed | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, value: Any) -> Any:
        return Meaningless(HINTS, NO_OPS).drop(value)


# What they answer


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Called(BaseModel):
    name: str
    arguments: str


class SaidCall(BaseModel):
    id: str
    type: Literal["function"]
    function: Called


class Said(BaseModel):
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.update(required=["role", "content", "refusal"]))

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[SaidCall]
    reasoning_content: Annotated[str, Field(description="What the model thought before it answered, where it tells that.")]


class Choice(BaseModel):
    index: int
    message: Said
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]
    logprobs: dict[str, Any] | None


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
