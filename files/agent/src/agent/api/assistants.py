"""The one assistant: the agent as it was deployed. It can be looked at, not changed."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from agent.api.answers import Json, pick
from agent.api.requests import JsonRoute
from agent.api.schemas import (
    ASSISTANT_ID,
    GRAPH_ID,
    Assistant,
    AssistantCount,
    AssistantPath,
    AssistantSearch,
    Graph,
    GraphSchemas,
)
from agent.errors import NotFound
from agent.services import services

router = APIRouter(prefix="/assistants", tags=["assistants"], route_class=JsonRoute)

STARTED = datetime.now(UTC)
ASSISTANT_METADATA = {"created_by": "system"}


def check_assistant(assistant_id: str) -> None:
    if assistant_id not in (ASSISTANT_ID, GRAPH_ID):
        raise NotFound("There is no such assistant.")


def describe() -> dict[str, Any]:
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


def fits(asked: AssistantSearch | AssistantCount) -> bool:
    return asked.graph_id in (None, GRAPH_ID) and asked.name in (None, GRAPH_ID) and (asked.metadata or {}).items() <= ASSISTANT_METADATA.items()


@router.post("/search", response_model=list[Assistant])
async def search_assistants(asked: AssistantSearch) -> Json:
    found = [pick(describe(), asked.select)] if fits(asked) and asked.offset == 0 else []
    return Json(found)


@router.post("/count", response_model=int)
async def count_assistants(asked: AssistantCount) -> Json:
    return Json(int(fits(asked)))


@router.get("/{assistant_id}", response_model=Assistant, responses={404: {}})
async def get_assistant(assistant_id: AssistantPath) -> Json:
    check_assistant(assistant_id)
    return Json(describe())


@router.get("/{assistant_id}/graph", response_model=Graph, responses={404: {}})
async def get_graph(request: Request, assistant_id: AssistantPath, xray: bool = False) -> Json:
    """The agent has no subgraphs, so `xray` shows no more."""
    check_assistant(assistant_id)
    return Json((await services(request).graph.aget_graph(xray=xray)).to_json())


@router.get("/{assistant_id}/schemas", response_model=GraphSchemas, responses={404: {}})
async def get_schemas(request: Request, assistant_id: AssistantPath) -> Json:
    check_assistant(assistant_id)
    graph = services(request).graph
    return Json(
        {
            "graph_id": GRAPH_ID,
            "input_schema": graph.get_input_jsonschema(),
            "output_schema": graph.get_output_jsonschema(),
            "state_schema": graph.get_output_jsonschema(),
            "config_schema": None,
            "context_schema": graph.get_context_jsonschema(),
        }
    )


@router.get("/{assistant_id}/subgraphs", response_model=dict[str, GraphSchemas], responses={404: {}})
async def get_subgraphs(assistant_id: AssistantPath, recurse: bool = False) -> Json:
    """The agent has none."""
    check_assistant(assistant_id)
    return Json({})
