"""Make the checkout importable under its collection name, as ansible.cfg does for Ansible, and name what drills are marked with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / ".collections"), str(ROOT / "tools"), str(ROOT / "tests" / "host"), str(ROOT / "tests" / "swap")]

# Fixtures of unit tests that run a play, which takes seconds where a table takes none.
PLAYED = {"installed", "played", "rendered", "site"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: in `make test` already; the rest comes in `make test-all`")
    config.addinivalue_line("markers", "long: in `make drills` alone")
    config.addinivalue_line("markers", "play: runs Ansible; not in `make check`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if PLAYED & set(getattr(item, "fixturenames", ())):
            item.add_marker("play")
