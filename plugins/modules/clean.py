#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: free the disk of what the stack does not use any more."""

from __future__ import annotations

DOCUMENTATION = r"""
module: clean
short_description: Remove models, images and build caches that the stack does not use any more
version_added: 0.2.0
description:
  - A model goes if no slot has it, the inventory does not name it, and it was fetched O(days) ago. Half a model goes that an interrupted fetch left.
  - An image goes if no Compose project of the stack names it, no container has it, this version does not use it, and it was made O(days) ago. Images of
    others are not looked at.
  - Build caches go that nothing has used for O(days).
options:
  root:
    description: The directory of the stack.
    type: path
    required: true
  data:
    description: The directory of the stack's data.
    type: path
    required: true
  days:
    description: What is younger stays.
    type: float
    default: 7
  kinds:
    description: What to look at.
    type: list
    elements: str
    choices: [models, images, build_cache]
    default: [models, images, build_cache]
  model:
    description: The model that the inventory names.
    type: str
    default: ""
  images:
    description: References of the images that this version uses.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Says what would go.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Remove what nobody has used for a month
  selfhosted.agent_stack.clean:
    root: /opt/agent-stack
    data: /var/lib/agent-stack
    days: 30
    model: Qwen/Qwen3-8B
"""

RETURN = r"""
gone:
  description: What went, or in check mode would go - C(kind), C(name), C(size) in bytes, C(age_days).
  returned: success
  type: list
  elements: dict
freed:
  description: Bytes that became free, as far as they are known. In check mode the most that would.
  returned: success
  type: int
free:
  description: Bytes that are free afterwards, by directory.
  returned: success
  type: dict
failed_items:
  description: What could not be removed, and why.
  returned: success
  type: list
  elements: str
"""

import time  # noqa: E402
from dataclasses import asdict  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _clean  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._uninstall import Host, UninstallError  # noqa: E402

KINDS = ["models", "images", "build_cache"]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "data": {"type": "path", "required": True},
            "days": {"type": "float", "default": 7},
            "kinds": {"type": "list", "elements": "str", "choices": KINDS, "default": KINDS},
            "model": {"type": "str", "default": ""},
            "images": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    given = module.params
    host = Host()
    wish = _clean.Wish(given["root"], given["data"], given["days"], given["model"], tuple(given["images"]))
    try:
        found = _clean.find(host, wish, given["kinds"], time.time())
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"Cannot find out what nobody uses: {error}. Nothing was removed.")
    gone, failed, freed = [], [], 0
    for item in found:
        try:
            freed += item.size if module.check_mode else _clean.remove(host, wish, item) or 0
            gone.append(asdict(item))
        except (OSError, ValueError, UninstallError) as error:
            failed.append(f"{item.name}: {error}")
    # Old caches may all be too young, which only the engine knows.
    changed = any(item["kind"] != "build cache" for item in gone) or freed > 0
    module.exit_json(changed=changed, gone=gone, freed=freed, free=_clean.rooms(host, wish), failed_items=failed)


if __name__ == "__main__":
    main()
