# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup plugin: what the model server of this host is."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vllm_service
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
version_added: 0.2.0
short_description: What the model server of this host is
description:
  - Makes the server's container, and what goes with it, of the variables of the role C(vllm), the inventory's topology and the plan for the model's GPUs.
options:
  _terms:
    description: One plan, as M(selfhosted.agent_stack.vllm_plan) returns it. An empty dictionary where there is none.
    required: true
  image:
    description: Reference of the server's image.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show the server's command
  ansible.builtin.debug:
    msg: "{{ lookup('selfhosted.agent_stack.vllm_service', plan, image='docker.io/vllm/vllm-openai:v0.33.0').definition.command }}"
"""

RETURN = r"""
_raw:
  description: One dictionary.
  type: list
  elements: dict
  contains:
    definition:
      description: The server as a Compose service.
      type: dict
    cache:
      description: The host's directory of what the server compiles.
      type: str
    fetch:
      description: The command that fetches the model, for a container of the server's image.
      type: list
      elements: str
    more_fetches:
      description: The commands that fetch adapters and what guesses tokens ahead, by the names of their services.
      type: dict
    follower:
      description: Name of the Compose project on a host that follows. Empty where no hosts share the model.
      type: str
    strategy:
      description: How this model and the one that serves share the memory; an option of M(selfhosted.agent_stack.vllm_swap), like those below.
      type: str
    side_by_side_utilization:
      description: Share of the memory beside the model that serves.
      type: float
    weights_mib:
      description: Size of the weights on all GPUs of this host, in MiB.
      type: int
    tool_call:
      description: Whether the model calls tools.
      type: bool
"""

from typing import Any  # noqa: E402

from ansible.errors import AnsibleError  # noqa: E402
from ansible.plugins.lookup import LookupBase  # noqa: E402

from ..plugin_utils import _topology, _vllm_service  # noqa: E402


class LookupModule(LookupBase):
    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[dict[str, Any]]:
        self.set_options(var_options=variables, direct=kwargs)
        if len(terms) != 1:
            raise AnsibleError(f"The lookup vllm_service takes one plan, and was given {len(terms)}.")
        variables = variables or {}
        values = {name: self._templar.template(variables[name]) for name in _vllm_service.variable_names().values()}
        try:
            settings = _vllm_service.read_settings(values, self.get_option("image"))
        except _vllm_service.SettingsError as error:
            raise AnsibleError(str(error)) from error
        return [_vllm_service.describe(settings, _topology.read(variables), terms[0])]
