"""What cleaning removes: only what nothing uses, that is old, and that is the stack's."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _clean
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._uninstall import Host, UninstallError

NOW = time.time()
OLD, YOUNG = 30, 1


class Fake(Host):  # type: ignore[misc]  # modules of the collection carry no types for its tests
    def __init__(self, root: Path) -> None:
        super().__init__(root, self.answer)
        self.images: list[tuple[str, str, float]] = []
        self.containers: list[str] = []
        self.cache = "0B"
        self.did: list[str] = []

    def answer(self, *command: str, **_environment: str) -> tuple[int, str]:
        match command[:3]:
            case ("docker", "image", "ls"):
                made = [time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.localtime(NOW - age * 86400)) for _, _, age in self.images]
                rows = [(*name.split(":"), at, size) for (name, size, _), at in zip(self.images, made, strict=True)]
                return 0, "".join("\t".join(row) + "\n" for row in rows)
            case ("docker", "ps", _):
                return 0, "".join(f"{name}\n" for name in self.containers)
            case ("docker", "system", "df"):
                return 0, f"Images\t9GB (10%)\nBuild Cache\t{self.cache}\n"
        self.did.append(" ".join(command))
        if "theirs" in command:
            return 1, "conflict: unable to remove"
        return 0, "Total:\t1.5GB\n" if "prune" in command else "Untagged"

    def model(self, name: str, age: float, source: str | None = "Qwen/Qwen3-8B") -> Path:
        path: Path = self.path(f"/data/models/{name}")
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"x" * 10000)
        if source is not None:
            (path / ".complete").write_text(json.dumps({"source": {"hub": source}}))
            os.utime(path / ".complete", (NOW - age * 86400,) * 2)
        os.utime(path, (NOW - age * 86400,) * 2)
        return path

    def project(self, name: str, text: str) -> None:
        path = self.path(f"/opt/{name}/compose.yml")
        path.parent.mkdir(parents=True)
        path.write_text(text)


@pytest.fixture
def host(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


WISH = _clean.Wish("/opt", "/data", 7, "Qwen/Qwen3-8B", ("agent-stack/agent:new",))


def names(host: Fake, wish: _clean.Wish = WISH) -> list[str]:
    return [item.name for item in _clean.find(host, wish, ["models", "images", "build_cache"], NOW)]


@pytest.mark.parametrize(
    ("name", "age", "source", "project", "goes"),
    [
        pytest.param("a--b", OLD, "a/b", "", True, id="unused"),
        pytest.param("a--b", YOUNG, "a/b", "", False, id="young"),
        pytest.param("a--b", OLD, "a/b", "command: [serve, /models/a--b]", False, id="in a slot"),
        pytest.param("a--b", OLD, "a/b", "command: [serve, /models/a--b-large]", True, id="another one's name begins so"),
        pytest.param("a--b", OLD, "a/b", '"/models/a--b"', False, id="in a slot, quoted"),
        pytest.param("a--b", OLD, "Qwen/Qwen3-8B", "", False, id="the inventory's"),
        pytest.param("a--b", OLD, None, "", False, id="not the stack's"),
        pytest.param(".a--b.1f2e.partial", OLD, None, "", True, id="an interrupted fetch"),
        pytest.param(".a--b.1f2e.partial", 0, None, "", False, id="a fetch under way"),
        pytest.param(".a--b.previous", OLD, "Qwen/Qwen3-8B", "", True, id="what a fetch replaced"),
    ],
)
def test_which_models_go(host: Fake, name: str, age: float, source: str | None, project: str, goes: bool) -> None:
    path = host.model(name, age, source)
    host.project("vllm-blue", project)
    found = _clean.find(host, WISH, ["models"], NOW)
    assert [item.name for item in found] == ([f"/data/models/{name}"] if goes else [])
    for item in found:
        assert item.size >= 10000
        assert _clean.remove(host, WISH, item) == item.size
    assert path.exists() is not goes


def test_links_and_files_of_others_stay(host: Fake) -> None:
    path = host.model("a--b", OLD, "a/b")
    (path.parent / "link").symlink_to(path)
    (path.parent / ".a--b.lock").touch()
    assert names(host) == ["/data/models/a--b"]


@pytest.mark.parametrize(
    ("image", "age", "project", "container", "goes"),
    [
        pytest.param("agent-stack/agent:old", OLD, "", "", True, id="an earlier build"),
        pytest.param("agent-stack/agent:old", YOUNG, "", "", False, id="young"),
        pytest.param("agent-stack/agent:new", OLD, "", "", False, id="this version's"),
        pytest.param("agent-stack/agent:old", OLD, "image: agent-stack/agent:old", "", False, id="in a project"),
        pytest.param("agent-stack/agent:old", OLD, "image: agent-stack/agent:older", "", True, id="another one's name begins so"),
        pytest.param("agent-stack/agent:old", OLD, "", "agent-stack/agent:old", False, id="in a container"),
        pytest.param("redis:7", OLD, "", "", True, id="an earlier one from a registry"),
        pytest.param("redis:7", OLD, "image: docker.io/library/redis:7", "", False, id="in a project, by the registry's name"),
        pytest.param("prom/prometheus:v1", OLD, "", "", True, id="an earlier one of another registry's user"),
        pytest.param("redis:6", OLD, "", "", False, id="one that others pulled"),
        pytest.param("theirs/redis:7", OLD, "", "", False, id="of others"),
        pytest.param("agent-stack/agent:<none>", OLD, "", "", False, id="without a tag"),
    ],
)
def test_which_images_go(host: Fake, image: str, age: float, project: str, container: str, goes: bool) -> None:
    host.images = [(image, "1.2GB", age)]
    host.containers = [container]
    host.project("agent", project)
    host.path("/opt/pulled-images").write_text("docker.io/library/redis:7\ndocker.io/prom/prometheus:v1@sha256:1f\n")
    assert names(host) == ([image] if goes else [])


def test_the_cache_of_builds_goes_by_its_age(host: Fake) -> None:
    host.cache = "2.5GB"
    (item,) = _clean.find(host, WISH, ["build_cache"], NOW)
    assert item.size == 2_500_000_000
    assert _clean.remove(host, WISH, item) == 1_500_000_000
    assert host.did == ["docker builder prune --force --filter until=168h"]


def test_only_the_kinds_that_are_asked_for(host: Fake) -> None:
    host.model("a--b", OLD, "a/b")
    host.images, host.cache = [("agent-stack/agent:old", "1GB", OLD)], "1GB"
    assert [item.kind for item in _clean.find(host, WISH, ["images"], NOW)] == ["image"]
    assert [item.kind for item in _clean.find(host, WISH, ["models", "images", "build_cache"], NOW)] == ["model", "image", "build cache"]


def test_an_image_that_cannot_go_is_a_sentence(host: Fake) -> None:
    with pytest.raises(UninstallError, match="`docker image rm theirs` ended with 1: conflict: unable to remove"):
        _clean.remove(host, WISH, _clean.Item("image", "theirs", 1, 1))


@pytest.mark.parametrize(("text", "size"), [("0B", 0), ("12.5kB", 12500), ("1.2GB (30%)", 1_200_000_000), ("3TB", 3 * 10**12)])
def test_sizes_are_read_as_docker_writes_them(text: str, size: int) -> None:
    assert _clean.parse_size(text) == size


def test_a_size_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="'much' is no size"):
        _clean.parse_size("much")


def test_an_empty_host_has_nothing(host: Fake) -> None:
    assert names(host) == []
