# Copyright: the selfhosted.agent_stack maintainers
# Apache-2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Keep generated secrets in a YAML file on the controller; see plugins/modules/generated_secrets.py for the contract."""

from __future__ import annotations

import os
import secrets
import string
import tempfile
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib, match_encrypt_secret
from ansible.parsing.yaml.dumper import AnsibleDumper
from ansible.plugins.action import ActionBase

ALPHABET = string.ascii_letters + string.digits


def with_missing(existing: dict[str, str], names: list[str], length: int) -> tuple[dict[str, str], list[str]]:
    """Return the mapping completed with random values, and the names that were added."""
    created = [name for name in names if name not in existing]
    new = {name: "".join(secrets.choice(ALPHABET) for _ in range(length)) for name in created}
    return {**existing, **new}, created


def write_private(path: Path, content: bytes) -> None:
    """Replace a file as one step, readable by its owner only. A crash leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
                "length": {"type": "int", "default": 32},
                "state": {"type": "str", "choices": ["present", "read"], "default": "present"},
            },
        )
        path = Path(args["path"])
        content = self._read(path)
        existing = content.get(args["variable"]) or {}
        if not isinstance(existing, dict):
            raise AnsibleActionFail(f"{args['variable']} in {path} must be a mapping of names to secrets.")

        values, created = with_missing(existing, args["names"], args["length"])
        writes = bool(created) and args["state"] == "present"
        if writes and not self._task.check_mode:
            write_private(path, self._encode({**content, args["variable"]: values}))
        return {**result, "changed": writes, "secrets": values, "created": created}

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            content = self._loader.load_from_file(str(path), cache="none")
        except AnsibleError as error:
            raise AnsibleActionFail(f"Cannot read {path}: {error}") from error
        if content is None:
            return {}
        if not isinstance(content, dict):
            raise AnsibleActionFail(f"{path} must hold YAML variables (a mapping).")
        return content

    def _encode(self, content: dict[str, Any]) -> bytes:
        header = "---\n# Written by the playbook: secrets that were generated because the inventory gave none. Keep this file.\n"
        text = (header + yaml.dump(content, Dumper=AnsibleDumper, sort_keys=True)).encode()
        vault_secrets = self._loader._vault.secrets
        if not vault_secrets:
            return text
        identity, secret = match_encrypt_secret(vault_secrets)
        return bytes(VaultLib(vault_secrets).encrypt(text, secret=secret, vault_id=identity))
