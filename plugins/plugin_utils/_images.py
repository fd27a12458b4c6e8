# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which container image stands for a name. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Not part of an image: what the context has beside its sources. The same names are left out when it is packed.
IGNORED_DIRECTORIES = {"tests", "__pycache__"}
TAG_LENGTH = 12


class ImageError(ValueError):
    """An image cannot be had from where the inventory says."""


@dataclass(frozen=True)
class Settings:
    """Where images come from: the `agent_stack_*` values of the inventory, and what the components declare."""

    catalogue: Mapping[str, Mapping[str, Any]]
    base_images: Mapping[str, str]
    source: str
    collection_root: Path
    digests: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    contexts: Mapping[str, str] = field(default_factory=dict)
    archive_dir: str = ""
    build_serial: int = 1
    debian_mirror: str = ""
    ca_certificates: tuple[str, ...] = ()


def origin(name: str, settings: Settings) -> str:
    """Return how the image gets onto the host: `registry`, `build` or `archive`. Raises ImageError for a name or way that does not exist."""
    if name in settings.overrides:
        return "registry"
    if name in settings.contexts:
        return "build"
    entry = _entry(name, settings)
    if settings.source == "archive":
        return "archive"
    if settings.source == "registry" and "reference" in entry:
        return "registry"
    if "context" not in entry:
        raise ImageError(f"The image {name} cannot be built here; use agent_stack_image_source registry or archive, or give it in agent_stack_image_overrides.")
    return "build"


def reference(name: str, settings: Settings) -> str:
    """Return the image reference to write into a Compose file. Raises ImageError."""
    way = origin(name, settings)
    if name in settings.overrides:
        return str(settings.overrides[name])
    if way == "registry":
        tagged = str(_entry(name, settings)["reference"])
        pinned = settings.digests.get(tagged)
        return f"{tagged}@{pinned}" if pinned else tagged
    if way == "archive":
        return f"agent-stack/{name}:{_archive_checksum(name, settings)[:TAG_LENGTH]}"
    digest = hashlib.sha256(f"{base(name, settings)}\n{settings.build_serial}\n".encode())
    for line in _tree(context(name, settings)):
        digest.update(line)
    return f"agent-stack/{name}:{digest.hexdigest()[:TAG_LENGTH]}"


def base(name: str, settings: Settings) -> str:
    """Return the reference of the image that a build of `name` starts from. Raises ImageError."""
    suite = release(name, settings)
    if settings.source == "registry":
        tagged = settings.base_images[suite]
        pinned = settings.digests.get(tagged)
        return f"{tagged}@{pinned}" if pinned else tagged
    digest = hashlib.sha256(f"{suite}\n{settings.debian_mirror}\n{settings.build_serial}\n".encode())
    for certificate in settings.ca_certificates:
        digest.update(Path(certificate).read_bytes())
    return f"agent-stack/base-{suite}:{digest.hexdigest()[:TAG_LENGTH]}"


def release(name: str, settings: Settings) -> str:
    """Return the Debian release that a build of `name` stands on. Raises ImageError."""
    return "trixie" if name in settings.contexts else str(_entry(name, settings)["base"])


def context(name: str, settings: Settings) -> Path:
    """Return the build context's directory on the controller. Raises ImageError."""
    if name in settings.contexts:
        return Path(settings.contexts[name])
    return settings.collection_root / str(_entry(name, settings)["context"])


def wheels(name: str, settings: Settings) -> bool:
    """Return whether the wheels that the inventory names go into a build. Raises ImageError."""
    return bool(_entry(name, settings).get("wheels", False))


def _entry(name: str, settings: Settings) -> Mapping[str, Any]:
    try:
        return settings.catalogue[name]
    except KeyError:
        raise ImageError(f"There is no image {name}; known are {', '.join(sorted(settings.catalogue))}.") from None


def _archive_checksum(name: str, settings: Settings) -> str:
    sums = Path(settings.archive_dir) / "SHA256SUMS"
    try:
        lines = sums.read_text().splitlines()
    except OSError as error:
        raise ImageError(f"agent_stack_image_archive_dir: cannot read {sums}: {error.strerror}") from error
    for line in lines:
        checksum, _spaces, file_name = line.partition("  ")
        if file_name == f"{name}.tar":
            return checksum
    raise ImageError(f"agent_stack_image_archive_dir: {sums} names no {name}.tar.")


def _tree(root: Path) -> Iterator[bytes]:
    """Yield name, execute bit and content of every file of a build context, in a fixed order."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(part in IGNORED_DIRECTORIES or part.startswith(".") or part.endswith(".egg-info") for part in parts):
            yield f"{'/'.join(parts)} {path.stat().st_mode & 0o100}\n".encode()
            yield path.read_bytes()
