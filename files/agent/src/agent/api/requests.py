"""Requests as the routes take them: with a small, shallow, plain JSON body, or with a refusal in words of our own."""

from collections.abc import Callable, Container, Coroutine, Sequence
from typing import Annotated, Any

import orjson
from fastapi import Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from agent.errors import BodyTooLarge, InvalidJson, InvalidRequest, NotSupported, ServiceError, UnsupportedMediaType

MAX_BODY_BYTES = 64 * 1024
MAX_DEPTH = 64

# What the LangGraph API and OpenAI's have and this service does not: named, so that a client learns it.
NOT_SUPPORTED = {
    "after_seconds": "Delayed runs (after_seconds)",
    "checkpoint_map": "Checkpoints of subgraphs (checkpoint_map)",
    "configurable": "config.configurable",
    "context": "context",
    "cron": "Crons",
    "extract": "extract",
    "feedback_keys": "feedback_keys",
    "goto": "command.goto",
    "index": "An index of store items",
    "langsmith_tracer": "langsmith_tracing",
    "query": "A search of store items by meaning",
    "status": "Cancelling runs by their status",
    "supersteps": "supersteps",
    "ttl": "A ttl",
    "update": "command.update",
    "values": "A search of threads by their values",
    "webhook": "Webhooks",
    **{
        name: name
        for name in (
            "add_generation_prompt", "add_special_tokens", "audio", "best_of", "chat_template", "continue_final_message", "documents", "echo",
            "function_call", "functions", "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex",
            "include_stop_str_in_output", "kv_transfer_params", "length_penalty", "logits_processors", "mm_processor_kwargs", "modalities",
            "moderation", "priority", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids", "truncate_prompt_tokens",
            "use_beam_search", "verbosity", "vllm_xargs", "web_search_options",
        )
    },
}  # fmt: skip


TurnId = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,128}$",
        description="A second request with the same one gives the first one's run.",
    ),
]


class JsonRequest(Request):
    """A request whose body was read and parsed before the route looks at it."""

    async def load(self, most_bytes: int) -> None:
        if self.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMediaType
        self._body = await read_body(self, most_bytes)
        self._value = parse(self._body)

    async def body(self) -> bytes:
        return self._body

    async def json(self) -> Any:
        return self._value


class JsonRoute(APIRoute):
    """A route of FastAPI's that checks more than FastAPI would, which takes any size, any depth, NaN and any query."""

    def most_bytes(self, request: Request) -> int:
        """How long the body may be."""
        return MAX_BODY_BYTES

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def check_and_handle(request: Request) -> Response:
            for name in request.query_params.keys() - known:
                raise _not_supported(name) if name in NOT_SUPPORTED else InvalidRequest("query: has an unknown field.")
            if self.body_field is not None:
                loaded = JsonRequest(request.scope, request.receive)
                await loaded.load(self.most_bytes(request))
                request = loaded
            return await handle(request)

        return check_and_handle


def owner(request: Request) -> str:
    """Whose request this is: the name that threads, runs and items are kept under."""
    return str(request.state.principal.name)


async def read_body(request: Request, most_bytes: int = MAX_BODY_BYTES) -> bytes:
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:20]) > most_bytes:
        raise BodyTooLarge
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise BodyTooLarge
    return bytes(body)


def parse(body: bytes) -> Any:
    """The body's value. Neither Postgres nor the model takes NUL, and depth costs whoever walks it next."""
    try:
        value = orjson.loads(body)  # refuses NaN, infinity, half a surrogate pair and a byte order mark
    except orjson.JSONDecodeError:
        raise InvalidJson from None
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise InvalidRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _inside(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        if "\0" in value:
            raise InvalidRequest("The body must not contain the character NUL.")
        return ()
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else ()


def explain(error: RequestValidationError, names: Container[str]) -> ServiceError:
    """Say what is wrong in words of our own, with no name that is not one of ours: the input is never repeated."""
    problems = error.errors()
    for unknown in problems:
        field = str(unknown["loc"][-1])
        if unknown["type"] in ("extra_forbidden", "not_supported") and field in NOT_SUPPORTED:
            return _not_supported(field)
    # Where one of several forms was meant, the one that fits best is wrong farthest inside.
    problem = max(problems, key=lambda each: len(each["loc"]))
    kind, *path = problem["loc"]
    place = ".".join([str(kind), *(str(part) for part in path if isinstance(part, int) or part in names)])
    match problem["type"]:
        case "extra_forbidden":
            return InvalidRequest(f"{place}: has a field that is not known here.")
        case "missing":
            return InvalidRequest(f"{place}: must be given.")
        case _:
            return InvalidRequest(f"{place}: {problem['msg']}.")


def _not_supported(field: str) -> NotSupported:
    return NotSupported(f"{NOT_SUPPORTED[field]}: this is not supported here.", param=field)
