"""Tools of MCP servers, over streamable HTTP. Where one is away, its tools are missing."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from langchain_core.tools import BaseTool
from langchain_mcp_adapters.client import MultiServerMCPClient
from prometheus_client import CollectorRegistry, Counter, Gauge

from agent.http_client import create_client
from agent.metrics import gauge
from agent.tools.plugins import TOOL_NAME
from agent.tools.toolbox import Toolbox

logger = logging.getLogger(__name__)

LIST_SECONDS = 5
FIRST_RETRY_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 60.0
REFRESH_SECONDS = 300.0
MAX_TOOLS = 64  # of one server: each costs a part of every prompt


class McpServers:
    """Keeps a toolbox filled with what the servers offer. Use as a context manager."""

    def __init__(
        self,
        servers: Mapping[str, str],
        toolbox: Toolbox,
        registry: CollectorRegistry,
        *,
        call_seconds: float,
        refresh_seconds: float = REFRESH_SECONDS,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        self._toolbox = toolbox
        self._refresh_seconds = refresh_seconds
        self._first_retry_seconds = first_retry_seconds
        self._client = MultiServerMCPClient(
            {
                name: {
                    "transport": "streamable_http",
                    "url": url,
                    "timeout": call_seconds,
                    "sse_read_timeout": call_seconds,
                    "httpx_client_factory": create_client,
                }
                for name, url in servers.items()
            },
            tool_name_prefix=True,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._up = Gauge(
            "agent_mcp_server_up",
            "1 if the last listing of its tools succeeded",
            ("server",),
            **gauge("mostrecent"),
            registry=registry,
        )
        self._failures = Counter("agent_mcp_failures", "Failed listings of an MCP server's tools", ("server",), registry=registry)

    async def __aenter__(self) -> None:
        listed = [asyncio.Event() for _ in self._client.connections]
        self._tasks = [asyncio.create_task(self._follow(name, event.set)) for name, event in zip(self._client.connections, listed, strict=True)]
        # Servers that answer are there from the first request on.
        await asyncio.gather(*(event.wait() for event in listed))

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, server: str, listed: Callable[[], None]) -> None:
        retry_seconds = self._first_retry_seconds
        while True:
            ok = await self._list(server)
            listed()
            retry_seconds = self._first_retry_seconds if ok else min(retry_seconds * 2, LONGEST_RETRY_SECONDS)
            await asyncio.sleep(self._refresh_seconds if ok else retry_seconds)

    async def _list(self, server: str) -> bool:
        try:
            async with asyncio.timeout(LIST_SECONDS):
                tools = await self._client.get_tools(server_name=server)
        except Exception as error:
            self._up.labels(server).set(0)
            self._failures.labels(server).inc()
            # The tools it offered before stay: calling one tells the model what is wrong, and it may be back by then.
            logger.warning("an MCP server cannot be asked", extra={"server": server, "error": _reason(error)})
            return False
        self._up.labels(server).set(1)
        self._toolbox.serve(server, [tool for tool in tools if _usable(server, tool)][:MAX_TOOLS])
        return True


def _usable(server: str, tool: BaseTool) -> bool:
    if TOOL_NAME.fullmatch(tool.name):
        return True
    logger.warning("an MCP server's tool has a name that no model takes", extra={"server": server})
    return False


def _reason(error: BaseException) -> str:
    """The SDK wraps what happened into groups of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return type(error).__name__
