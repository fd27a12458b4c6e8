"""An MCP server of the tests': mcp_server.py PORT [SECOND_TOOL]"""

import sys
import time

from mcp.server.fastmcp import FastMCP
from mcp.server.fastmcp.exceptions import ToolError
from mcp.types import ToolAnnotations

server = FastMCP("tests", host="127.0.0.1", port=int(sys.argv[1]), log_level="ERROR", stateless_http=True)


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def fail(how: str) -> str:
    """Fail."""
    if how == "slow":
        time.sleep(30)
    if how == "long":
        return "x" * 100_000
    raise ToolError(f"failed: {how}")


if len(sys.argv) > 2:
    server.add_tool(lambda: "new", name=sys.argv[2], description="A tool that came later.")

server.run(transport="streamable-http")
