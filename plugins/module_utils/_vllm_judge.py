# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Asking a vLLM server, and judging it by what it does. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import AbstractHTTPHandler, ProxyHandler, Request, build_opener

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_api
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_api import ApiError


class UnixConnection(HTTPConnection):
    """HTTP over the Unix socket at the path `host`."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


class UnixHandler(AbstractHTTPHandler):
    """Opens addresses of the form unix://PATH-WITH-ESCAPED-SLASHES/path, as `unix_url` makes them."""

    unix_request = AbstractHTTPHandler.do_request_

    def unix_open(self, request: Request) -> HTTPResponse:
        return self.do_open(UnixConnection, request)


def unix_url(path: str) -> str:
    """Return the address of the server that listens on a Unix socket."""
    return f"unix://{quote(path, safe='')}"


# A server of the stack's own is not asked through a proxy for the world outside.
OPENER = build_opener(ProxyHandler({}), UnixHandler)

# The option `golden_prompts` of the modules that judge.
GOLDEN_PROMPTS: dict[str, Any] = {
    "type": "list",
    "elements": "dict",
    "default": [],
    "options": {
        "prompt": {"type": "str", "required": True},
        "expect": {"type": "str", "required": True},
        "max_tokens": {"type": "int", "default": 64, "no_log": False},
        "seconds": {"type": "float", "default": 0},
    },
}


def lines_of(url: str, timeout: float, body: bytes | None = None) -> Generator[bytes, None, None]:
    """Yield the lines of a 200 answer. Raises ApiError for any other, and for a server that does not answer in time, or trickles."""
    request = Request(url, data=body, headers={"Content-Type": "application/json"})
    deadline = time.monotonic() + timeout
    try:
        with OPENER.open(request, timeout=timeout) as response:
            for line in response:
                yield line
                if time.monotonic() > deadline:
                    raise ApiError(f"{url} did not finish its answer within {timeout:g} seconds")
            if response.length:
                raise ApiError(f"{url} cut its answer off, {response.length} bytes before its end")
    except HTTPError as error:
        raise ApiError(f"{url} answered {error.code}: {error.read(200)!r}") from error
    except (OSError, HTTPException) as error:
        raise ApiError(f"{url} cannot be reached: {error or type(error).__name__}") from error


def fetch(url: str, timeout: float, body: bytes | None = None) -> bytes:
    """Return the body of a 200 answer. Raises ApiError."""
    return b"".join(lines_of(url, timeout, body))


class Judge:
    """One judgement: the checks that passed, and the reasons of those that did not."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.url = params["url"].rstrip("/")
        self.result: dict[str, Any] = {"models": [], "completion_tokens": 0, "seconds": 0.0, "requests_running": -1}
        self.checks: dict[str, float] = {}
        self.reasons: list[str] = []

    def check(self, name: str, act: Callable[[], None]) -> bool:
        started = time.monotonic()
        try:
            act()
        except ApiError as error:
            self.reasons.append(str(error))
            return False
        self.checks[name] = round(time.monotonic() - started, 3)
        return True

    def judge(self) -> dict[str, Any]:
        """Return the module's result."""
        params = self.params
        if self.check("health", self.health) and self.check("model", self.model):
            if params["metrics_url"]:
                self.check("progress", self.progress)
            elif params["generate"]:
                self.check("generation", self.generation)
            # Once the engine is known to be stuck, every further request would only wait in it.
            if params["generate"] and params["tool_call"] and not self.reasons:
                self.check("tool_call", self.tool_call)
                self.check("streamed_tool_call", self.streamed_tool_call)
            for number, prompt in enumerate(params["golden_prompts"], start=1):
                if params["generate"] and not self.reasons:
                    self.check(f"golden_prompt_{number}", lambda prompt=prompt: self.golden_prompt(prompt))  # type: ignore[misc]
        return {"healthy": not self.reasons, "reason": (self.reasons or [""])[0], "reasons": self.reasons, "checks": self.checks, **self.result}

    def health(self) -> None:
        fetch(f"{self.url}/health", self.params["timeout"])

    def model(self) -> None:
        self.result["models"] = _vllm_api.served_models(fetch(f"{self.url}/v1/models", self.params["timeout"]))
        if self.params["model"] not in self.result["models"]:
            raise ApiError(f"/v1/models names {', '.join(self.result['models']) or 'nothing'}, not {self.params['model']}")

    def generation(self) -> None:
        started = time.monotonic()
        body = self.chat(_vllm_api.chat_request(self.params["model"], self.params["max_tokens"]))
        self.result["completion_tokens"] = _vllm_api.completion_tokens(body)
        self.result["seconds"] = round(time.monotonic() - started, 3)

    def chat(self, body: bytes) -> bytes:
        return fetch(f"{self.url}/v1/chat/completions", self.params["timeout"], body)

    def tool_call(self) -> None:
        _vllm_api.tool_call(self.chat(self.tool_request(stream=False)))

    def streamed_tool_call(self) -> None:
        with closing(lines_of(f"{self.url}/v1/chat/completions", self.params["timeout"], self.tool_request(stream=True))) as lines:
            _vllm_api.streamed_tool_call(lines)

    def golden_prompt(self, prompt: dict[str, Any]) -> None:
        """Ask the user's own question, and look for the user's own answer in it."""
        started = time.monotonic()
        body = self.chat(_vllm_api.golden_request(self.params["model"], prompt["prompt"], prompt["max_tokens"]))
        _vllm_api.golden_answer(body, prompt["prompt"], prompt["expect"])
        seconds = time.monotonic() - started
        if prompt["seconds"] and seconds > prompt["seconds"]:
            raise ApiError(f"the answer to {prompt['prompt'][:80]!r} took {seconds:.1f} seconds; allowed are {prompt['seconds']:g}")

    def tool_request(self, *, stream: bool) -> bytes:
        body: bytes = _vllm_api.tool_request(self.params["model"], self.params["tool_prompt"], self.params["tool_max_tokens"], stream=stream)
        return body

    def progress(self) -> None:
        """With a generation the engine must have moved; without one, only if it had requests all the time."""
        before = self.measure()
        if self.params["generate"]:
            self.generation()
            self.checks["generation"] = self.result["seconds"]
        deadline = time.monotonic() + self.params["progress_seconds"]
        while True:
            now = self.measure()
            idle = not self.params["generate"] and (before.running == 0 or now.running == 0)
            if now.moved_since(before) or idle:
                return
            if time.monotonic() > deadline:
                waited = f"{self.params['progress_seconds']:g} seconds"
                if self.params["generate"]:
                    raise ApiError(f"the engine answered, and vllm:iteration_tokens_total did not move within {waited}")
                raise ApiError(f"the engine is stuck: {now.running:.0f} requests run, and vllm:iteration_tokens_total did not move for {waited}")
            time.sleep(0.2)

    def measure(self) -> _vllm_api.Progress:
        measured = _vllm_api.progress(fetch(self.params["metrics_url"], self.params["timeout"]))
        self.result["requests_running"] = int(measured.running)
        return measured
