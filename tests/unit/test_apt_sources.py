"""apt's sources are found by their address, whatever their files are called."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _apt_sources

DOCKER = "https://download.docker.com/linux/debian"
LIST = f"# a comment\ndeb [arch=amd64 signed-by=/etc/apt/keyrings/docker.gpg] {DOCKER} trixie stable\n# deb {DOCKER} sid stable\n"
SOURCES = f"X-Repolib-Name: docker\nTypes: deb\nURIs: {DOCKER}/\nSuites: trixie\nComponents: stable\nSigned-By: /etc/apt/keyrings/docker.asc\n"
EMBEDDED = f"Types: deb\nURIs: {DOCKER}\nSuites: trixie trixie-test\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n x\n"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("/a.list", LIST, [(DOCKER, "trixie", "/etc/apt/keyrings/docker.gpg")]),
        ("/a.list", "deb http://deb.debian.org/debian trixie main contrib\n", [("http://deb.debian.org/debian", "trixie", "")]),
        ("/a.list", "deb-src [trusted=yes] file:/srv/x ./\n", [("file:/srv/x", "./", "")]),
        ("/a.list", "", []),
        ("/a.sources", SOURCES, [(DOCKER + "/", "trixie", "/etc/apt/keyrings/docker.asc")]),
        ("/a.sources", EMBEDDED, [(DOCKER, "trixie", "embedded"), (DOCKER, "trixie-test", "embedded")]),
        ("/a.sources", SOURCES + "Enabled: no\n", []),
        (
            "/a.sources",
            f"# x\n\n{SOURCES}\n\n{EMBEDDED}",
            [(DOCKER + "/", "trixie", "/etc/apt/keyrings/docker.asc"), *[(DOCKER, s, "embedded") for s in ("trixie", "trixie-test")]],
        ),
    ],
)
def test_entries(file: str, text: str, expected: list[tuple[str, str, str]]) -> None:
    entries = _apt_sources.parse(file, text)
    assert [(entry["uri"], entry["suite"], entry["signed_by"]) for entry in entries] == expected
    assert {entry["file"] for entry in entries} <= {file}


def entries(**files: str) -> list[dict[str, Any]]:
    return [entry for name, text in files.items() for entry in _apt_sources.parse(f"/{name.replace('_', '.')}", text)]


def test_a_repository_with_two_keys_is_a_conflict() -> None:
    both = entries(docker_list=LIST, docker_sources=SOURCES)
    assert _apt_sources.conflicts(both) == [(f"{DOCKER} trixie", ["/docker.list", "/docker.sources"])]
    assert _apt_sources.conflicts(entries(docker_list=LIST)) == []
    assert _apt_sources.conflicts(entries(a_list=LIST, b_list=LIST)) == [], "the same key twice is only a warning of apt's"
    other = LIST.replace("trixie", "bookworm")
    assert _apt_sources.conflicts(entries(a_list=other, docker_sources=SOURCES)) == [], "another suite has its own key"


@pytest.mark.parametrize(
    ("address", "found"),
    [("download.docker.com/linux", 1), ("https://download.docker.com/linux/debian/", 1), ("download.docker.com/linux/deb", 0), ("docker.com", 0)],
)
def test_a_source_is_found_by_its_address(address: str, found: int) -> None:
    assert len(_apt_sources.of(entries(any_name_list=LIST), address)) == found


def test_a_login_in_an_address_does_not_hide_it() -> None:
    text = "deb https://user:word@mirror.example.com/nvidia/deb/amd64 /\n"
    assert len(_apt_sources.of(entries(a_list=text), "https://mirror.example.com/nvidia/deb")) == 1


def test_which_files_are_nvidias_alone() -> None:
    generic = "deb [signed-by=/x.gpg] https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /\n"
    dead = "deb https://nvidia.github.io/nvidia-docker/ubuntu18.04/$(ARCH) /\n"
    mirror = "deb https://mirror.example.com/nvidia/amd64 /\n"
    found = entries(own_list=generic, renamed_list=generic, dead_list=dead, mixed_list=generic + LIST, mirror_list=mirror, docker_list=LIST)
    assert _apt_sources.toolkit_files(found, "https://mirror.example.com/nvidia", "/own.list") == ["/renamed.list", "/dead.list", "/mirror.list"]
