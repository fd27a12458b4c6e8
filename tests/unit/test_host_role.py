"""The files of the role host, as the programs that read them do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml
from programs import ROOT

ROLE = ROOT / "roles" / "host"


def render(name: str) -> str:
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)  # noqa: S701  no HTML
    environment.filters["comment"] = lambda text: f"# {text}"
    return environment.from_string((ROLE / "templates" / name).read_text()).render(ansible_managed="managed", host_journal_max_mib=512)


@pytest.mark.skipif(shutil.which("apt-config") is None, reason="apt reads it")
def test_apt_reads_the_upgrades(tmp_path: Path) -> None:
    (tmp_path / "upgrades").write_text(render("upgrades.j2"))
    dump = subprocess.run(["apt-config", "--config-file", tmp_path / "upgrades", "dump"], capture_output=True, text=True, check=True).stdout
    settings = dict(re.findall(r'(?m)^(\S+) "(.*)";$', dump))
    assert settings["APT::Periodic::Unattended-Upgrade"] == settings["APT::Periodic::Update-Package-Lists"] == "1"
    assert settings["Unattended-Upgrade::Automatic-Reboot"] == "false"
    patterns = re.findall(r'Unattended-Upgrade::Package-Blacklist:: "(.*)";', dump)
    # As unattended-upgrades does: each is a regular expression that a name must begin with.
    held = {
        name: any(re.match(pattern, name) for pattern in patterns) for name in ("nvidia-driver", "libnvidia-ml1", "nginx", "docker.io", "linux-image-amd64")
    }
    assert held == {"nvidia-driver": True, "libnvidia-ml1": True, "nginx": False, "docker.io": False, "linux-image-amd64": False}


def test_the_kernels_settings_are_settings() -> None:
    lines = [line for line in render("sysctl.conf.j2").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"-[a-z0-9_.]+=[0-9]", line)] == []
    names = [line[1:].partition("=")[0] for line in lines]
    assert len(set(names)) == len(names)
    # Docker needs the one, and networks with two ways the other.
    assert not [name for name in names if "forward" in name or "rp_filter" in name]
    assert [name for name in names if name.startswith("net.ipv4.conf") and not Path("/proc/sys", *name.split(".")).exists()] == []


def test_the_journal_has_a_bound() -> None:
    assert re.search(r"(?m)^\[Journal\]\nSystemMaxUse=512M$", render("journald.conf.j2"))


def test_nothing_is_on_by_default() -> None:
    assert not any(yaml.safe_load((ROLE / "defaults" / "main.yml").read_text()).values())
