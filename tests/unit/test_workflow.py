"""The workflow runs make targets that exist, and every part of `make test-all`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def parts(name: str) -> set[str]:
    """The targets in a variable of the Makefile, with those of the variables in it."""
    found = re.search(rf"^{name} := (.*)$", MAKEFILE, re.M)
    assert found is not None
    words = found[1].split()
    return {part for word in words for part in (parts(word[2:-1]) if word.startswith("$(") else {word})}


def targets() -> set[str]:
    rules = re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.M)
    return {target for rule in rules for target in rule.split()}


def test_every_target_of_the_workflow_exists() -> None:
    assert set(JOBS["part"]["strategy"]["matrix"]["part"]) | {"check", "sanity"} <= targets()


def test_every_part_of_test_all_is_in_the_workflow() -> None:
    """The parts that go on with a host are what the whole scenario holds; images are made by what needs them."""
    wanted = {part.removeprefix("more-") for part in parts("TEST_PARTS") | parts("ALL_PARTS") | parts("LAST_PARTS")}
    wanted = {{"swap": "molecule-swap", "nvidia": "molecule-nvidia", "hosts": "molecule-hosts"}.get(part, part) for part in wanted}
    assert wanted - {"images"} == set(JOBS["part"]["strategy"]["matrix"]["part"]) | {"sanity"} | parts("CHECK_PARTS")


def test_every_part_is_a_target() -> None:
    assert parts("TEST_PARTS") | parts("ALL_PARTS") | parts("LAST_PARTS") | parts("CHECK_PARTS") <= targets()
