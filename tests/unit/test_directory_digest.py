"""The digest that decides whether a container is recreated."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.modules.directory_digest import directory_digest

KEY = b"machine"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "config" / "sub").mkdir(parents=True)
    (tmp_path / "config" / "a").write_text("1")
    (tmp_path / "config" / "sub" / "b").write_text("2")
    return tmp_path / "config"


def test_same_content_same_digest(tree: Path) -> None:
    digest = directory_digest([str(tree)], KEY)
    (tree / "a").write_text("1")
    assert directory_digest([str(tree)], KEY) == digest
    assert len(digest) == 16


@pytest.mark.parametrize(
    ("path", "content"),
    [("a", "2"), ("sub/b", ""), ("new", ""), ("sub/new", "2")],
)
def test_every_change_changes_it(tree: Path, path: str, content: str) -> None:
    digest = directory_digest([str(tree)], KEY)
    (tree / path).write_text(content)
    assert directory_digest([str(tree)], KEY) != digest


def test_content_cannot_move_between_files_unseen(tree: Path) -> None:
    digest = directory_digest([str(tree)], KEY)
    (tree / "a").write_text("2")
    (tree / "sub" / "b").write_text("1")
    assert directory_digest([str(tree)], KEY) != digest


def test_key_matters_and_missing_directory_is_empty(tree: Path) -> None:
    assert directory_digest([str(tree)], b"other") != directory_digest([str(tree)], KEY)
    assert directory_digest([str(tree), "/nowhere"], KEY) == directory_digest([str(tree)], KEY)
