"""Digests come from a registry or not at all. The registry's answers are played by a `docker` program of the test's own."""

from __future__ import annotations

import json
from pathlib import Path

import pin_images
import pytest

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "roles"
    for role, text in {
        "redis": "images: {redis: {reference: r/redis:8}}",
        "agent": "images: {agent: {context: x}}",
        "base": "base_images: {trixie: r/debian:13}",
    }.items():
        (path / role / "meta").mkdir(parents=True)
        (path / role / "meta" / "component.yml").write_text(f"{text}\n")
    monkeypatch.setattr(pin_images, "ROLES", path)
    monkeypatch.setattr(pin_images, "DIGESTS", tmp_path / "digests.json")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return path


def docker(directory: Path, script: str) -> None:
    program = directory / "bin" / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_every_reference_is_asked_for_and_written(catalogue: Path) -> None:
    docker(catalogue.parent, f'echo "$@" >> {catalogue.parent}/asked; echo {DIGEST}')
    assert pin_images.main() == 0
    assert json.loads((catalogue.parent / "digests.json").read_text()) == {"r/debian:13": DIGEST, "r/redis:8": DIGEST}
    asked = (catalogue.parent / "asked").read_text()
    assert [line.split()[-1] for line in asked.splitlines()] == ["r/debian:13", "r/redis:8"]


@pytest.mark.parametrize("script", ["echo denied >&2; exit 1", "echo not-a-digest; exit 0", "exit 0"])
def test_nothing_is_written_when_one_registry_gives_none(catalogue: Path, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    docker(catalogue.parent, f'case "$*" in *redis*) {script};; esac; echo {DIGEST}')
    assert pin_images.main() == 1
    assert not (catalogue.parent / "digests.json").exists()
    assert "error: r/redis:8" in capsys.readouterr().err


def test_the_collections_own_catalogue_is_read() -> None:
    references = pin_images.references(pin_images.ROLES)
    assert len(references) > 10
    assert all(":" in reference.rpartition("/")[2] and not reference.endswith(":latest") for reference in references)
