# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup plugin: where the generated secrets are kept on the controller, and what they are."""

from __future__ import annotations

DOCUMENTATION = r"""
name: secrets
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
version_added: 0.2.0
short_description: Where the generated secrets are kept on the controller, and what they are
description:
  - Without a term returns the path of the file - C(group_vars/all/secrets.yml) beside the inventory if that directory is there, else
    C(group_vars/agent_stack_secrets.yml), which shadows no C(group_vars/all.yml). Hosts that the command line names (C(-i host,)) have no inventory, and
    their secrets are in C(~/.config/agent-stack/HOST/secrets.yml).
  - With the path of a file as the term returns the secrets in it, and nothing if there is no such file.
options:
  _terms:
    description: The path of the file to read.
"""

EXAMPLES = r"""
- name: Say where the secrets are
  ansible.builtin.debug:
    msg: "{{ lookup('selfhosted.agent_stack.secrets') }}"
"""

RETURN = r"""
_raw:
  description: One path, or one mapping of names to secrets.
  type: list
  elements: raw
"""

import os  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.errors import AnsibleError  # noqa: E402
from ansible.plugins.lookup import LookupBase  # noqa: E402

from ..plugin_utils import _secrets_file, _topology  # noqa: E402

VARIABLE = "agent_stack_secrets"


class LookupModule(LookupBase):
    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        self.set_options(var_options=variables, direct=kwargs)
        if terms:
            return [_secrets_file.SecretsFile(self._loader, Path(term), VARIABLE, "").values for term in terms]
        given = variables or {}
        topology = _topology.read(given)
        hostvars = given.get("hostvars", {})
        # The front's first. In a stack of several hosts all have the same secrets; stacks of their own have those of their own inventory.
        hosts = [topology.front, *(topology.stack if topology.apart or topology.followers else ())]
        directories = [str(hostvars[host].get("inventory_dir")) for host in hosts if host in hostvars]
        try:
            # Of a host that the command line names the directory is the word None.
            return [str(_secrets_file.location(filter(os.path.isabs, directories), topology.front, Path.home()))]
        except _secrets_file.SecretsFileError as error:
            raise AnsibleError(str(error)) from error
