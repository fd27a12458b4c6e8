# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup plugin: what the components of the stack declare of themselves."""

from __future__ import annotations

DOCUMENTATION = r"""
name: component
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
version_added: 0.2.0
short_description: What the components of the stack declare of themselves
description:
  - Reads C(meta/component.yml) of the collection's roles. A role that has this file is a component; whoever needs the images, secrets, metrics, ports,
    networks or directories of components asks here and keeps no list.
options:
  _terms:
    description: Names of components. None means all.
  wants:
    description:
      - What to return. V(declaration) is each component's declaration with the paths of this host, V(secrets) the names of their secrets,
        V(secret_list) each with its owner and why it is not rotated,
        V(checked) the roles whose inputs are checked before anything changes, V(images) the names of their images that can be built,
        V(scrape_configs) what Prometheus scrapes, V(listens) the ports that they listen on,
        V(footprint) what they leave on the host outside of the stack's own two directories.
    type: str
    choices: [declaration, secrets, secret_list, checked, images, scrape_configs, listens, footprint]
    default: declaration
  serving:
    description: With V(scrape_configs), the hosts that serve a model. This host alone if it is not given.
    type: list
    elements: str
"""

EXAMPLES = r"""
- name: Show where Redis keeps its files
  ansible.builtin.debug:
    msg: "{{ lookup('selfhosted.agent_stack.component', 'redis').directories }}"

- name: Show the names of all secrets
  ansible.builtin.debug:
    msg: "{{ query('selfhosted.agent_stack.component', wants='secrets') }}"
"""

RETURN = r"""
_raw:
  description: A mapping for each component, or what O(wants) names.
  type: list
  elements: raw
"""

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.errors import AnsibleError  # noqa: E402
from ansible.plugins.lookup import LookupBase  # noqa: E402

from ..plugin_utils import _components  # noqa: E402

ROLES = Path(__file__).resolve().parent.parent.parent / "roles"


class LookupModule(LookupBase):
    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        self.set_options(var_options=variables, direct=kwargs)
        given = variables or {}
        try:
            known = _components.load(ROLES)
        except (_components.ComponentError, OSError) as error:
            raise AnsibleError(str(error)) from error
        for name in terms:
            if name not in known:
                raise AnsibleError(f"There is no component {name}; known are {', '.join(known)}.")
        components = [known[name] for name in terms or known]
        wants = self.get_option("wants")
        if wants == "secret_list":
            return _components.secret_list(components)
        if wants == "secrets":
            return _components.secrets(components)
        if wants == "checked":
            return _components.checked(components, ROLES)
        if wants == "images":
            return sorted(name for name, image in _components.images(components).items() if "context" in image)
        if wants == "footprint":
            return [_components.footprint(components, str(self._templar.template(given.get("agent_stack_domain", ""))))]
        if wants == "scrape_configs":
            host = given["inventory_hostname"]
            serving = self.get_option("serving")
            return _components.scrape_configs(components, host, [host] if serving is None else serving)
        if wants == "listens":
            return _components.listens(components, lambda name: self._templar.template(given[name]) if name in given else None)
        # A role whose inputs are checked in a play of its own may not know where the stack is, and needs no paths then.
        places = {name: str(self._templar.template(given[name])) for name in ("agent_stack_root", "agent_stack_data_dir") if name in given}
        return [
            _components.declaration(component, places.get("agent_stack_root", "{root}"), places.get("agent_stack_data_dir", "{data}"))
            for component in components
        ]
