#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
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
extends_documentation_fragment: selfhosted.agent_stack.golden_prompts
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

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_judge import GOLDEN_PROMPTS, Judge  # noqa: E402


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "model": {"type": "str", "required": True},
            "max_tokens": {"type": "int", "default": 4, "no_log": False},
            "timeout": {"type": "int", "default": 30},
            "generate": {"type": "bool", "default": True},
            "tool_call": {"type": "bool", "default": False},
            "tool_prompt": {"type": "str", "default": ""},
            "tool_max_tokens": {"type": "int", "default": 1024, "no_log": False},
            "golden_prompts": GOLDEN_PROMPTS,
            "metrics_url": {"type": "str", "default": ""},
            "progress_seconds": {"type": "float", "default": 5},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **Judge(module.params).judge())


if __name__ == "__main__":
    main()
