# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A YAML variables file of secrets on the controller. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib, match_encrypt_secret
from ansible.parsing.yaml.dumper import AnsibleDumper


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


class SecretsFile:
    """One mapping of names to secrets, in a file that may hold other variables too."""

    def __init__(self, loader: Any, path: Path, variable: str, comment: str) -> None:
        self._loader = loader
        self._path = path
        self._variable = variable
        self._comment = comment
        self._content = self._read()
        values = self._content.get(variable) or {}
        if not isinstance(values, dict):
            raise AnsibleActionFail(f"{variable} in {path} must be a mapping of names to secrets.")
        self.values: dict[str, str] = values

    def write(self, values: dict[str, str]) -> None:
        """Encrypted, if Ansible was given a vault password."""
        text = f"---\n# {self._comment}\n" + yaml.dump({**self._content, self._variable: values}, Dumper=AnsibleDumper, sort_keys=True)
        write_private(self._path, self._encrypt(text.encode()))

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            content = self._loader.load_from_file(str(self._path), cache="none")
        except AnsibleError as error:
            raise AnsibleActionFail(f"Cannot read {self._path}: {error}") from error
        if content is None:
            return {}
        if not isinstance(content, dict):
            raise AnsibleActionFail(f"{self._path} must hold YAML variables (a mapping).")
        return content

    def _encrypt(self, text: bytes) -> bytes:
        vault_secrets = self._loader._vault.secrets
        if not vault_secrets:
            return text
        identity, secret = match_encrypt_secret(vault_secrets)
        return bytes(VaultLib(vault_secrets).encrypt(text, secret=secret, vault_id=identity))
