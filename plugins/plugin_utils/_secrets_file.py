# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A YAML variables file of secrets on the controller. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib, is_encrypted, match_encrypt_secret

# Read by Ansible as variables of all hosts, in a directory that the user's inventory has.
USUAL = Path("group_vars", "all", "secrets.yml")
# Read by nobody but this collection: no group has this name. A directory `all` beside a file `all.yml` would have Ansible ignore that file.
APART = Path("group_vars", "agent_stack_secrets.yml")

VAULT_TAGS = ("!vault", "!vault-encrypted")


class SecretsFileError(ValueError):
    """The file cannot be found, or not be changed as it has to be; the message is a sentence."""


def location(directories: Iterable[str], host: str, home: Path) -> Path:
    """Return where the secrets are kept, or will be.

    directories: of the inventories in which the stack's hosts are, each once, the front's first. None for hosts of the command line (`-i host,`), whose
                 secrets are in the user's `home` then, under the name of the front, `host`
    Raises SecretsFileError if several inventories have such a file, and where Ansible ignores a file because of a directory beside it.
    """
    places = [Path(directory) for directory in dict.fromkeys(directories)]
    for ignored in (place / "group_vars" / f"all{ending}" for place in places for ending in (".yml", ".yaml", ".json")):
        if ignored.is_file() and ignored.with_suffix("").is_dir():
            raise SecretsFileError(f"Ansible ignores {ignored}, because there is a directory {ignored.stem} beside it. Move the file to all/main.yml.")
    if not places:
        return home / ".config" / "agent-stack" / host / "secrets.yml"
    present = [place / name for place in places for name in (USUAL, APART) if (place / name).exists()]
    if len(present) > 1:
        raise SecretsFileError(f"There are secrets in {' and in '.join(map(str, present))}; allowed is one of them, or its path in agent_stack_secrets_file.")
    if present:
        return present[0]
    return places[0] / (USUAL if (places[0] / USUAL.parent).is_dir() else APART)


