"""Assistants: the agent as it was deployed, which nobody changes, and the configurations of it that a caller has made."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import ValidationError

from agent.api.answers import Json, dump, pick
from agent.api.requests import JsonRoute, owner
from agent.api.schemas import (
    ASSISTANT_ID,
    GRAPH_ID,
    Assistant,
    AssistantCount,
    AssistantCreate,
    AssistantLatest,
    AssistantPath,
    AssistantSearch,
    AssistantUpdate,
    AssistantVersions,
    Graph,
    GraphSchemas,
    Options,
)
from agent.errors import InvalidRequest, NotFound
from agent.runs.assistants import Assistant as StoredAssistant
from agent.runs.quota import ROW_BYTES
from agent.services import Services, services

router = APIRouter(prefix="/assistants", tags=["assistants"], route_class=JsonRoute)

Subgraph = Annotated[str, Path(pattern=r"^[A-Za-z0-9_:|-]{1,200}$", description="A subgraph's name.")]
STARTED = datetime.now(UTC)
ASSISTANT_METADATA = {"created_by": "system"}
# What LangGraph's clients put into `configurable` themselves. It says nothing of the agent.
PLACES = frozenset({"thread_id", "checkpoint_id", "checkpoint_ns", "checkpoint_map", "assistant_id", "graph_id", "run_id", "user_id"})
PREFIXES = ("__", "langgraph_", "x-")
# Of the options, those that the model's own API has.
OF_THE_MODEL = Options.model_fields.keys() - {"system_prompt", "tools"}


def is_deployed(assistant_id: str) -> bool:
    """Whether it is the agent as it was deployed."""
    return assistant_id in (ASSISTANT_ID, GRAPH_ID)


def check_options(*given: Mapping[str, Any] | None) -> Options:
    """What these set of the agent, the later before the earlier. Raises InvalidRequest: an option must not go unheeded."""
    merged: dict[str, Any] = {}
    for options in given:
        merged |= {name: value for name, value in (options or {}).items() if name not in PLACES and not name.startswith(PREFIXES)}
    try:
        return Options.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        name = str(first["loc"][0]) if first["loc"] and first["loc"][0] in Options.model_fields else None
        known = ", ".join(Options.model_fields)
        raise InvalidRequest(f"{name}: {first['msg']}." if name else f"config.configurable and context: the options are {known}.") from None


async def options_of(worker: Services, caller: str, assistant_id: str, *given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a run with this assistant sets, as RunOptions takes it. Raises NotFound, InvalidRequest."""
    stored: tuple[Mapping[str, Any] | None, ...] = ()
    if not is_deployed(assistant_id):
        assistant = await worker.assistants.get(caller, assistant_id)
        stored = (assistant.config.get("configurable"), assistant.context)
    elif not any(given):
        return {}
    options = check_options(*stored, *given)
    model = {name: value for name in OF_THE_MODEL if (value := getattr(options, name)) is not None}
    if "max_tokens" in model:
        model["max_tokens"] = min(model["max_tokens"], worker.settings.max_tokens)
    return {
        "model": model,
        "system_prompt": options.system_prompt or None,
        "tools": tuple(options.tools) if options.tools is not None else None,
        "assistant_id": None if is_deployed(assistant_id) else assistant_id,
    }


def deployed() -> dict[str, Any]:
    return {
        "assistant_id": ASSISTANT_ID,
        "graph_id": GRAPH_ID,
        "name": GRAPH_ID,
        "description": None,
        "config": {},
        "context": {},
        "metadata": ASSISTANT_METADATA,
        "version": 1,
        "created_at": STARTED,
        "updated_at": STARTED,
    }


