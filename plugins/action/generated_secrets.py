# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep generated secrets in a YAML file on the controller; see plugins/modules/generated_secrets.py for the contract."""

from __future__ import annotations

import datetime
import secrets
import string
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils._secrets_file import SecretsFile

LENGTH = 32
ALPHABET = string.ascii_letters + string.digits
COMMENT = "Written by the playbook: secrets that were generated because the inventory gave none. Keep this file."

# In the same file: what still counts while it is rotated, and the day on which each was made.
PREVIOUS = "agent_stack_secrets_previous"
MADE = "agent_stack_secrets_made"


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()  # noqa: UP017  as the modules' oldest Python has it


def with_missing(existing: dict[str, str], names: list[str], length: int) -> tuple[dict[str, str], list[str]]:
    """Return the mapping completed with random values, and the names that were added."""
    created = [name for name in names if name not in existing]
    new = {name: "".join(secrets.choice(ALPHABET) for _position in range(length)) for name in created}
    return {**existing, **new}, created


class ActionModule(ActionBase):
    """Read, complete and write the file of secrets."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(
            argument_spec={
                "path": {"type": "path", "required": True},
                "variable": {"type": "str", "required": True},
                "names": {"type": "list", "elements": "str", "required": True},
                "length": {"type": "int", "default": LENGTH},
                "given": {"type": "dict", "default": {}, "no_log": True},
                "state": {"type": "str", "choices": ["present", "read"], "default": "present"},
            },
        )
        file = SecretsFile(self._loader, Path(args["path"]), args["variable"], COMMENT)
        # What the inventory gives is neither made nor kept here, but what the file has is the file's.
        given = {name: value for name, value in args["given"].items() if name not in file.values}
        values, created = with_missing(file.values, [name for name in args["names"] if name not in given], args["length"])
        writes = args["state"] == "present" and (bool(created) or file.unprotected)
        if writes and not self._task.check_mode:
            file.write(values, **{MADE: {**file.mapping(MADE), **dict.fromkeys(created, today())}})
        return {
            **result,
            "changed": writes,
            "secrets": {**values, **given},
            "previous": file.mapping(PREVIOUS),
            "made": file.mapping(MADE),
            "created": created,
            "given": given,
        }
