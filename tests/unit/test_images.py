"""Which image stands for a name: a table of sources, and digests that follow the content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _images


@pytest.fixture
def settings(tmp_path: Path) -> _images.Settings:
    (tmp_path / "redis" / "tests").mkdir(parents=True)
    (tmp_path / "redis" / "Dockerfile").write_text("FROM x\n")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "SHA256SUMS").write_text("0123456789abcdef  redis.tar\n")
    return _images.Settings(
        catalogue={
            "redis": {"reference": "docker.io/library/redis:8", "context": "redis", "base": "trixie"},
            "agent": {"context": "redis", "base": "trixie"},
            "grafana": {"reference": "docker.io/grafana/grafana:12"},
        },
        base_images={"trixie": "docker.io/library/debian:13"},
        source="build",
        collection_root=tmp_path,
        archive_dir=str(tmp_path / "archives"),
    )


@pytest.mark.parametrize(
    ("name", "source", "origin"),
    [
        ("redis", "registry", "registry"),
        ("redis", "build", "build"),
        ("redis", "archive", "archive"),
        ("agent", "registry", "build"),
        ("grafana", "registry", "registry"),
    ],
)
def test_origin(settings: _images.Settings, name: str, source: str, origin: str) -> None:
    assert _images.origin(name, replace(settings, source=source)) == origin


@pytest.mark.parametrize(
    ("source", "digests", "reference"),
    [
        ("registry", {}, "docker.io/library/redis:8"),
        ("registry", {"docker.io/library/redis:8": "sha256:12"}, "docker.io/library/redis:8@sha256:12"),
        ("archive", {}, "agent-stack/redis:0123456789ab"),
    ],
)
def test_reference(settings: _images.Settings, source: str, digests: dict[str, str], reference: str) -> None:
    assert _images.reference("redis", replace(settings, source=source, digests=digests)) == reference


def test_overrides_win(settings: _images.Settings) -> None:
    overridden = replace(settings, source="archive", overrides={"redis": "mirror.example/redis:9"})
    assert _images.reference("redis", overridden) == "mirror.example/redis:9"
    assert _images.origin("redis", overridden) == "registry"


def test_own_context_is_built_on_trixie_whatever_the_source(settings: _images.Settings, tmp_path: Path) -> None:
    own = replace(settings, source="registry", contexts={"grafana": str(tmp_path / "redis")})
    assert _images.origin("grafana", own) == "build"
    assert _images.context("grafana", own) == tmp_path / "redis"
    assert _images.base("grafana", own) == "docker.io/library/debian:13"


@pytest.mark.parametrize(
    ("path", "content", "changes"),
    [
        ("redis/Dockerfile", "FROM y\n", True),
        ("redis/new", "", True),
        ("redis/tests/test_it.py", "", False),
        ("redis/.cache", "", False),
    ],
)
def test_built_tag_follows_the_context(settings: _images.Settings, tmp_path: Path, path: str, content: str, changes: bool) -> None:
    before = _images.reference("redis", settings)
    (tmp_path / path).write_text(content)
    assert (_images.reference("redis", settings) != before) is changes


def test_built_tag_follows_serial_mirror_and_certificates(settings: _images.Settings, tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.write_text("1")
    variants = [
        settings,
        replace(settings, build_serial=2),
        replace(settings, debian_mirror="http://mirror.example/debian"),
        replace(settings, ca_certificates=(str(certificate),)),
    ]
    references = {_images.reference("redis", variant) for variant in variants}
    certificate.write_text("2")
    references.add(_images.reference("redis", variants[-1]))
    assert len(references) == 5


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("nothing", "build", "There is no image nothing; known are agent, grafana, redis."),
        ("grafana", "build", "grafana cannot be built here"),
        ("agent", "archive", "names no agent.tar"),
    ],
)
def test_errors_name_the_cause(settings: _images.Settings, name: str, source: str, message: str) -> None:
    with pytest.raises(_images.ImageError, match=message):
        _images.reference(name, replace(settings, source=source))


def test_missing_archive_directory(settings: _images.Settings) -> None:
    with pytest.raises(_images.ImageError, match="agent_stack_image_archive_dir: cannot read /nowhere/SHA256SUMS: No such file"):
        _images.reference("redis", replace(settings, source="archive", archive_dir="/nowhere"))
