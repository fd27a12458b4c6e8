# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Replace generated secrets in their file on the controller; see plugins/modules/rotated_secrets.py for the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.selfhosted.agent_stack.plugins.action import generated_secrets
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils._secrets_file import SecretsFile


class ActionModule(ActionBase):
    """Begin or end a rotation in the file of secrets."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, args = self.validate_argument_spec(
            argument_spec={
                "path": {"type": "path", "required": True},
                "variable": {"type": "str", "required": True},
                "names": {"type": "list", "elements": "str", "default": []},
                "state": {"type": "str", "choices": ["begun", "ended"], "required": True},
            },
        )
        file = SecretsFile(self._loader, Path(args["path"]), args["variable"], generated_secrets.COMMENT)
        previous = file.mapping(generated_secrets.PREVIOUS)
        made = file.mapping(generated_secrets.MADE)
        values, created = file.values, []
        if args["state"] == "begun":
            # What an earlier run has begun has its new value already: another one would make that a third.
            created = [name for name in args["names"] if name not in previous]
            unknown = [name for name in created if name not in values]
            if unknown:
                raise AnsibleActionFail(f"{args['path']} has no {', '.join(unknown)}; allowed to rotate are the secrets that it has.")
            if sealed := [name for name in created if name in file.sealed()]:
                raise AnsibleActionFail(
                    f"{', '.join(sealed)} in {args['path']} is encrypted by itself; allowed to rotate are values in a file that is plain or wholly encrypted."
                )
            kept = {name: value for name, value in values.items() if name not in created}
            previous = {**previous, **{name: values[name] for name in created}}
            values, _names = generated_secrets.with_missing(kept, created, generated_secrets.LENGTH)
            made = {**made, **dict.fromkeys(created, generated_secrets.today())}
            changed = bool(created)
        else:
            changed, previous = bool(previous), {}
        if changed and not self._task.check_mode:
            file.write(values, **{generated_secrets.PREVIOUS: previous, generated_secrets.MADE: made})
        return {**result, "changed": changed, "secrets": values, "previous": previous, "created": created}
