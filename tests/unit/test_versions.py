"""One rule for versions: galaxy.yml has that of the next release, and what no release has yet was added in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NEXT = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
RELEASES = yaml.safe_load((ROOT / "changelogs" / "changelog.yaml").read_text())["releases"]
PLUGINS = [path for kind in ("modules", "lookup") for path in sorted((ROOT / "plugins" / kind).glob("*.py"))]


def key(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_the_next_release_is_not_an_old_one() -> None:
    waiting = list((ROOT / "changelogs" / "fragments").glob("*.yml"))
    newest = max(RELEASES, key=key)
    # Between a release and the first change after it both are the same.
    assert key(NEXT) > key(newest) or (not waiting and newest == NEXT)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_a_plugin_was_added_in_the_release_that_lists_it(path: Path) -> None:
    listed = [
        version
        for version, release in RELEASES.items()
        for plugin in [*release.get("modules", []), *release.get("plugins", {}).get("lookup", [])]
        if plugin["name"] == path.stem
    ]
    (added,) = re.findall(r"^version_added: (\S+)$", path.read_text(), re.M)
    assert [added] == (listed or [NEXT])
