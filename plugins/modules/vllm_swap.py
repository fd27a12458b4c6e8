#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: have a model serve in place of another, with no request lost."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_swap
short_description: Change the model that serves, with no request lost
version_added: 0.2.0
description:
  - One operation that can be repeated, and that only one run at a time does. It starts the new model in the slot that does not serve, judges it as
    M(selfhosted.agent_stack.vllm_health) does, sends new requests to it, lets the old one finish what it has, and keeps that for a rollback.
  - A new model that does not start, or is judged unfit, never meets a user. What served before serves on, and the module fails with the reason and
    the engine's first error, or the server's last log lines. The same holds for a run that was killed, once the module is run again.
  - Where both models do not fit beside each other, the gateway holds requests while one gives its memory to the other.
  - The work is done by a process of its own on the host, which a lost connection does not end. What it does is shown while it runs.
extends_documentation_fragment: selfhosted.agent_stack.golden_prompts
options:
  state:
    description:
      - V(present) has O(definition) serve. V(rolled_back) has the model serve that served before. V(pruned) removes the model that waits for a rollback.
        V(prepared) writes O(servers), and V(status) only tells what is there.
    type: str
    choices: [present, rolled_back, pruned, prepared, status]
    default: present
  root:
    description: Directory of the Compose projects.
    type: path
    default: /opt/agent-stack
  data:
    description: Directory of what is kept between runs.
    type: path
    default: /var/lib/agent-stack
  model:
    description: What to call the model in sentences. Needed for O(state=present).
    type: str
    default: ""
  definition:
    description: Compose service of the server, with C(image) and C(command). Another definition is another model. Needed for O(state=present).
    type: dict
  servers:
    description:
      - The part of the gateway's configuration that names its servers. Needed for O(state=prepared), which keeps in it what serves, and fails if another
        run is under way.
    type: str
    default: ""
  configuration:
    description:
      - The rest of the gateway's configuration. It is not written, but with O(state=prepared) HAProxy checks it together with O(servers) before those are, if
        one of them is new. Not in check mode.
    type: str
    default: ""
  gateway_image:
    description: Image of the gateway, which must be on the host. Needed for O(configuration).
    type: str
    default: ""
  served_name:
    description: Name under which the model is served.
    type: str
    default: agent-model
  strategy:
    description: How both models share the memory. M(selfhosted.agent_stack.vllm_plan) returns it as C(swap.strategy).
    type: str
    choices: [start, side_by_side, sleep, hold_and_recreate]
    default: side_by_side
  gpu_memory_utilization:
    description: Share of the memory in O(definition). It is only written down.
    type: float
    default: 0
  side_by_side_utilization:
    description: Value of C(--gpu-memory-utilization) with O(strategy=side_by_side). 0 leaves the one in O(definition).
    type: float
    default: 0
  weights_mib:
    description: Size of the weights, in MiB. It is only written down.
    type: int
    default: 0
  sleep_mode:
    description: Whether the servers are started with C(--enable-sleep-mode) and C(VLLM_SERVER_DEV_MODE=1).
    type: bool
    default: false
  start_seconds:
    description: How long a model may take until it answers, in seconds.
    type: int
    default: 900
  drain_seconds:
    description: How long to wait for running requests where both models cannot run at once. When it is over, the swap is called off.
    type: int
    default: 120
  hold_seconds:
    description: How long the gateway holds requests. A new model that would take longer is given up in time for the old one to answer them.
    type: int
    default: 300
  gpu:
    description: Whether the servers need a GPU, which is then looked for before requests are held.
    type: bool
    default: false
  timeout:
    description: Time for each request of the judgement, in seconds.
    type: int
    default: 60
  tool_call:
    description: Whether the new model must call a tool, in a plain and in a streamed answer.
    type: bool
    default: false
  tool_prompt:
    description: What to say so that the model calls the tool C(report_number). Empty means a sentence that asks for it.
    type: str
    default: ""
  at_once:
    description: Do only what takes no time, and tell with RV(pending) whether there is more. Used by the action plugin.
    type: bool
    default: false
attributes:
  check_mode:
    description: Tells whether something would change.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Have a model serve
  selfhosted.agent_stack.vllm_swap:
    model: Qwen/Qwen3-8B
    definition: "{{ lookup('selfhosted.agent_stack.vllm_service', plan, image='docker.io/vllm/vllm-openai:v0.33.0').definition }}"
    strategy: "{{ plan.swap.strategy }}"
    golden_prompts:
      - {prompt: "What is 2 + 2? Answer with the number.", expect: "4"}

- name: Go back to the one before
  selfhosted.agent_stack.vllm_swap:
    state: rolled_back