def describe(assistant: StoredAssistant, *, of_version: bool = False) -> dict[str, Any]:
    return {
        "assistant_id": assistant.assistant_id,
        "graph_id": GRAPH_ID,
        "name": assistant.name,
        "description": assistant.description,
        "config": assistant.config,
        "context": assistant.context,
        "metadata": assistant.metadata,
        "version": assistant.version,
        "created_at": assistant.written_at if of_version else assistant.created_at,
        "updated_at": assistant.updated_at,
    }


async def _find(request: Request, assistant_id: str) -> dict[str, Any]:
    if is_deployed(assistant_id):
        return deployed()
    return describe(await services(request).assistants.get(owner(request), assistant_id))


async def _found(request: Request, asked: AssistantSearch | AssistantCount) -> list[dict[str, Any]]:
    if asked.graph_id not in (None, GRAPH_ID):
        return []
    all_of_them = [deployed(), *(describe(each) for each in await services(request).assistants.all(owner(request)))]
    part = (asked.name or "").lower()
    return [each for each in all_of_them if part in each["name"].lower() and _contains(each["metadata"], asked.metadata or {})]


def _contains(metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(name in metadata and metadata[name] == value for name, value in wanted.items())


@router.post("", response_model=Assistant, responses={403: {}, 409: {}})
async def create_assistant(request: Request, asked: AssistantCreate) -> Json:
    """Keep a configuration of the agent. An owner may have a hundred."""
    _check_graph(asked.graph_id)
    config = asked.config.model_dump(exclude_none=True) if asked.config else {}
    check_options(config.get("configurable"), asked.context)
    made: dict[str, Any] = {"name": asked.name or "Untitled", "description": asked.description, "config": config}
    made |= {"context": asked.context or {}, "metadata": asked.metadata or {}}
    if asked.if_exists == "do_nothing" and (same := await _same(request, asked.assistant_id, made)) is not None:
        return Json(same)
    if asked.assistant_id == ASSISTANT_ID:
        raise InvalidRequest("assistant_id: this is the agent as it was deployed.")
    await services(request).quota.admit(owner(request), ROW_BYTES + len(dump(made)))
    return Json(describe(await services(request).assistants.create(owner(request), asked.assistant_id, **made)))


async def _same(request: Request, assistant_id: str | None, made: Mapping[str, Any]) -> dict[str, Any] | None:
    """The one of this id, or without an id one that differs in nothing: programs ask for theirs whenever they start."""
    if assistant_id == ASSISTANT_ID:
        return deployed()
    for each in await services(request).assistants.all(owner(request)):
        described = describe(each)
        if each.assistant_id == assistant_id or (assistant_id is None and all(described[name] == value for name, value in made.items())):
            return described
    return None


def _check_graph(graph_id: str) -> None:
    if graph_id not in (GRAPH_ID, ASSISTANT_ID):
        raise NotFound(f"graph_id: the only graph is `{GRAPH_ID}`.")


@router.post("/search", response_model=list[Assistant])
async def search_assistants(request: Request, asked: AssistantSearch) -> Json:
    """The newest first, unless asked otherwise. X-Pagination-Next has the offset of the next page."""
    found = await _found(request, asked)
    found.sort(key=lambda each: (each[asked.sort_by or "created_at"], each["assistant_id"]), reverse=asked.sort_order != "asc")
    page = found[asked.offset : asked.offset + asked.limit]
    more = asked.offset + asked.limit < len(found)
    return Json([pick(each, asked.select) for each in page], headers={"X-Pagination-Next": str(asked.offset + asked.limit)} if more else None)


@router.post("/count", response_model=int)
async def count_assistants(request: Request, asked: AssistantCount) -> Json:
    return Json(len(await _found(request, asked)))


@router.get("/{assistant_id}", response_model=Assistant, responses={404: {}})
async def get_assistant(request: Request, assistant_id: AssistantPath) -> Json:
    return Json(await _find(request, assistant_id))


@router.patch("/{assistant_id}", response_model=Assistant, responses={403: {}, 404: {}})
async def update_assistant(request: Request, assistant_id: AssistantPath, asked: AssistantUpdate) -> Json:
    """Make a version in which what is given is changed, and use it. The last twenty versions are kept."""
    _check_graph(asked.graph_id)
    changed = asked.model_dump(exclude_none=True, exclude={"graph_id"})
    await services(request).quota.admit(owner(request), ROW_BYTES + len(dump(changed)))
    _check_own(assistant_id)
    check_options((changed.get("config") or {}).get("configurable"), changed.get("context"))
    return Json(describe(await services(request).assistants.update(owner(request), assistant_id, changed)))


@router.delete("/{assistant_id}", status_code=204, responses={404: {}})
async def delete_assistant(request: Request, assistant_id: AssistantPath, delete_threads: bool = False) -> Response:
    """With `delete_threads` also the threads that it was the last to work on."""
    _check_own(assistant_id)
    await services(request).assistants.delete(owner(request), assistant_id)
    if delete_threads:
        threads = services(request).threads
        while found := await threads.search(owner(request), metadata={"assistant_id": assistant_id}, limit=50):
            for thread in found:
                await threads.delete(owner(request), thread.thread_id)
    return Response(status_code=204)


@router.post("/{assistant_id}/versions", response_model=list[Assistant], responses={404: {}})
async def list_versions(request: Request, assistant_id: AssistantPath, asked: AssistantVersions) -> Json:
    """Newest first."""
    found: Sequence[dict[str, Any]] = [deployed()]
    if not is_deployed(assistant_id):
        found = [describe(each, of_version=True) for each in await services(request).assistants.versions(owner(request), assistant_id)]
    return Json([each for each in found if _contains(each["metadata"], asked.metadata or {})][asked.offset : asked.offset + asked.limit])


@router.post("/{assistant_id}/latest", response_model=Assistant, responses={404: {}})
async def set_latest(request: Request, assistant_id: AssistantPath, asked: AssistantLatest) -> Json:
    """Use one of the versions."""
    if is_deployed(assistant_id) and asked.version == 1:
        return Json(deployed())
    _check_own(assistant_id)
    return Json(describe(await services(request).assistants.use(owner(request), assistant_id, asked.version)))


def _check_own(assistant_id: str) -> None:
    if is_deployed(assistant_id):
        raise InvalidRequest("assistant_id: the agent as it was deployed cannot be changed. Create an assistant.")


@router.get("/{assistant_id}/graph", response_model=Graph, responses={404: {}})
async def get_graph(request: Request, assistant_id: AssistantPath, xray: bool | int = False) -> Json:
    """The agent has no subgraphs, so `xray` shows no more."""
    await _find(request, assistant_id)
    return Json((await services(request).graph.aget_graph(xray=xray)).to_json())


@router.get("/{assistant_id}/schemas", response_model=GraphSchemas, responses={404: {}})
async def get_schemas(request: Request, assistant_id: AssistantPath) -> Json:
    await _find(request, assistant_id)
    graph = services(request).graph
    options = Options.model_json_schema()
    return Json(
        {
            "graph_id": GRAPH_ID,
            "input_schema": graph.get_input_jsonschema(),
            "output_schema": graph.get_output_jsonschema(),
            "state_schema": graph.get_output_jsonschema(),
            "config_schema": options,
            "context_schema": options,
        }
    )


@router.get("/{assistant_id}/subgraphs", response_model=dict[str, GraphSchemas], responses={404: {}})
async def get_subgraphs(request: Request, assistant_id: AssistantPath, recurse: bool = False) -> Json:
    """The agent has none."""
    await _find(request, assistant_id)
    return Json({})


@router.get("/{assistant_id}/subgraphs/{namespace}", response_model=dict[str, GraphSchemas], responses={404: {}})
async def get_subgraph(request: Request, assistant_id: AssistantPath, namespace: Subgraph, recurse: bool = False) -> Json:
    """The agent has none."""
    await _find(request, assistant_id)
    return Json({})
