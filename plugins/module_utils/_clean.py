# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What of the stack's nobody uses any more, and takes room on the disk. PRIVATE to the collection: it may change at any time.

Used is what a Compose project of the stack names, that of the model which waits for a rollback included, what a container runs, and what is younger than
the days that are given.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._uninstall import Host, UninstallError, familiar, pulled_images

MARKER = ".complete"
# .NAME.DIGEST.partial and .NAME.previous: what a fetch works in, and what it replaces.
LEFTOVER = re.compile(r"\..+\.(partial|previous)")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DAY = 86400


@dataclass(frozen=True)
class Item:
    """Something that may go. `size` is in bytes; images share layers, so that theirs is the most that they free."""

    kind: str
    name: str
    size: int
    age_days: float


@dataclass(frozen=True)
class Wish:
    """What is to stay: `model` is what the inventory wants to serve, `images` the references that this version uses."""

    root: str
    data: str
    days: float
    model: str = ""
    images: tuple[str, ...] = ()


def projects(host: Host, root: str) -> str:
    """Return the text of all Compose projects of the stack."""
    return "\n".join(host.path(path).read_text() for path in host.found(f"{root}/*/compose.yml"))


def models(host: Host, wish: Wish, used: str, now: float) -> list[Item]:
    """Return the models that no slot has and the inventory does not name, and what interrupted fetches left."""
    items = []
    directory = host.path(f"{wish.data}/models")
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        marker = path / MARKER
        leftover = bool(LEFTOVER.fullmatch(path.name))
        if path.is_symlink() or not path.is_dir() or not (marker.is_file() or leftover):
            # Not fetched by the stack.
            continue
        age = (now - (marker if marker.is_file() else path).stat().st_mtime) / DAY
        in_use = re.search(rf"/models/{re.escape(path.name)}(?![A-Za-z0-9._-])", used) is not None
        if in_use or age < wish.days or (not leftover and _source(marker) == wish.model):
            continue
        items.append(Item("model", f"{wish.data}/models/{path.name}", tree_size(path), age))
    return items


def _source(marker: Path) -> str:
    """Return what a model was fetched as: its name on the hub, or the package that brought it."""
    try:
        source = json.loads(marker.read_text())["source"]
        return str(source.get("hub") or source.get("package"))
    except (OSError, ValueError, KeyError, AttributeError):
        return ""


def tree_size(path: Path) -> int:
    """Return the bytes below a directory. A file with several names counts once."""
    files = {(status.st_dev, status.st_ino): status.st_blocks * 512 for entry in path.rglob("*") for status in [entry.lstat()]}
    return sum(files.values())


def images(host: Host, wish: Wish, used: str, now: float) -> list[Item]:
    """Return images of the stack, of this version or another, that no project names and no container runs."""
    running = set(host.lines("docker", "ps", "--all", "--no-trunc", "--format", "{{.Image}}"))
    wanted = {familiar(reference) for reference in wish.images}
    pulled = {familiar(reference) for reference in pulled_images(host, wish.root)}
    items = []
    listing = ("docker", "image", "ls", "--format", "{{.Repository}}\t{{.Tag}}\t{{.CreatedAt}}\t{{.Size}}")
    for line in host.lines(*listing):
        repository, tag, created, size = line.split("\t")
        name = f"{repository}:{tag}"
        ours = repository.startswith("agent-stack/") or (repository, tag) in pulled
        # As in `image: agent-stack/redis:1f`, and not as a part of a longer one.
        named = re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", used) is not None
        age = (now - time.mktime(time.strptime(created[:19], "%Y-%m-%d %H:%M:%S"))) / DAY
        if ours and tag != "<none>" and not named and name not in running and (repository, tag) not in wanted and age >= wish.days:
            items.append(Item("image", name, parse_size(size), age))
    return sorted(items, key=lambda item: item.name)


def build_cache(host: Host, wish: Wish) -> list[Item]:
    """Return what builds left and nothing uses. The engine itself knows which of it is old enough, and says it only when it removes it."""
    for line in host.lines("docker", "system", "df", "--format", "{{.Type}}\t{{.Reclaimable}}"):
        kind, size = line.split("\t")
        if kind == "Build Cache" and parse_size(size):
            return [Item("build cache", "of the engine", parse_size(size), wish.days)]
    return []


def parse_size(text: str) -> int:
    """Return the bytes of 1.2GB, as Docker writes it, with or without a share in parentheses. Raises ValueError."""
    match = re.match(r"([\d.]+)\s*([kMGT]?B)", text)
    if match is None:
        raise ValueError(f"{text!r} is no size")
    return int(float(match[1]) * UNITS[match[2]])


def find(host: Host, wish: Wish, kinds: Iterable[str], now: float) -> list[Item]:
    """Return all that may go, of these kinds: models, images, build_cache."""
    used = projects(host, wish.root)
    wanted = set(kinds)
    found = models(host, wish, used, now) if "models" in wanted else []
    found += images(host, wish, used, now) if "images" in wanted else []
    return found + (build_cache(host, wish) if "build_cache" in wanted else [])


def remove(host: Host, wish: Wish, item: Item) -> int | None:
    """Remove it. Return the bytes that the engine says became free, or None if it does not say. Raises UninstallError."""
    if item.kind == "model":
        shutil.rmtree(host.path(item.name))
        return item.size
    hours = max(0, round(wish.days * 24))
    command = ["docker", "image", "rm", item.name] if item.kind == "image" else ["docker", "builder", "prune", "--force", "--filter", f"until={hours}h"]
    status, output = host.run(*command)
    if status != 0:
        raise UninstallError(f"`{' '.join(command)}` ended with {status}: {output.strip()}")
    total = re.search(r"^Total[^:]*:\s*(.+)$", output, re.M)
    return parse_size(total[1]) if total else None


def rooms(host: Host, wish: Wish) -> dict[str, Any]:
    """Return the free bytes where models and images are."""
    found = {}
    for path in (wish.data, "/var/lib/docker"):
        if host.path(path).is_dir():
            found[path] = shutil.disk_usage(host.path(path)).free
    return found
