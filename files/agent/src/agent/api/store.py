"""Items that outlive threads. Each user has a store of their own: another's cannot be named."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from langgraph.store.base import Item as StoredItem
from langgraph.store.base import SearchItem as FoundItem

from agent.api.answers import Json, dump
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
from agent.api.threads import PAGE, Reading, listed
from agent.runs.quota import ROW_BYTES, items_of
from agent.services import services

router = APIRouter(prefix="/store", tags=["store"], route_class=JsonRoute)


def root(request: Request) -> tuple[str, str]:
    return items_of(owner(request))


@router.put("/items", status_code=204, responses={403: {}})
async def put_item(request: Request, asked: ItemPut) -> Response:
    await services(request).quota.admit(owner(request), ROW_BYTES + len(dump(asked.value)))
    await services(request).store.aput((*root(request), *asked.namespace), asked.key, asked.value, index=False)
    return Response(status_code=204)


@router.get("/items", response_model=Item | None)
async def get_item(request: Request, namespace: NamespaceQuery, key: KeyQuery, refresh_ttl: bool = False) -> Json:
    """Null where there is no such item. Items have no ttl, so `refresh_ttl` changes nothing."""
    item = await services(request).store.aget((*root(request), *namespace.split(".")), key)
    return Json(_describe(item) if item is not None else None)


@router.delete("/items", status_code=204)
async def delete_item(request: Request, asked: ItemDelete) -> Response:
    """Gone afterwards, whether or not it was there."""
    await services(request).store.adelete((*root(request), *asked.namespace), asked.key)
    services(request).quota.forget(owner(request))
    return Response(status_code=204)


@router.post("/items/search", response_model=Items, responses={429: {}})
async def search_items(request: Request, asked: ItemSearch) -> Response:
    """The items at or below a namespace, the one changed last first. An answer ends after some MiB: go on with `offset`."""

    async def described(reading: Reading) -> AsyncGenerator[bytes]:
        for offset in range(asked.offset, asked.offset + asked.limit, PAGE):
            limit = min(PAGE, asked.offset + asked.limit - offset)
            place = (*root(request), *asked.namespace_prefix)
            found: list[FoundItem] = await services(request).store.asearch(place, filter=asked.filter or None, limit=limit, offset=offset)
            for item in found:
                yield dump({**_describe(item), "score": item.score})
            if len(found) < limit:
                return

    return await listed(request, described, b'{"items":[%s]}')


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
