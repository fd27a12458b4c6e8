"""The LangGraph server API, as far as its clients need it here: its routers, and a plain no for the rest."""

from importlib.metadata import version

from fastapi import APIRouter

from agent.api import assistants, crons, runs, store, threads
from agent.api.answers import Json
from agent.api.requests import JsonRoute
from agent.api.schemas import Info, Ok
from agent.errors import NotSupported

API_VERSION = "1.0.0"

service = APIRouter(tags=["service"], route_class=JsonRoute)


@service.get("/ok", response_model=Ok)
async def ok() -> Json:
    """Whether this process works, and knows who asks."""
    return Json({"ok": True})


@service.get("/info", response_model=Info)
async def info() -> Json:
    return Json(
        {
            "version": API_VERSION,
            "langgraph_py_version": version("langgraph"),
            "flags": {"assistants": True, "crons": True},
            "strict_resume": True,
        }
    )


class NoSuchFeature(NotSupported):
    status = 404


# What the SDK may ask for besides. Undocumented, because it is not there; named, because "not found" would puzzle.
ABSENT = {
    "The thread protocol (threads.stream)": [
        ("POST", "/threads/{thread_id}/stream/events"),
        ("POST", "/threads/{thread_id}/commands"),
    ],
}


def _refuse(router: APIRouter, feature: str, method: str, path: str) -> None:
    @router.api_route(path, methods=[method], include_in_schema=False)
    async def refuse() -> None:
        raise NoSuchFeature(f"{feature}: this is not supported here.")


absent = APIRouter()
for _feature, _routes in ABSENT.items():
    for _method, _path in _routes:
        _refuse(absent, _feature, _method, _path)

router = APIRouter()
# First, so that "prune" is not taken for the name of a thread.
for _router in (absent, assistants.router, threads.router, crons.router, runs.router, store.router, service):
    router.include_router(_router)
