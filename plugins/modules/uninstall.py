#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: take the stack off a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: uninstall
short_description: Take the stack off a host
version_added: 0.2.0
description:
  - Stops and removes the units, containers, networks, images, files and packages of the stack, and puts back the files that its roles wrote over.
  - A package is removed if M(selfhosted.agent_stack.host_record) did not find it before the stack came, and nothing that stays needs it.
  - Works on a host that has half of the stack. What an interrupted run left is removed by the next one.
options:
  root:
    description: The directory of the stack. It is removed.
    type: path
    required: true
  data:
    description: The directory of the stack's data. It is removed with O(remove_data).
    type: path
    required: true
  footprint:
    description: What the components leave on the host, as the lookup P(selfhosted.agent_stack.component#lookup) returns it.
    type: dict
    required: true
  daemon_options:
    description: Options of the Docker engine that the inventory sets beside the declared ones.
    type: dict
    default: {}
  remove_data:
    description: Whether the data goes, too.
    type: bool
    default: false
  remove_packages:
    description: Whether the packages go that the stack brought.
    type: bool
    default: true
attributes:
  check_mode:
    description: Says what would go.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Take the stack off the host, and leave its data
  selfhosted.agent_stack.uninstall:
    root: /opt/agent-stack
    data: /var/lib/agent-stack
    footprint: "{{ lookup('selfhosted.agent_stack.component', wants='footprint') }}"
"""

RETURN = r"""
removed:
  description: What went, or in check mode would go, by kind. C(restored) are files with their former content.
  returned: always
  type: dict
  sample: {"units": ["agent-stack.target"], "packages": ["nginx"]}
kept:
  description: What stays, and why.
  returned: always
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._uninstall import Host, Removal, UninstallError, Wish  # noqa: E402


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "data": {"type": "path", "required": True},
            "footprint": {"type": "dict", "required": True},
            "daemon_options": {"type": "dict", "default": {}},
            "remove_data": {"type": "bool", "default": False},
            "remove_packages": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    given = module.params
    wish = Wish(
        root=given["root"],
        data=given["data"],
        footprint=given["footprint"],
        options=given["daemon_options"],
        with_data=given["remove_data"],
        with_packages=given["remove_packages"],
    )
    removal = Removal(Host(), wish, dry=module.check_mode)
    try:
        removal.everything()
    except (OSError, UninstallError) as error:
        module.fail_json(msg=str(error), removed=removal.removed, kept=removal.kept)
    module.exit_json(changed=bool(removal.removed), removed=removal.removed, kept=removal.kept)


if __name__ == "__main__":
    main()
