"""Marks the tests that run a play or a server, which takes seconds where a table takes none."""

from __future__ import annotations

import pytest

PLAYED = {"installed", "played", "rendered", "site", "stack"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if PLAYED & set(getattr(item, "fixturenames", ())):
            item.add_marker("play")
