# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the agent's API keys in a YAML file on the controller; see plugins/modules/api_key_file.py for the contract."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils._secrets_file import SecretsFile

COMMENT = "Written by playbooks/api_keys.yml: the agent's API keys. The agent itself has digests only, so keep this file."


def new_key(name: str) -> str:
    return f"ask_{name}_{secrets.token_urlsafe(32)}"


def plan(
    existing: Mapping[str, str], names: Iterable[str], absent: Collection[str], known: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, str], dict[str, str]]:
    """What the file is to hold, and what of it the agent has yet to learn.

    A key that was written but never reached the agent, because a run was cut off in between, is used. One that the agent
    has revoked is not.
    """
    active = {key["name"] for key in known if not key["revoked_at"]}
    digests = {key["sha256"] for key in known}
    missing = {}
    for name in names:
        if name in active:
            continue
        key = existing.get(name)
        if not key or hashlib.sha256(key.encode()).hexdigest() in digests:
            key = new_key(name)
        missing[name] = key
    kept = {name: key for name, key in existing.items() if name not in absent}
    return {**kept, **missing}, missing


def create_arguments(key: Mapping[str, Any]) -> list[str]:
    """The limits of this key, as the agent's own program takes them."""
    return [word for limit, value in key.items() if limit != "name" for word in (f"--{limit.replace('_', '-')}", str(value))]


class ActionModule(ActionBase):
    """Read, complete and write the file of keys."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(
            argument_spec={
                "path": {"type": "path", "required": True},
                "variable": {"type": "str", "required": True},
                "keys": {"type": "list", "elements": "raw", "required": True},
                "absent": {"type": "list", "elements": "str", "default": []},
                "known": {"type": "list", "elements": "dict", "required": True},
            },
        )
        file = SecretsFile(self._loader, Path(args["path"]), args["variable"], COMMENT)
        wanted = {key["name"]: key for key in (key if isinstance(key, Mapping) else {"name": str(key)} for key in args["keys"])}
        values, missing = plan(file.values, wanted, args["absent"], args["known"])
        changed = values != file.values
        if changed and not self._task.check_mode:
            file.write(values)
        calls = [
            {"name": name, "arguments": [name, *create_arguments(key), *(["--stdin"] if name in missing else [])], "key": missing.get(name)}
            for name, key in wanted.items()
            if name in missing or len(key) > 1
        ]
        return {**result, "changed": changed, "calls": calls, "created": sorted(missing)}
