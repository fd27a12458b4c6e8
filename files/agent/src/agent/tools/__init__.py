"""What the agent can do besides talking."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase

from langchain_core.tools import BaseTool
from prometheus_client import CollectorRegistry

from agent.settings import Settings, SettingsError
from agent.tools.calculator import calculator_tool
from agent.tools.clock import clock_tool
from agent.tools.fetch import fetch_tool
from agent.tools.memory import memory_tools
from agent.tools.plugins import load_plugins
from agent.tools.search import search_tool
from agent.tools.toolbox import Toolbox


def create_tools(settings: Settings) -> Toolbox:
    """The tools that are in this process. Raises SettingsError for a plug-in that cannot be used."""
    if not settings.tools_enabled:
        return Toolbox()
    tools: list[BaseTool] = [calculator_tool(), clock_tool()]
    if settings.searxng_url:
        tools.append(search_tool(settings.searxng_url))
    if settings.fetch_allow:
        tools.append(fetch_tool(settings.fetch_allow))
    if settings.memory_enabled:
        tools += memory_tools()
    tools += load_plugins(settings.tools_dir, settings.tools)
    toolbox = Toolbox(tools)
    _check_approval(settings, toolbox)
    return toolbox


@asynccontextmanager
async def serve_tools(settings: Settings, toolbox: Toolbox, registry: CollectorRegistry) -> AsyncIterator[None]:
    """Keep the toolbox filled with the tools of the MCP servers, as long as they and this context last."""
    if not (settings.tools_enabled and settings.mcp_servers):
        yield
        return
    # Costs half a second of start and some memory, for those who use it.
    from agent.tools.mcp import McpServers

    async with McpServers(settings.mcp_servers, toolbox, registry, call_seconds=settings.tool_timeout_seconds):
        yield


def _check_approval(settings: Settings, toolbox: Toolbox) -> None:
    """A misspelt name here would let a tool run that nobody allowed."""
    for pattern in settings.tools_approval:
        known = any(fnmatchcase(name, pattern) for name in toolbox.names)
        if not known and not any(fnmatchcase(pattern, f"{server}_*") for server in settings.mcp_servers):
            raise SettingsError(f"AGENT_TOOLS_APPROVAL: no tool is named {pattern}")
