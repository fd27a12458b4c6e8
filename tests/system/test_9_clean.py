"""`make demo-clean` leaves nothing: a second, empty host is made and cleaned away, while the demo's own keeps what it needs."""

from __future__ import annotations

from pathlib import Path

import demo
import host as test_host
import pytest

NAME = f"{demo.NAME}-clean"


def present(kind: str, name: str) -> bool:
    return bool(test_host.run("docker", kind, "ls", *(("--all",) if kind == "container" else ()), "--quiet", "--filter", f"name={name}"))


def test_clean_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NAME", NAME)
    monkeypatch.setattr(demo, "STATE", tmp_path / ".demo")
    monkeypatch.setattr(demo, "CA_FILE", tmp_path / ".demo" / "ca.pem")
    monkeypatch.setattr(demo, "SECRETS", tmp_path / "secrets.yml")
    images = test_host.run("docker", "image", "ls", "--quiet", "--filter", "reference=agent-stack-test/*")
    try:
        test_host.up(NAME, demo.DOMAIN, [])
        demo.trust_pebble()
        demo.SECRETS.write_text("secret")
        assert present("container", NAME)
        assert present("volume", f"{NAME}-docker")
    finally:
        demo.clean(0)
    assert not present("container", NAME)
    assert not present("volume", f"{NAME}-docker")
    assert list(tmp_path.iterdir()) == []
    # The demo's own host still stands on them; with the last host they go.
    assert test_host.run("docker", "image", "ls", "--quiet", "--filter", "reference=agent-stack-test/*") == images
