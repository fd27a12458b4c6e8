"""The tools there are at the moment: those that are built in or plugged in stay, those of MCP servers come and go."""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from agent.settings import SettingsError
from agent.tokens import count_text


class Toolbox:
    def __init__(self, tools: Sequence[BaseTool] = ()) -> None:
        self._fixed = list(tools)
        self._served: dict[str, list[BaseTool]] = {}
        seen: set[str] = set()
        for tool in self._fixed:
            if tool.name in seen:
                raise SettingsError(f"two tools are named {tool.name}")
            seen.add(tool.name)
        self._collect()

    def __iter__(self) -> Iterator[BaseTool]:
        return iter(self._tools)

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def names(self) -> list[str]:
        return [tool.name for tool in self._tools]

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """The tools as the model is told of them."""
        return self._descriptions

    def serve(self, server: str, tools: Sequence[BaseTool]) -> None:
        """Replace the tools of an MCP server."""
        self._served[server] = list(tools)
        self._collect()

    def _collect(self) -> None:
        # In an order that does not depend on which server answered first: the model's cache of the prompt needs it.
        self._tools = [*self._fixed, *(tool for name in sorted(self._served) for tool in self._served[name])]
        # Done once and not for every request: it costs as much as asking the model does.
        self._descriptions = [convert_to_openai_tool(tool) for tool in self._tools]
        self.tokens = count_text(orjson.dumps(self._descriptions).decode())
