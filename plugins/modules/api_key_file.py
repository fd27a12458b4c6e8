#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: api_key_file
short_description: Keep the agent's API keys in a YAML file on the controller
version_added: 0.2.0
description:
  - Compares the names that are wanted with the keys that the agent knows, makes keys for those that it lacks, and writes them down
    before the agent learns of them, so that none is lost where a play is cut off in between.
  - A key in the file that the agent never learned is used, one that it has revoked is replaced.
  - The file is written atomically with mode C(0600). If Ansible was given a vault password, the file is encrypted with it.
  - Runs on the controller only, whatever the host of the task is.
options:
  path:
    description: The file. Its directory is created if needed.
    type: path
    required: true
  variable:
    description: Name of the variable in the file that holds the mapping of names to keys.
    type: str
    required: true
  keys:
    description: Names that are to have an active key, or mappings of C(name) and limits of this key alone.
    type: list
    elements: raw
    required: true
  absent:
    description: Names whose keys are taken out of the file.
    type: list
    elements: str
    default: []
  known:
    description: What C(python -m agent.keys list) says of the keys, with C(name), C(sha256) and C(revoked_at) of each.
    type: list
    elements: dict
    required: true
attributes:
  check_mode:
    description: In check mode nothing is written; missing keys are made up for the run.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Write down the keys that the agent lacks
  selfhosted.agent_stack.api_key_file:
    path: "{{ inventory_dir }}/group_vars/all/api_keys.yml"
    variable: agent_api_keys
    keys: [ci, {name: ada, tokens_per_minute: 50000}]
    known: "{{ (keys.stdout | from_json)['keys'] }}"
  register: result
  no_log: true
"""

RETURN = r"""
created:
  description: Names of the keys that the agent is to learn.
  returned: success
  type: list
  elements: str
  sample: ["ci"]
calls:
  description: What to tell the agent's program C(create), with the key for its standard input where it is to learn one.
  returned: success
  type: list
  elements: dict
  sample: [{"name": "ci", "arguments": ["ci", "--stdin"], "key": "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"}]
"""
