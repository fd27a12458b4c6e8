#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: one digest for the files below some directories."""

from __future__ import annotations

DOCUMENTATION = r"""
module: directory_digest
short_description: Compute one digest over the files below some directories
version_added: 0.1.0
description:
  - Returns a short digest that changes when the name or content of any file below the directories changes.
  - Used as a container label, so that Compose recreates a container whose configuration or secrets are new. That works
    also after a play that was killed between writing a file and restarting the service, where a handler would be lost.
  - The digest is keyed with the host's machine id, so that nothing can be learned from it about a secret.
options:
  paths:
    description: Directories and files. One that does not exist counts as empty.
    type: list
    elements: path
    required: true
attributes:
  check_mode:
    description: The module only reads.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Compute the revision of the configuration
  selfhosted.agent_stack.directory_digest:
    paths: [/opt/agent-stack/redis/config, /opt/agent-stack/redis/secrets]
  register: revision
"""

RETURN = r"""
digest:
  description: The first 16 hexadecimal digits of an HMAC-SHA256.
  returned: success
  type: str
  sample: 3f5d1c9ab2de4f60
"""

import hashlib  # noqa: E402
import hmac  # noqa: E402
import os  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


def directory_digest(paths: list[str], key: bytes) -> str:
    """Return the digest as 16 hexadecimal digits. Raises OSError for a file that cannot be read."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for path in sorted(paths):
        single: list[tuple[str, list[str], list[str]]] = [(os.path.dirname(path), [], [os.path.basename(path)])] if os.path.isfile(path) else []
        for directory, subdirectories, files in single or os.walk(path):
            subdirectories.sort()
            for name in sorted(files):
                full = os.path.join(directory, name)
                with open(full, "rb") as stream:
                    content = stream.read()
                digest.update(f"{full}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()[:16]


def main() -> None:
    module = AnsibleModule(
        argument_spec={"paths": {"type": "list", "elements": "path", "required": True}},
        supports_check_mode=True,
    )
    try:
        with open("/etc/machine-id", "rb") as stream:
            key = stream.read().strip() or b"unset"
        digest = directory_digest(module.params["paths"], key)
    except OSError as error:
        module.fail_json(msg=f"Cannot read {error.filename}: {error.strerror}")
    module.exit_json(changed=False, digest=digest)


if __name__ == "__main__":
    main()
