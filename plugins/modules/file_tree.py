#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: directories and small files, in one step."""

from __future__ import annotations

DOCUMENTATION = r"""
module: file_tree
short_description: Write directories and small text files in one step
version_added: 0.1.0
description:
  - Does for many paths at once what M(ansible.builtin.file) and M(ansible.builtin.copy) do for one. A module's start costs
    more than its work, and a service has a dozen small files.
  - A file gets its owner and mode before its name, so that a secret is never readable by others, and is replaced at once.
  - Directories come first, in the order given. Missing parents belong to root and have mode 0755.
options:
  directories:
    description: Directories that must exist.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path.
        type: path
        required: true
      owner:
        description: Name or number of the owner, and of the group.
        type: str
        default: root
      mode:
        description: Octal mode.
        type: str
        default: "0755"
  files:
    description: Files that must have this content.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path.
        type: path
        required: true
      content:
        description: The text, usually from P(ansible.builtin.template#lookup).
        type: str
        required: true
      owner:
        description: Name or number of the owner, and of the group.
        type: str
        default: root
      mode:
        description: Octal mode.
        type: str
        default: "0644"
      validate:
        description: Command that must succeed before new content gets its name; C(%s) in it is the path of the new content.
        type: str
attributes:
  check_mode:
    description: Says what would change. The validation of new content is left out.
    support: full
  diff_mode:
    description: Shows contents. Use C(diff=false) and C(no_log=true) for secrets.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Write the server's configuration
  selfhosted.agent_stack.file_tree:
    directories:
      - {path: /opt/agent-stack/redis/config}
      - {path: /opt/agent-stack/redis/secrets, owner: "999", mode: "0700"}
    files:
      - path: /opt/agent-stack/redis/config/redis.conf
        content: "{{ lookup('ansible.builtin.template', 'redis.conf.j2') }}"
"""

RETURN = r"""
paths:
  description: The paths that were, or in check mode would be, created or changed.
  returned: success
  type: list
  elements: str
"""

import os  # noqa: E402
import shlex  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


def make_directory(path: str) -> None:
    """Create a directory and its missing parents with mode 0755, whatever the umask is."""
    if not os.path.isdir(path):
        make_directory(os.path.dirname(path))
        os.mkdir(path)
        os.chmod(path, 0o755)  # noqa: S103  the parent of what a container's own user must reach


def read(path: str) -> bytes | None:
    """Return a file's content, or None where there is none."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


class Tree:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.changed: list[str] = []
        self.diff: list[dict[str, Any]] = []

    def directory(self, wanted: dict[str, Any]) -> None:
        path = wanted["path"]
        missing = not os.path.isdir(path)
        if missing:
            self.note(path, {"path": path, "state": "absent"}, {"path": path, "state": "directory"})
            if self.module.check_mode:
                return
            make_directory(path)
        self.attributes(path, wanted)

    def file(self, wanted: dict[str, Any]) -> None:
        path = wanted["path"]
        content = wanted["content"].encode()
        present = read(path)
        if present != content:
            before = "" if present is None else present.decode(errors="replace")
            self.note(path, before, wanted["content"])
            if self.module.check_mode:
                return
            self.replace(path, content, wanted)
        self.attributes(path, wanted)

    def replace(self, path: str, content: bytes, wanted: dict[str, Any]) -> None:
        # A fixed name: what a killed run left is overwritten by the next one.
        new = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.new")
        if os.path.lexists(new):
            os.unlink(new)
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            self.module.set_fs_attributes_if_different(self.arguments(new, wanted), changed=False)
            self.validate(new, path, wanted["validate"])
            os.replace(new, path)
        finally:
            if os.path.lexists(new):
                os.unlink(new)

    def validate(self, new: str, path: str, command: str | None) -> None:
        if not command:
            return
        status, output, errors = self.module.run_command([word.replace("%s", new) for word in shlex.split(command)])
        if status != 0:
            os.unlink(new)
            self.module.fail_json(msg=f"The new content of {path} is not valid, and was not put in place: {(errors or output).strip()}")

    def attributes(self, path: str, wanted: dict[str, Any]) -> None:
        difference: dict[str, Any] = {}
        if self.module.set_fs_attributes_if_different(self.arguments(path, wanted), changed=False, diff=difference):
            self.note(path, difference.get("before", {}), difference.get("after", {}))

    def arguments(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        given = {"path": path, "owner": wanted["owner"], "group": wanted["owner"], "mode": wanted["mode"]}
        arguments: dict[str, Any] = self.module.load_file_common_arguments(given)
        return arguments

    def note(self, path: str, before: object, after: object) -> None:
        if path not in self.changed:
            self.changed.append(path)
        self.diff.append({"before_header": path, "after_header": path, "before": before, "after": after})


def main() -> None:
    common: dict[str, dict[str, Any]] = {"path": {"type": "path", "required": True}, "owner": {"default": "root"}}
    files = common | {"content": {"required": True}, "mode": {"default": "0644"}, "validate": {}}
    module = AnsibleModule(
        argument_spec={
            "directories": {"type": "list", "elements": "dict", "default": [], "options": common | {"mode": {"default": "0755"}}},
            "files": {"type": "list", "elements": "dict", "default": [], "options": files},
        },
        supports_check_mode=True,
    )
    tree = Tree(module)
    try:
        for directory in module.params["directories"]:
            tree.directory(directory)
        for file in module.params["files"]:
            tree.file(file)
    except OSError as error:
        module.fail_json(msg=f"Cannot write {error.filename}: {error.strerror}")
    module.exit_json(changed=bool(tree.changed), paths=tree.changed, diff=tree.diff)


if __name__ == "__main__":
    main()