"""

RETURN = r"""
active:
  description: The slot that serves, V(blue) or V(green). Empty if none does.
  returned: success
  type: str
  sample: blue
slots:
  description:
    - What is in each slot - C(model), C(condition), C(digest), C(utilization), C(weights_mib), C(sleep_mode), C(slept_before), C(load_seconds), C(since).
    - C(cache) is the directory of what the server compiles, and C(port) where other hosts that share the model meet this one, 0 if there are none.
    - Both are null if an older version started the model.
  returned: success
  type: dict
  sample: {blue: {model: Qwen/Qwen3-8B, condition: serving}}
strategy:
  description: How the two slots share the memory.
  returned: success
  type: str
  sample: sleep
held:
  description: Most requests that were held at one time.
  returned: when something was done
  type: int
  sample: 12
held_seconds:
  description: How long requests were held, in seconds.
  returned: when something was done
  type: float
  sample: 11.2
failed_requests:
  description: Requests that the gateway answered with a 5xx meanwhile.
  returned: when something was done
  type: int
  sample: 0
phases:
  description: What was done, in order - C(phase), C(seconds).
  returned: when something was done
  type: list
  elements: dict
  sample: [{phase: start, seconds: 0.6}, {phase: load, seconds: 61.2}, {phase: judge, seconds: 2.1}, {phase: flip, seconds: 0.1}]
pending:
  description: Whether there is more to do than O(at_once) allows.
  returned: with O(at_once=true)
  type: bool
  sample: false
progress:
  description: Where the run is that is under way, or was last.
  returned: with O(state=status)
  type: dict
  sample: {phase: load, seconds: 12.3, held: 3, failed: 0}
"""

import contextlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_host, _vllm_swap  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_judge import GOLDEN_PROMPTS  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_swap import State, SwapError, Traffic  # noqa: E402


class Progress:
    """Writes down which phase the run is in, for those who watch."""

    def __init__(self, paths: _vllm_host.Paths) -> None:
        self.path = paths.progress
        self.phases: list[dict[str, Any]] = []
        self.failed_before: int | None = None
        self.failed = 0
        self._started = self._written = 0.0

    def tell(self, phase: str, traffic: Traffic) -> None:
        now = time.monotonic()
        if self.failed_before is None or traffic.failed < self.failed_before:
            # The gateway counts from its start.
            self.failed_before = traffic.failed
        self.failed = traffic.failed - self.failed_before
        new = not self.phases or self.phases[-1]["phase"] != phase
        if new:
            self.end()
            self.phases.append({"phase": phase, "seconds": 0.0})
            self._started = now
        elif now - self._written < 0.5:
            return
        self._written = now
        current = {"phase": phase, "seconds": round(now - self._started, 1), "held": traffic.held, "failed": self.failed}
        # A full disk is no reason to stop half way.
        with contextlib.suppress(OSError):
            _vllm_host.write(self.path, json.dumps({"current": current, "phases": self.phases}) + "\n")

    def end(self) -> None:
        if self.phases:
            self.phases[-1]["seconds"] = round(time.monotonic() - self._started, 1)


def status(paths: _vllm_host.Paths, host: _vllm_host.DockerHost) -> dict[str, Any]:
    """Return what is written down. Raises SwapError."""
    state = _vllm_host.read_state(paths)
    try:
        progress = json.loads(paths.progress.read_text())
    except (FileNotFoundError, ValueError):
        progress = {}
    return {**described(state, host), "progress": progress}


def described(state: State, host: _vllm_host.DockerHost) -> dict[str, Any]:
    slots = {name: asdict(slot) | {"slept_before": bool(slot.slept) and slot.slept == host.born(name)} for name, slot in state.slots.items()}
    return {"active": state.active, "strategy": state.strategy, "slots": slots}


def wish_of(params: dict[str, Any]) -> _vllm_swap.Wish:
    """Raises SwapError."""
    definition = params["definition"]
    if not params["model"] or not definition or not definition.get("image") or not isinstance(definition.get("command"), list):
        raise SwapError("state=present needs a model, and a definition with image and command")
    for prompt in params["golden_prompts"]:
        try:
            re.compile(prompt["expect"])
        except re.error as error:
            raise SwapError(f"golden_prompts expects {prompt['expect']!r}, which is no regular expression: {error}") from error
    return _vllm_swap.Wish(
        model=params["model"],
        definition=definition,
        strategy="side_by_side" if params["strategy"] == "start" else params["strategy"],
        weights_mib=params["weights_mib"],
        utilization=params["gpu_memory_utilization"],
        beside_utilization=params["side_by_side_utilization"],
        sleep_mode=params["sleep_mode"],
    )


def is_pending(host: _vllm_swap.Host, state: State, params: dict[str, Any]) -> bool:
    """Whether there is something to do that takes time. Raises SwapError."""
    if params["state"] != "present":
        if params["state"] == "rolled_back" and not state.standby:
            raise SwapError("there is nothing to roll back to: only one model is there")
        return bool(state.target or state.standby)
    wish = wish_of(params)
    if state.target or not state.active or state.slots[state.active].digest != wish.digest:
        return True
    return host.status(state.active) != "running" or not host.ready(state.active) or host.asleep(state.active)


def act(paths: _vllm_host.Paths, params: dict[str, Any], *, check_mode: bool) -> dict[str, Any]:
    """Return the module's result. Raises SwapError."""
    judging = {key: params[key] for key in ("timeout", "tool_call", "tool_prompt", "golden_prompts")}
    host = _vllm_host.DockerHost(paths, params["served_name"], judging, gpu=params["gpu"])
    if params["state"] == "status":
        return {"changed": False, **status(paths, host)}
    if params["state"] == "prepared":
        return prepare(paths, params, check_mode=check_mode)
    if check_mode:
        state = _vllm_host.read_state(paths)
        pending = is_pending(host, state, params)
        return {"changed": pending, "pending": pending, **described(state, host)}
    with _vllm_host.locked(paths, f"{params['state']} {params['model']}".strip()):
        state = _vllm_host.read_state(paths)
        if params["at_once"] and is_pending(host, state, params):
            paths.progress.unlink(missing_ok=True)
            return {"changed": True, "pending": True, **described(state, host)}
        paths.progress.unlink(missing_ok=True)
        progress = Progress(paths)
        limits = _vllm_swap.Limits(params["start_seconds"], params["drain_seconds"], params["hold_seconds"])
        swap = _vllm_swap.Swap(host, state, limits, progress.tell)
        try:
            if params["state"] == "present":
                swap.present(wish_of(params))
            elif params["state"] == "rolled_back":
                swap.rollback()
            else:
                swap.prune()
            host.remove_unused_caches(state)
        finally:
            progress.end()
        done = {"held": swap.held, "held_seconds": round(swap.held_seconds, 2), "failed_requests": progress.failed, "phases": progress.phases}
        return {"changed": swap.changed, "pending": False, **described(state, host), **(done if swap.changed else {})}


