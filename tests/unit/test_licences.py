"""Which licence stands where: plugins, what they share with modules, and all else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.relative_to(ROOT) for path in (ROOT / "plugins").glob("*/*.py"))


@pytest.mark.parametrize("path", PLUGINS, ids=str)
def test_a_plugin_says_its_licence_and_the_text_is_there(path: Path) -> None:
    wanted = "BSD-2-Clause" if path.parent.name == "module_utils" else "GPL-3.0-or-later"
    head = (ROOT / path).read_text().splitlines()[:5]
    assert f"# SPDX-License-Identifier: {wanted}" in head
    assert any(f"LICENSES/{wanted}.txt" in line for line in head)
    assert (ROOT / "LICENSES" / f"{wanted}.txt").read_text().strip()


def test_galaxy_knows_all_of_them() -> None:
    named = yaml.safe_load((ROOT / "galaxy.yml").read_text())["license"]
    assert named == ["Apache-2.0", *sorted(path.stem for path in (ROOT / "LICENSES").iterdir())]
