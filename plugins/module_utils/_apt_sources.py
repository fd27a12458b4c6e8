# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""apt's sources by their address. PRIVATE to the collection: it may change at any time.

Who wrote a source, and under which file name, does not matter to apt: two entries for one address and suite with different keys are an error, and then apt
reads no list at all. So sources are compared by address.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# deb [arch=amd64 signed-by=/etc/apt/keyrings/x.gpg] https://example.com/debian trixie main
ONE_LINE = re.compile(r"^(?P<type>deb|deb-src)\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)")
# Where NVIDIA had its container packages before, and has them now.
TOOLKIT_ADDRESSES = ("nvidia.github.io/libnvidia-container", "nvidia.github.io/nvidia-docker", "nvidia.github.io/nvidia-container-runtime")
SIGNED_BY = re.compile(r"(?:^|\s)signed-by=(\S+)", re.IGNORECASE)


def parse(file: str, text: str) -> list[dict[str, Any]]:
    """Return the active entries of a source file: `file`, `uri`, `suite` and `signed_by`, a path or "embedded" or nothing."""
    entries = _deb822(text) if file.endswith(".sources") else _one_line(text)
    return [{"file": file, **entry} for entry in entries]


def of(sources: Iterable[Mapping[str, Any]], address: str) -> list[Mapping[str, Any]]:
    """Return the entries of a repository, whose `address` has no scheme: http and https lead to the same."""
    wanted = bare(address)
    return [source for source in sources if bare(source["uri"]) == wanted or bare(source["uri"]).startswith(wanted + "/")]


def bare(uri: str) -> str:
    """An address without scheme, login and slash at its end."""
    return re.sub(r"^[a-z0-9+]+://(?:[^/@]*@)?", "", uri).rstrip("/")


def conflicts(sources: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return each repository, as ADDRESS SUITE, whose entries name different keys, with the files that do."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for source in sources:
        groups.setdefault((source["uri"].rstrip("/"), source["suite"]), []).append(source)
    differ = {where: entries for where, entries in groups.items() if len({entry["signed_by"] for entry in entries}) > 1}
    return [(" ".join(where), sorted({entry["file"] for entry in entries})) for where, entries in differ.items()]


def toolkit_files(sources: list[dict[str, Any]], repository: str, own: str) -> list[str]:
    """Return the files that have nothing but sources for NVIDIA's container packages, without the role's own file."""
    addresses = [*TOOLKIT_ADDRESSES, *([repository] if repository else [])]
    theirs = [source for address in addresses for source in of(sources, address)]
    files = dict.fromkeys(source["file"] for source in theirs if source["file"] != own)
    return [file for file in files if all(source in theirs for source in sources if source["file"] == file)]


def _one_line(text: str) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        found = ONE_LINE.match(line.strip())
        if found:
            key = SIGNED_BY.search(found["options"] or "")
            yield {"uri": found["uri"], "suite": found["suite"], "signed_by": key[1] if key else ""}


def _deb822(text: str) -> Iterator[dict[str, str]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            elif ":" in line:
                name, _sep, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0", "off"):
            continue
        key = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield {"uri": uri, "suite": suite, "signed_by": "embedded" if "\n" in key else key}