def prepare(paths: _vllm_host.Paths, params: dict[str, Any], *, check_mode: bool) -> dict[str, Any]:
    """Write the gateway's servers such that what served before does so still. Raises SwapError."""
    gateway = _vllm_host.Gateway(paths)
    servers, configuration = params["servers"], params["configuration"]
    if check_mode:
        return {"changed": gateway.keep(gateway.kept(), servers, dry=True)}
    with _vllm_host.locked(paths, "prepared"):
        present = paths.gateway.read_text() if paths.gateway.exists() else ""
        if configuration and (configuration != present or gateway.keep(gateway.kept(), servers, dry=True)):
            _vllm_host.check_gateway(configuration, servers, paths, params["gateway_image"])
        return {"changed": gateway.keep(gateway.kept(), servers)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "rolled_back", "pruned", "prepared", "status"], "default": "present"},
            "root": {"type": "path", "default": "/opt/agent-stack"},
            "data": {"type": "path", "default": "/var/lib/agent-stack"},
            "model": {"type": "str", "default": ""},
            "definition": {"type": "dict"},
            "servers": {"type": "str", "default": ""},
            "configuration": {"type": "str", "default": ""},
            "gateway_image": {"type": "str", "default": ""},
            "served_name": {"type": "str", "default": "agent-model"},
            "strategy": {"type": "str", "choices": ["start", *_vllm_swap.STRATEGIES], "default": "side_by_side"},
            "gpu_memory_utilization": {"type": "float", "default": 0},
            "side_by_side_utilization": {"type": "float", "default": 0},
            "weights_mib": {"type": "int", "default": 0},
            "sleep_mode": {"type": "bool", "default": False},
            "start_seconds": {"type": "int", "default": 900},
            "drain_seconds": {"type": "int", "default": 120},
            "hold_seconds": {"type": "int", "default": 300},
            "gpu": {"type": "bool", "default": False},
            "timeout": {"type": "int", "default": 60},
            "tool_call": {"type": "bool", "default": False},
            "tool_prompt": {"type": "str", "default": ""},
            "golden_prompts": GOLDEN_PROMPTS,
            "at_once": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    paths = _vllm_host.Paths(Path(module.params["root"]), Path(module.params["data"]))
    try:
        result = act(paths, module.params, check_mode=module.check_mode)
    except (SwapError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
