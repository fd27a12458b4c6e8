"""The OpenAPI document: FastAPI's, plus what is true of every route and FastAPI cannot know."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.routing import compile_path

from agent.access.auth import OPEN_PATHS
from agent.api.langgraph import API_VERSION
from agent.api.openai import PREFIX as OPENAI
from agent.api.openai_errors import OpenAIError
from agent.api.schemas import Error

REFERENCE = "#/components/schemas/{model}"
DESCRIPTION = (
    "A LangGraph agent. `/chat` is the short way to talk to it; `/assistants`, `/threads`, `/runs` and `/store` are "
    f"the part of the LangGraph server API that its clients need; `{OPENAI}` is for clients of OpenAI's API. Bodies "
    "are JSON of at most 64 KiB, for OpenAI's clients of as much as the operator allows, 64 levels deep, without the "
    "character NUL. Whatever is not described is refused."
)
SECURITY: dict[str, Any] = {
    "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The same API key."},
    "login": {"type": "http", "scheme": "basic", "description": "A user's password, checked by the proxy in front."},
}
SAYS = {
    400: "The body is not JSON.",
    401: "Who asks is not known.",
    403: "The owner's storage is full.",
    404: "There is no such thing, or it is another's.",
    409: "It cannot be done as things stand.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    422: "A value is not one of those that are allowed, or not supported.",
    429: "Too many requests, tokens or runs.",
    500: "A mistake of the service's.",
    502: "The model gave no usable answer.",
    503: "The service, or something that it needs, is away.",
    504: "The answer took too long.",
}
WITH_BODY = (400, 413, 415, 422)
ALWAYS = (401, 500, 503)


def describe(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        app.openapi_schema = _complete(get_openapi(title="agent", version=API_VERSION, description=DESCRIPTION, routes=app.routes))
    return app.openapi_schema


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _, errors = models_json_schema([(Error, "validation"), (OpenAIError, "validation")], ref_template=REFERENCE)
    schemas.update(errors["$defs"])
    components["securitySchemes"] = SECURITY
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{name: []} for name in SECURITY]
            _tell_failures(path, operation)
    return document


def _tell_failures(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    statuses = {int(status) for status in responses if int(status) >= 400}
    if path in OPEN_PATHS:
        statuses.discard(422)
    else:
        statuses |= set(ALWAYS)
        if "requestBody" in operation:
            statuses |= set(WITH_BODY)
        if operation.get("parameters"):
            statuses.add(422)
    if 429 in statuses:
        statuses.add(403)  # whoever may be counted may be at the end of their storage
    schema = "Error"
    if path.startswith(OPENAI):
        # There a bad request is a bad request.
        schema = "OpenAIError"
        if statuses & set(WITH_BODY):
            statuses = statuses - set(WITH_BODY) | {400}
    for status in [status for status in responses if int(status) >= 400]:
        del responses[status]
    for status in sorted(statuses):
        content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=schema)}}}
        responses[str(status)] = {"description": SAYS[status], "content": content}
        if status in (429, 503):
            responses[str(status)]["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}


def allowed(app: FastAPI, path: str) -> list[str]:
    """The methods that a path has. FastAPI knows each of its routes, but not what others the path has."""
    paths: dict[str, Any] = describe(app)["paths"]
    for template in sorted(paths, key=lambda template: template.count("{")):
        if compile_path(template)[0].match(path):
            return [method.upper() for method in paths[template]]
    return []


@lru_cache(maxsize=8)  # by identity: one application a process, and several in tests
def names(app: FastAPI) -> frozenset[str]:
    """Every name that the document has for a field or parameter: those may be repeated to a client."""
    return frozenset(_names(describe(app)))


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        properties = value.get("properties")
        yield from properties if isinstance(properties, dict) else ()
        if "in" in value and isinstance(value.get("name"), str):
            yield value["name"]
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _names(inner)
