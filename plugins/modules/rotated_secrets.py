#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rotated_secrets
short_description: Replace generated secrets in their file on the controller
version_added: 0.2.0
description:
  - Begins a rotation by giving secrets of the file new random values, and keeps those before them in the same file, in the mapping
    C(agent_stack_secrets_previous). Both are written in one step.
  - Ends it by removing the values before from the file.
  - A secret whose rotation an earlier run has begun keeps the value that it was given, so that a run that was killed can be run again.
  - The day on which a secret was made is in the mapping C(agent_stack_secrets_made).
  - Runs on the controller only, whatever the host of the task is.
options:
  path:
    description: The file.
    type: path
    required: true
  variable:
    description: Name of the variable in the file that holds the mapping.
    type: str
    required: true
  names:
    description: Secrets to replace.
    type: list
    elements: str
    default: []
  state:
    description:
      - V(begun) makes new values beside those before.
      - V(ended) leaves the new ones alone.
    type: str
    choices: [begun, ended]
    required: true
attributes:
  check_mode:
    description: In check mode nothing is written.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Make a new password beside the old one
  selfhosted.agent_stack.rotated_secrets:
    path: "{{ inventory_dir }}/group_vars/all/secrets.yml"
    variable: agent_stack_secrets
    names: [redis_agent_password]
    state: begun
  no_log: true
"""

RETURN = r"""
secrets:
  description: The whole mapping, with the new values.
  returned: success
  type: dict
  sample: {"redis_agent_password": "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"}
previous:
  description: The values before, of what is being rotated.
  returned: success
  type: dict
  sample: {"redis_agent_password": "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"}
created:
  description: Names that were given a new value.
  returned: success
  type: list
  elements: str
  sample: ["redis_agent_password"]
"""
