"""What the agent can do besides talking."""

from langchain_core.tools import BaseTool

from agent.settings import Settings
from agent.tools.calculator import calculator_tool
from agent.tools.search import search_tool


def create_tools(settings: Settings) -> list[BaseTool]:
    if not settings.tools_enabled:
        return []
    tools = [calculator_tool()]
    if settings.searxng_url:
        tools.append(search_tool(settings.searxng_url))
    return tools
