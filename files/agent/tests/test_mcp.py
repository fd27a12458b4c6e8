"""Tools of MCP servers: there when the server is, missing when it is not, and never the service's end."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agent.settings import Settings, SettingsError
from agent.tools import create_tools, serve_tools
from agent.tools.mcp import McpServers
from agent.tools.toolbox import Toolbox
from graphs import RUNNER, Graph, secret_files, settings
from servers import McpServer, Model, free_port


@pytest.fixture(scope="module")
def process() -> Iterator[McpServer]:
    server = McpServer()
    server.start()
    yield server
    server.remove()


@pytest.fixture
def server(process: McpServer) -> McpServer:
    """As it was at the start, whatever the test before has done to it."""
    if process.more or process.process is None:
        process.stop()
        process.more.clear()
        process.start()
    return process


def call(name: str, **arguments: Any) -> str:
    return f"[[tool {name} {json.dumps(arguments)}]]"


def use(servers: dict[str, str], test: Callable[[Toolbox, CollectorRegistry], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        toolbox, registry = create_tools(settings()), CollectorRegistry()
        async with McpServers(servers, toolbox, registry, **{"call_seconds": 2, **options}):
            await test(toolbox, registry)

    RUNNER.run(main())


async def until(true: Callable[[], bool], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110  what is waited for happens in another process
            await asyncio.sleep(0.05)


def test_its_tools_are_there_from_the_start(server: McpServer, model: Model) -> None:
    async def test(toolbox: Toolbox, registry: CollectorRegistry) -> None:
        assert toolbox.names == ["calculator", "current_time", "files_add", "files_fail"]
        outcome = await Graph(model, toolbox).asay(call("files_add", a=2, b=3))
        assert outcome.answer == "The tool says: 5"
        assert [tool["function"]["name"] for tool in model.requests()[-1]["tools"]] == toolbox.names
        assert outcome.results[0].artifact is None
        assert registry.get_sample_value("agent_mcp_server_up", {"server": "files"}) == 1

    use({"files": server.url}, test)


@pytest.mark.parametrize(
    ("script", "result"),
    [
        (call("files_add", a="many", b=3), "The arguments do not fit."),
        (call("files_add", a=1), "The arguments do not fit."),
        (call("files_add", a=1, b=2, c=3), "There is no argument c."),
        (call("files_add", a=1, b=2, runtime={}), "There is no argument runtime."),
        (call("files_fail", how="canary"), "failed: canary"),
        (call("files_fail", how="long"), "[cut here: "),
        (call("files_fail", how="slow"), "did not finish within 1 seconds"),
        (call("add", a=1, b=2), "is not a valid tool"),
    ],
)
def test_failures_are_told_to_the_model(server: McpServer, model: Model, script: str, result: str) -> None:
    async def test(toolbox: Toolbox, registry: CollectorRegistry) -> None:
        outcome = await Graph(model, toolbox, tool_timeout_seconds=1).asay(script)
        assert result in outcome.results[0].text
        assert len(outcome.results[0].text) < 13_000
        assert outcome.answer.startswith("The tool says: ")

    use({"files": server.url}, test)


def test_a_server_that_is_away_at_the_start(server: McpServer, model: Model) -> None:
    server.stop()

    async def test(toolbox: Toolbox, registry: CollectorRegistry) -> None:
        assert toolbox.names == ["calculator", "current_time"]
        assert registry.get_sample_value("agent_mcp_server_up", {"server": "files"}) == 0
        assert registry.get_sample_value("agent_mcp_failures_total", {"server": "files"}) >= 1
        graph = Graph(model, toolbox)
        assert "calculator" in (await graph.asay(call("files_add", a=1, b=2))).answer
        await asyncio.to_thread(server.start)
        await until(lambda: "files_add" in toolbox.names)
        assert (await graph.asay(call("files_add", a=1, b=2))).answer == "The tool says: 3"
        assert registry.get_sample_value("agent_mcp_server_up", {"server": "files"}) == 1

    use({"files": server.url}, test, first_retry_seconds=0.2)


def test_a_server_that_goes_away_and_comes_back_with_more(server: McpServer, model: Model) -> None:
    async def test(toolbox: Toolbox, registry: CollectorRegistry) -> None:
        graph = Graph(model, toolbox)
        server.stop()
        result = (await graph.asay(call("files_add", a=1, b=2))).results[-1]
        assert (result.text, result.status) == ("The tool failed.", "error")
        await until(lambda: registry.get_sample_value("agent_mcp_server_up", {"server": "files"}) == 0)
        server.more.append("later")
        await asyncio.to_thread(server.start)
        await until(lambda: "files_later" in toolbox.names)
        assert (await graph.asay(call("files_later"))).answer == "The tool says: new"
        assert (await graph.asay(call("files_add", a=1, b=2))).answer == "The tool says: 3"

    use({"files": server.url}, test, first_retry_seconds=0.2, refresh_seconds=0.2)


def test_one_server_does_not_delay_the_other(server: McpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.tools.mcp.LIST_SECONDS", 1)

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)

    async def main() -> None:
        hanging = await asyncio.start_server(never, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{hanging.sockets[0].getsockname()[1]}/mcp"
        toolbox = Toolbox()
        async with asyncio.timeout(5):
            servers = {"hangs": url, "gone": f"http://127.0.0.1:{free_port()}/mcp", "files": server.url}
            async with McpServers(servers, toolbox, CollectorRegistry(), call_seconds=2):
                assert toolbox.names == ["files_add", "files_fail"]
        hanging.close()

    RUNNER.run(main())


def test_prefixes_keep_servers_apart_and_in_order(server: McpServer) -> None:
    async def test(toolbox: Toolbox, registry: CollectorRegistry) -> None:
        assert toolbox.names[2:] == ["a_add", "a_fail", "b_add", "b_fail"]

    use({"b": server.url, "a": server.url}, test)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_settings_decide(server: McpServer, enabled: bool) -> None:
    async def main() -> list[str]:
        chosen = settings(tools_enabled=enabled, mcp_servers={"files": server.url})
        toolbox = create_tools(chosen)
        async with serve_tools(chosen, toolbox, CollectorRegistry()):
            return toolbox.names

    assert ("files_add" in RUNNER.run(main())) is enabled


@pytest.mark.parametrize(
    "value",
    [
        "files",
        "[]",
        '["http://x"]',
        '{"files": 7}',
        '{"files": "ftp://x"}',
        '{"Files": "http://x"}',
        '{"a_b": "http://x"}',
        '{"": "http://x"}',
        '{"files": "http://user:pass@x/mcp"}',
        "{",
    ],
)
def test_bad_settings_are_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "secret").write_text("x")
    environ = secret_files(tmp_path / "secret")
    with pytest.raises(SettingsError, match="AGENT_MCP_SERVERS=") as error:
        Settings.from_environment(environ | {"AGENT_MCP_SERVERS": value})
    assert "a JSON object" in str(error.value)
    good = Settings.from_environment(environ | {"AGENT_MCP_SERVERS": '{"files": "http://files:8000/mcp"}'})
    assert good.mcp_servers == {"files": "http://files:8000/mcp"}
    assert Settings.from_environment(environ | {"AGENT_MCP_SERVERS": ""}).mcp_servers == {}
