#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: generated_secrets
short_description: Keep generated secrets in a YAML file on the controller
version_added: 0.1.0
description:
  - Reads a mapping of secrets from a YAML variables file on the controller, and adds random ones for the names that it lacks.
  - Existing values are never changed and never removed.
  - The file is written atomically with mode C(0600), and what else is in it stays as it was. If Ansible was given a vault password, the file is encrypted
    with it, with the identity of C(ANSIBLE_VAULT_ENCRYPT_IDENTITY) if that is set. A file that others can read, or that is plain although there is a vault
    password, is written again.
  - Runs on the controller only, whatever the host of the task is.
options:
  path:
    description: The file. Its directory is created if needed.
    type: path
    required: true
  variable:
    description: Name of the variable in the file that holds the mapping.
    type: str
    required: true
  names:
    description: Names that the mapping must have.
    type: list
    elements: str
    required: true
  length:
    description: Number of characters of a new secret, taken from letters and digits.
    type: int
    default: 32
  given:
    description: Secrets that are given elsewhere, by their names. They are not generated and not written to the file, whose own values come first.
    type: dict
    default: {}
  state:
    description:
      - V(present) writes new secrets to the file.
      - V(read) returns the same kind of answer, with made-up values for missing names, but writes nothing.
    type: str
    choices: [present, read]
    default: present
attributes:
  check_mode:
    description: In check mode nothing is written; missing secrets are made up for the run.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Create the passwords that are missing
  selfhosted.agent_stack.generated_secrets:
    path: "{{ inventory_dir }}/group_vars/all/secrets.yml"
    variable: agent_stack_secrets
    names: [redis_agent_password]
  register: result
  no_log: true
"""

RETURN = r"""
secrets:
  description: The whole mapping, old and new.
  returned: success
  type: dict
  sample: {"redis_agent_password": "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"}
given:
  description: The part of O(given) that the file does not have itself.
  returned: success
  type: dict
  sample: {}
previous:
  description: The values that still count beside the others, because they are being rotated.
  returned: success
  type: dict
  sample: {}
made:
  description: The day on which each secret was made, of those of which it is known.
  returned: success
  type: dict
  sample: {"redis_agent_password": "2026-05-01"}
created:
  description: Names whose values are new.
  returned: success
  type: list
  elements: str
  sample: ["redis_agent_password"]
"""
