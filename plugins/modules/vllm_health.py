#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# Apache-2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Module: does a vLLM server serve this model, and does it generate and call tools?"""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_health
short_description: Judge a vLLM server by what it does
version_added: 0.1.0
description:
  - Asks C(GET /health), then C(GET /v1/models) whether the model is served, then C(POST /v1/chat/completions) for a few tokens, and where that is wanted for a
    tool call, plain and streamed, and C(GET /metrics) whether the engine moves. The server's own C(/health) also says yes when the engine behind it is stuck.
  - A server that is not healthy is an answer, not a failure. Use C(until) to wait for one.
options:
  url:
    description: Base URL of the server or its gateway, without C(/v1).
    type: str
    required: true
  model:
    description: Name that must be served.
    type: str
    required: true
  max_tokens:
    description: Most tokens to generate.
    type: int
    default: 4
  timeout:
    description: Time for each request, from its start to its last byte, in seconds.
    type: int
    default: 30
  generate:
    description: Whether to ask for a generation. Without, the server is only watched, which costs a busy one nothing.
    type: bool
    default: true
  tool_call:
    description: Whether the model must call a tool, in a plain and in a streamed answer. Ask for it where a tool call parser is configured.
    type: bool
    default: false
  tool_prompt:
    description: What to say so that the model calls a tool. The tool offered is C(report_number). Empty means a sentence that asks for it.
    type: str
    default: ""
  tool_max_tokens:
    description: Most tokens to generate for a tool call. A model that thinks first needs many.
    type: int
    default: 1024
  metrics_url:
    description:
      - URL of the server's metrics. Then C(vllm:iteration_tokens_total) must move with the generation, or with O(generate=false) within O(progress_seconds) as
        long as requests run. Empty means that it is not asked.
    type: str
    default: ""
  progress_seconds:
    description: How long to wait for the engine to move.
    type: float
    default: 5
attributes:
  check_mode:
    description: The module only reads.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Wait until the model generates
  selfhosted.agent_stack.vllm_health:
    url: http://127.0.0.1:8000
    model: agent-model
  register: health
  until: health.healthy
  retries: 30
  delay: 10

- name: Judge a new model before it takes over
  selfhosted.agent_stack.vllm_health:
    url: http://172.18.0.5:8000
    model: agent-model
    tool_call: true
    metrics_url: http://172.18.0.5:8000/metrics

- name: Is the engine stuck with requests in it
  selfhosted.agent_stack.vllm_health:
    url: http://172.18.0.5:8000
    model: agent-model
    generate: false
    metrics_url: http://172.18.0.5:8000/metrics
    progress_seconds: 30
"""

RETURN = r"""
healthy:
  description: Whether every check that was asked for passed.
  returned: success
  type: bool
  sample: true
reason:
  description: The first reason why not. Empty if it is healthy.
  returned: success
  type: str
  sample: "/v1/models names other-model, not agent-model"
reasons:
  description: All reasons. A server that is down, or does not serve the model, is not asked further.
  returned: success
  type: list
  elements: str
  sample: []
checks:
  description: Seconds that each check took that passed, in order - C(health), C(model), C(generation), C(tool_call), C(streamed_tool_call), C(progress).
  returned: success
  type: dict
  sample: {health: 0.002, model: 0.003, generation: 0.21}
models:
  description: The served names, as far as the server said.
  returned: success
  type: list
  elements: str
  sample: ["agent-model"]
completion_tokens:
  description: Tokens that were generated.
  returned: success
  type: int
  sample: 4
seconds:
  description: How long the generation took, in seconds.
  returned: success
  type: float
  sample: 0.21
requests_running:
  description: Requests that the engine worked on when it was last asked. -1 if it was not.
  returned: success
  type: int
  sample: 0
"""

import time  # noqa: E402
from collections.abc import Callable, Generator  # noqa: E402
from contextlib import closing  # noqa: E402
from http.client import HTTPException  # noqa: E402
from typing import Any  # noqa: E402
from urllib.error import HTTPError  # noqa: E402
from urllib.request import Request, urlopen  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_api  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_api import ApiError  # noqa: E402


def lines_of(url: str, timeout: float, body: bytes | None = None) -> Generator[bytes, None, None]:
    """Yield the lines of a 200 answer. Raises ApiError for any other, and for a server that does not answer in time, or trickles."""
    request = Request(url, data=body, headers={"Content-Type": "application/json"})
    deadline = time.monotonic() + timeout
    try:
        with urlopen(request, timeout=timeout) as response:
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


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "model": {"type": "str", "required": True},
            "max_tokens": {"type": "int", "default": 4},
            "timeout": {"type": "int", "default": 30},
            "generate": {"type": "bool", "default": True},
            "tool_call": {"type": "bool", "default": False},
            "tool_prompt": {"type": "str", "default": ""},
            "tool_max_tokens": {"type": "int", "default": 1024},
            "metrics_url": {"type": "str", "default": ""},
            "progress_seconds": {"type": "float", "default": 5},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **Judge(module.params).judge())


if __name__ == "__main__":
    main()
