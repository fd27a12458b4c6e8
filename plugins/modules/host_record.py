#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: what was on the host before the stack."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_record
short_description: Record what is on the host before the stack comes
version_added: 0.2.0
description:
  - Writes down, once, which packages, groups and images the host has, and what is in the files that the stack's roles write over.
  - M(selfhosted.agent_stack.uninstall) reads it, and takes away only what was not there. A record that exists is never changed.
options:
  path:
    description: The directory of the stack. The record is C(before.json) in it, which only root may read.
    type: path
    required: true
  footprint:
    description: What the components leave on the host, as the lookup P(selfhosted.agent_stack.component#lookup) returns it.
    type: dict
    required: true
attributes:
  check_mode:
    description: Says whether a record would be written.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Record what is there
  selfhosted.agent_stack.host_record:
    path: /opt/agent-stack
    footprint: "{{ lookup('selfhosted.agent_stack.component', wants='footprint') }}"
"""

RETURN = r"""
complete:
  description: False if the stack was on the host before the record, whose packages then count as the host's own.
  returned: success
  type: bool
"""

import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._uninstall import RECORD, Host, UninstallError, take_record  # noqa: E402


def main() -> None:
    module = AnsibleModule(
        argument_spec={"path": {"type": "path", "required": True}, "footprint": {"type": "dict", "required": True}},
        supports_check_mode=True,
    )
    file = Path(module.params["path"]) / RECORD
    try:
        if file.exists():
            module.exit_json(changed=False, complete=json.loads(file.read_text())["complete"])
        footprint = module.params["footprint"]
        record = take_record(Host(), footprint["replaces"], footprint["merges"], module.params["path"])
        if not module.check_mode:
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            file.parent.chmod(0o755)
            new = file.with_name(f".{file.name}.new")
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                json.dump(record, stream, indent=1, sort_keys=True)
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(file)
    except (OSError, ValueError, KeyError, UninstallError) as error:
        module.fail_json(msg=f"Cannot record in {file} what the host has: {error}")
    module.exit_json(changed=True, complete=record["complete"])


if __name__ == "__main__":
    main()
