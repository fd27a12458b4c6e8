"""Web search through a SearXNG server of the operator's choice. The model chooses the words, never the address."""

import asyncio
import json
from typing import Any

import httpx
from langchain_core.tools import BaseTool, StructuredTool, ToolException

from agent.http_client import create_client

MAX_QUERY_CHARACTERS = 400
MAX_RESULTS = 5
MAX_TITLE_CHARACTERS = 200
MAX_SNIPPET_CHARACTERS = 500
MAX_ANSWER_BYTES = 1 << 20
TIMEOUT = httpx.Timeout(10, connect=3)
TOTAL_SECONDS = 15  # httpx limits the wait for each piece, not the sum of a trickle


async def search(base_url: str, query: str) -> str:
    """Return the first results as text, or raise ToolException with a reason for the model."""
    query = " ".join(query.split())[:MAX_QUERY_CHARACTERS]
    if not query:
        raise ToolException("the query is empty")
    try:
        results = json.loads(await _fetch(base_url, query))["results"]
        found = [_describe(result) for result in results[:MAX_RESULTS]]
    except TimeoutError:
        raise ToolException("the search service did not answer in time") from None
    except httpx.HTTPError as error:
        reason = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        raise ToolException(f"the search service {reason}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ToolException("the search service gave an answer that cannot be read") from None
    return "\n\n".join(found) or "No results."


async def _fetch(base_url: str, query: str) -> bytes:
    body = bytearray()
    async with (
        asyncio.timeout(TOTAL_SECONDS),
        create_client(timeout=TIMEOUT) as client,
        client.stream("GET", f"{base_url}/search", params={"q": query, "format": "json"}) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise ToolException(f"the search service answered with status {response.status_code}")
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ToolException("the search service gave too long an answer")
    return bytes(body)


def _describe(result: dict[str, Any]) -> str:
    lines = (
        _line(result.get("title"), MAX_TITLE_CHARACTERS),
        _line(result.get("url"), MAX_SNIPPET_CHARACTERS),
        _line(result.get("content"), MAX_SNIPPET_CHARACTERS),
    )
    return "\n".join(line for line in lines if line)


def _line(value: object, limit: int) -> str:
    if not isinstance(value, str):
        return ""
    # A web page can hold NUL or half a surrogate pair, which can be neither stored nor sent.
    printable = "".join(character if character.isprintable() else " " for character in value)
    return " ".join(printable.split())[:limit]


def search_tool(base_url: str) -> BaseTool:
    async def web_search(query: str) -> str:
        return await search(base_url, query)

    return StructuredTool.from_function(
        coroutine=web_search,
        name="web_search",
        description="Search the web and get the titles, addresses and summaries of the first results.",
        handle_tool_error=True,
    )
