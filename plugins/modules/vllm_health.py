#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# Apache-2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Module: does a vLLM server serve this model, and does it generate?"""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_health
short_description: Ask a vLLM server for its models and for one real generation
version_added: 0.1.0
description:
  - Asks C(GET /v1/models) whether the model is served, and then C(POST /v1/chat/completions) for a few tokens.
    The server's own C(/health) also says yes when the engine behind it is stuck.
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
    description: Time for each of the two requests, in seconds.
    type: int
    default: 30
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
"""

RETURN = r"""
healthy:
  description: Whether the model is served and generated at least one token.
  returned: success
  type: bool
  sample: true
reason:
  description: Why not. Empty if it is healthy.
  returned: success
  type: str
  sample: "/v1/models names other-model, not agent-model"
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
"""

import time  # noqa: E402
from typing import Any  # noqa: E402
from urllib.error import HTTPError, URLError  # noqa: E402
from urllib.request import Request, urlopen  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_api  # noqa: E402


def fetch(url: str, timeout: int, body: bytes | None = None) -> bytes:
    """Return the body of a 200 answer. Raises ApiError for any other, and for a server that cannot be reached in time."""
    request = Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=timeout) as response:
            return bytes(response.read())
    except HTTPError as error:
        raise _vllm_api.ApiError(f"{url} answered {error.code}: {error.read(200)!r}") from error
    except (URLError, OSError) as error:
        raise _vllm_api.ApiError(f"{url} cannot be reached: {error}") from error


def judge(url: str, model: str, max_tokens: int, timeout: int) -> dict[str, Any]:
    """Return the module's result."""
    result: dict[str, Any] = {"healthy": False, "reason": "", "models": [], "completion_tokens": 0, "seconds": 0.0}
    try:
        result["models"] = _vllm_api.served_models(fetch(f"{url}/v1/models", timeout))
        if model not in result["models"]:
            raise _vllm_api.ApiError(f"/v1/models names {', '.join(result['models']) or 'nothing'}, not {model}")
        started = time.monotonic()
        body = fetch(f"{url}/v1/chat/completions", timeout, _vllm_api.chat_request(model, max_tokens))
        result["completion_tokens"] = _vllm_api.completion_tokens(body)
        result["seconds"] = round(time.monotonic() - started, 3)
        result["healthy"] = True
    except _vllm_api.ApiError as error:
        result["reason"] = str(error)
    return result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "model": {"type": "str", "required": True},
            "max_tokens": {"type": "int", "default": 4},
            "timeout": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **judge(**module.params))


if __name__ == "__main__":
    main()
