# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup plugin: which host of the inventory does what."""

from __future__ import annotations

DOCUMENTATION = r"""
name: topology
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
version_added: 0.2.0
short_description: Which host of the inventory does what
description:
  - Reads the groups C(agent_stack), C(inference) and C(followers) and the followers' C(vllm_head), and says what they make of the host that is asked for.
  - The hosts of C(agent_stack) are the stack's. Without that group all hosts are, if there is one alone or a group C(inference), and otherwise none.
  - Without a group C(inference) every host is a stack of its own. With it, its hosts serve the model, and the host outside of it, or else its first,
    carries the rest. Hosts of the group C(followers) add their GPUs to the model of their head, a host of the group C(inference).
  - In a play's C(hosts) there is no host yet. Then only V(stack), V(fronts), V(servers), V(apart), V(followers) and V(outside) say something.
options:
  _terms:
    description: None are taken.
"""

EXAMPLES = r"""
- name: Deploy the hosts that serve the model
  hosts: "{{ lookup('selfhosted.agent_stack.topology').servers }}"
"""

RETURN = r"""
_raw:
  description: One dictionary.
  type: list
  elements: dict
  contains:
    host:
      description: This host's own name.
      type: str
    stack:
      description: All hosts of the stack. Empty where the inventory does not say which they are.
      type: list
      elements: str
    fronts:
      description: The hosts that carry the rest of the stack.
      type: list
      elements: str
    servers:
      description: The hosts that serve the model.
      type: list
      elements: str
    apart:
      description: The servers that are hosts apart from their front.
      type: list
      elements: str
    followers:
      description: The hosts that add their GPUs to the model of a server.
      type: list
      elements: str
    outside:
      description: The hosts of neither group, where there is a group C(inference).
      type: list
      elements: str
    front:
      description: The front that this host belongs to.
      type: str
    serves:
      description: Whether this host serves the model.
      type: bool
    follows:
      description: Whether this host adds its GPUs to the model of another one.
      type: bool
    is_peer:
      description: Whether this host is apart from its front, and gets its requests.
      type: bool
    peers:
      description: The hosts apart that this one, as their front, sends requests to.
      type: list
      elements: str
    partners:
      description: The hosts at the other end of an encrypted connection - of a front its peers, of a peer the front.
      type: list
      elements: str
    head:
      description: The host whose model this one shares. Itself, unless it follows.
      type: str
    nodes:
      description: The hosts of that model in the order of their ranks, the head first.
      type: list
      elements: str
    head_address:
      description: The head's C(vllm_peer_address), where several hosts share its model.
      type: str
    shared:
      description: Whether several hosts share the model.
      type: bool
"""

from dataclasses import asdict  # noqa: E402
from typing import Any  # noqa: E402

from ansible.errors import AnsibleError  # noqa: E402
from ansible.plugins.lookup import LookupBase  # noqa: E402

from ..plugin_utils import _topology  # noqa: E402


class LookupModule(LookupBase):
    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[dict[str, Any]]:
        self.set_options(var_options=variables, direct=kwargs)
        if terms:
            raise AnsibleError(f"The lookup topology takes no terms, and was given {terms}.")
        found = _topology.read(variables or {})
        return [{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(found).items()} | {"shared": found.shared}]
