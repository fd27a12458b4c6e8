"""Items that outlive threads. Each user has a store of their own: another's cannot be named."""

import hashlib
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from langgraph.store.base import Item as StoredItem
from langgraph.store.base import SearchItem as FoundItem

from agent.api.answers import Json
from agent.api.requests import JsonRoute, owner
from agent.api.schemas import (
    Item,
    ItemDelete,
    ItemPut,
    Items,
    ItemSearch,
    KeyQuery,
    NamespaceList,
    NamespaceQuery,
    Namespaces,
)
from agent.errors import NotFound
from agent.services import services

router = APIRouter(prefix="/store", tags=["store"], route_class=JsonRoute)

ROOT = "items"
MAX_OWNER_BYTES = 200


def root(request: Request) -> tuple[str, str]:
    """The namespace that all of an owner's are in. A label takes no dot, and must fit an index."""
    name = owner(request)
    label = name.replace("%", "%25").replace(".", "%2E")
    if len(label.encode()) > MAX_OWNER_BYTES:
        label = hashlib.sha256(name.encode()).hexdigest()
    return ROOT, label


@router.put("/items", status_code=204)
async def put_item(request: Request, asked: ItemPut) -> Response:
    await services(request).store.aput((*root(request), *asked.namespace), asked.key, asked.value, index=False)
    return Response(status_code=204)


@router.get("/items", response_model=Item, responses={404: {}})
async def get_item(request: Request, namespace: NamespaceQuery, key: KeyQuery) -> Json:
    item = await services(request).store.aget((*root(request), *namespace.split(".")), key)
    if item is None:
        raise NotFound("There is no such item.")
    return Json(_describe(item))


@router.delete("/items", status_code=204)
async def delete_item(request: Request, asked: ItemDelete) -> Response:
    """Gone afterwards, whether or not it was there."""
    await services(request).store.adelete((*root(request), *asked.namespace), asked.key)
    return Response(status_code=204)


@router.post("/items/search", response_model=Items)
async def search_items(request: Request, asked: ItemSearch) -> Json:
    """The items at or below a namespace, the one changed last first."""
    found: list[FoundItem] = await services(request).store.asearch(
        (*root(request), *asked.namespace_prefix), filter=asked.filter or None, limit=asked.limit, offset=asked.offset
    )
    return Json({"items": [{**_describe(item), "score": item.score} for item in found]})


@router.post("/namespaces", response_model=Namespaces)
async def list_namespaces(request: Request, asked: NamespaceList) -> Json:
    mine = root(request)
    found = await services(request).store.alist_namespaces(
        prefix=(*mine, *asked.prefix),
        suffix=tuple(asked.suffix) or None,
        max_depth=asked.max_depth + len(mine) if asked.max_depth else None,
        limit=asked.limit,
        offset=asked.offset,
    )
    return Json({"namespaces": [namespace[len(mine) :] for namespace in found]})


def _describe(item: StoredItem) -> Mapping[str, Any]:
    return {
        "namespace": item.namespace[2:],
        "key": item.key,
        "value": item.value,
        "created_at": item.created_at,
        "updated_at": item.updated_at,
    }