def edited(text: str, variable: str, values: Mapping[str, str], comment: str = "") -> str:
    """Return a YAML file with the mapping `variable` changed to `values`, and all else as it was: comments, tags, other variables, the order.

    Raises SecretsFileError if the file has the mapping in a form in which it cannot be changed.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    found = next((value for key, value in entries if key.value == variable), None)
    if found is not None and not isinstance(found, yaml.MappingNode) and not (isinstance(found, yaml.ScalarNode) and found.tag == "tag:yaml.org,2002:null"):
        raise SecretsFileError(f"{variable} is no mapping")
    if isinstance(found, yaml.MappingNode) and found.value:
        changed = _edited_mapping(text, found, values)
        if not values and not found.flow_style:
            # Without it a block of nothing is no mapping, but null.
            colon = next(key.end_mark.index for key, _value in entries if key.value == variable) + 1
            changed = f"{changed[:colon]} {{}}{changed[colon:]}"
    else:
        block = f"{variable}:{'' if values else ' {}'}\n" + "".join(f"  {_entry(name, value)}\n" for name, value in sorted(values.items()))
        if found is not None:
            start = next(key.start_mark.index for key, _value in entries if key.value == variable)
            changed = text[:start] + block + text[max(found.end_mark.index, start) :].lstrip(" ").removeprefix("\n")
        elif root is None:
            changed = f"---\n# {comment}\n{block}" if comment and not text.strip() else f"{text.rstrip()}\n{block}"
        else:
            changed = f"{text.rstrip()}\n{block}"
    try:
        result: Any = yaml.compose(changed, Loader=yaml.SafeLoader)
        there = next(value for key, value in result.value if key.value == variable)
        right = {key.value for key, _value in there.value} == set(values) and len(result.value) == len(entries) + (found is None)
    except (yaml.YAMLError, StopIteration, AttributeError, TypeError):
        right = False
    if not right:
        raise SecretsFileError(f"the mapping {variable} has a form in which it cannot be changed; write it as a block, one `name: value` a line")
    return changed


def _edited_mapping(text: str, node: yaml.MappingNode, values: Mapping[str, str]) -> str:
    """The text with a mapping changed that is not empty. From the end to the beginning, so that positions stay true."""
    present = {key.value: (key, value) for key, value in node.value}
    for name, (key, value) in reversed(present.items()):
        if name not in values:
            following = text.find("\n", value.end_mark.index) if not node.flow_style else -1
            start = key.start_mark.index - key.start_mark.column
            end = value.end_mark.index
            if node.flow_style:
                rest = text[end:].lstrip()
                text = text[: key.start_mark.index] + (rest[1:].lstrip() if rest.startswith(",") else rest)
            elif isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"):
                text = text[:start] + text[end:]
            else:
                text = text[:start] + (text[following + 1 :] if following >= 0 else "")
        elif isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:str" and value.value != values[name]:
            text = text[: key.start_mark.index] + _entry(name, values[name]) + text[value.end_mark.index :]
    first = node.value[0][0].start_mark
    added = [_entry(name, value) for name, value in values.items() if name not in present]
    if not added:
        return text
    if node.flow_style:
        return text[: node.start_mark.index + 1] + ", ".join(added) + ", " + text[node.start_mark.index + 1 :]
    start = first.index - first.column
    return text[:start] + "".join(f"{' ' * first.column}{entry}\n" for entry in added) + text[start:]


def _entry(name: str, value: str) -> str:
    return yaml.safe_dump({str(name): str(value)}, width=10_000, allow_unicode=True).strip()


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
        self.values: dict[str, str] = self.mapping(variable)

    def mapping(self, variable: str) -> dict[str, str]:
        """One of the file's mappings of names to texts; empty if it has none."""
        values = self._content.get(variable) or {}
        if not isinstance(values, dict):
            raise AnsibleActionFail(f"{variable} in {self._path} must be a mapping of names to secrets.")
        return values

    @property
    def unprotected(self) -> bool:
        """Whether others can read what is there: by its mode, or because it is plain although there is a vault password."""
        if not self._path.exists():
            return False
        return bool(stat.S_IMODE(self._path.stat().st_mode) & 0o077) or (self._plain() and bool(self._loader._vault.secrets))

    def write(self, values: Mapping[str, str], **others: Mapping[str, str]) -> None:
        """Encrypted, if Ansible was given a vault password. What else is in the file stays as it was, comments and tags too.

        others: more mappings of the file by their variable, written in the same step
        """
        content = self._path.read_bytes() if self._path.exists() else b""
        label = ""
        if is_encrypted(content):
            # $ANSIBLE_VAULT;1.2;AES256;label
            label = content.split(b"\n", 1)[0].decode().partition("AES256;")[2].strip()
            content = self._loader._vault.decrypt(content)
        try:
            text = edited(content.decode(), self._variable, values, self._comment)
            for variable, mapping in others.items():
                if mapping or self.mapping(variable):
                    text = edited(text, variable, mapping)
            write_private(self._path, self._encrypt(text.encode(), label))
        except SecretsFileError as error:
            raise AnsibleActionFail(f"Cannot write {self._path}: {error}.") from error
        except OSError as error:
            raise AnsibleActionFail(
                f"Cannot write {error.filename or self._path}: {error.strerror}. agent_stack_secrets_file names another file to keep the secrets in."
            ) from error

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

    def sealed(self) -> list[str]:
        """The names whose value is encrypted by itself, with `!vault`: it cannot be replaced."""
        return [name for name, tag in self._tags().items() if tag in VAULT_TAGS]

    def _plain(self) -> bool:
        """Whether a secret is there to be read; values of `!vault` are not."""
        return not is_encrypted(self._path.read_bytes()) and any(tag not in VAULT_TAGS for tag in self._tags().values())

    def _tags(self) -> dict[str, str]:
        content = self._path.read_bytes() if self._path.exists() else b""
        if is_encrypted(content):
            content = self._loader._vault.decrypt(content)
        root = yaml.compose(content.decode(), Loader=yaml.SafeLoader)
        found = next((value for key, value in getattr(root, "value", []) if key.value == self._variable), None)
        return {key.value: value.tag for key, value in getattr(found, "value", [])}

    def _encrypt(self, text: bytes, label: str) -> bytes:
        """With the identity that Ansible is configured to encrypt with, else that of the file so far, else the first."""
        vault_secrets = self._loader._vault.secrets
        if not vault_secrets:
            return text
        wanted = constants.DEFAULT_VAULT_ENCRYPT_IDENTITY or (label if label in [identity for identity, _secret in vault_secrets] else None)
        try:
            identity, secret = match_encrypt_secret(vault_secrets, encrypt_vault_id=wanted)
        except AnsibleError as error:
            raise SecretsFileError(f"no vault password was given for the identity {wanted}, which ANSIBLE_VAULT_ENCRYPT_IDENTITY names") from error
        return bytes(VaultLib(vault_secrets).encrypt(text, secret=secret, vault_id=identity))
