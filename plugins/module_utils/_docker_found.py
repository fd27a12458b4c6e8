# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What to do about Docker on a host, as it was found. PRIVATE to the collection: it may change at any time.

An engine that is new enough is used, whoever installed it, and nothing is removed. Pure functions over what `_server_facts` read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _apt_sources

# `dockerd --validate` came with 23, devices by CDI with 25, IPv6 networks without experimental features with 27.
OLDEST_ENGINE, OLDEST_ENGINE_CDI, OLDEST_ENGINE_IPV6 = (23,), (25,), (27,)
# `docker compose up --wait` as community.docker calls it.
OLDEST_COMPOSE = (2, 18)
REPOSITORY = "download.docker.com/linux"
# Debian 12 and Ubuntu 22.04 were released with an engine that is too old for Compose v2 and BuildKit as they are used here.
DISTRIBUTION_PACKAGES = {
    "Debian 13": {"engine": ["docker.io", "docker-cli"], "compose": ["docker-compose"], "buildx": ["docker-buildx"]},
    "Ubuntu 24.04": {"engine": ["docker.io"], "compose": ["docker-compose-v2"], "buildx": ["docker-buildx"]},
    # Only beside an engine of its own that is there and new enough, as its updates have it.
    "Ubuntu 22.04": {"compose": ["docker-compose-v2"], "buildx": ["docker-buildx"]},
}
VENDOR_PACKAGES = {"engine": ["docker-ce", "docker-ce-cli", "containerd.io"], "compose": ["docker-compose-plugin"], "buildx": ["docker-buildx-plugin"]}
# What apt would remove for the sake of the other's packages.
DISPLACED_BY_VENDOR = ("docker.io", "containerd", "runc", "docker-compose-v2", "podman-docker")
DISPLACED_BY_DISTRIBUTION = ("docker-ce", "docker-ce-cli", "containerd.io", "podman-docker")
# A key of daemon.json and the flag of dockerd that sets the same; both at once end the daemon.
FLAGS = {"log-opts": "log-opt", "features": "feature", "labels": "label", "insecure-registries": "insecure-registry", "registry-mirrors": "registry-mirror"}


@dataclass(frozen=True)
class Plan:
    """What the role docker does.

    packages: names for apt, empty if nothing is missing
    repository: whether Docker's own repository has to be added for them
    options: the part of the wanted options that goes into daemon.json
    refused: sentences; not empty if the host cannot be served
    notes: sentences about what is done differently than asked
    """

    packages: list[str] = field(default_factory=list)
    repository: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def version(text: str) -> tuple[int, ...]:
    """The numbers at the beginning of a version: 26.1.5+dfsg1 is (26, 1, 5); nothing at all is ()."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text or "")
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def plan(facts: Mapping[str, Any], package_source: str, options: Mapping[str, Any], oldest: tuple[int, ...] = OLDEST_ENGINE) -> Plan:
    """Decide from the facts `engine`, `platform`, `sources` and `packages` of a host."""
    engine = facts["engine"]
    found = Plan()
    found.refused.extend(_refused(facts, oldest))
    if not found.refused:
        found = _installation(facts, package_source)
    kept, notes = daemon_options(engine, options)
    return Plan(found.packages, found.repository, kept, found.refused, [*found.notes, *notes])


def daemon_options(engine: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options that this engine can live with, and a sentence for each that it cannot."""
    kept = dict(options)
    notes = []
    if kept.get("live-restore") and engine["swarm"]:
        del kept["live-restore"]
        notes.append("The engine is a node of a swarm, which excludes live-restore: a restart of Docker restarts the containers.")
    set_by_unit = [key for key in kept if FLAGS.get(key, key) in engine["flags"]]
    for key in set_by_unit:
        del kept[key]
        notes.append(f"The unit of docker.service sets --{FLAGS.get(key, key)}, so {key} does not go into daemon.json.")
    driver = engine["flags"].get("log-driver") or engine["daemon"].get("log-driver", "")
    if driver and driver != options.get("log-driver", "json-file"):
        logging = [key for key in ("log-driver", "log-opts") if kept.pop(key, None) is not None]
        if logging:
            said = " and ".join(logging)
            notes.append(f"The host's containers log through the driver {driver}, which stays: {said} of docker_daemon_options is not applied.")
    return kept, notes


def _refused(facts: Mapping[str, Any], oldest: tuple[int, ...]) -> list[str]:
    """Sentences about an engine that cannot be used."""
    engine = facts["engine"]
    if engine["source"] == "snap":
        return [
            "Docker is installed as a snap, which sees no files below /opt and /var/lib. "
            "Move what runs in it, remove it (snap remove docker), and the play installs an engine."
        ]
    if engine["source"] == "podman-docker":
        return ["The command docker is Podman's (package podman-docker). Remove that package (apt-get remove podman-docker); Podman itself may stay."]
    said = []
    if engine["remote"]:
        said.append(f"{engine['remote']} sends root's docker command to another engine. Unset it for root: the stack runs on the engine of this host.")
    present = version(engine["version"])
    held = [name for name in ("docker.io", "docker-ce", "moby-engine") if facts["packages"].get(name, {}).get("held")]
    if present and present < oldest:
        hold = f" The package {held[0]} is on hold: apt-mark unhold {held[0]} lets apt upgrade it." if held else ""
        said.append(
            f"The host's Docker Engine is {engine['version']} ({engine['source']}); needed is {'.'.join(map(str, oldest))} or newer. "
            f"Upgrade it: the play replaces no engine that others installed.{hold}"
        )
    if engine["rootless"]:
        said.append("The Docker Engine runs rootless, which cannot give containers their own users and networks as the stack needs. Install the ordinary one.")
    daemon = engine["daemon"]
    if engine["daemon_error"]:
        said.append("/etc/docker/daemon.json on the host is not a JSON object. Repair it or move it away; it was not changed.")
    if daemon.get("iptables") is False or engine["flags"].get("iptables") == "false":
        said.append(
            'Docker is told not to write firewall rules ("iptables": false), so containers reach nothing and resolve no names. '
            "Remove that key from /etc/docker/daemon.json, or the flag from the unit, and restart Docker."
        )
    remap = daemon.get("userns-remap") or engine["flags"].get("userns-remap")
    if remap:
        said.append(
            f"Docker maps the users of containers to others (userns-remap is {remap}), so no container can read its secrets. "
            "Remove that key from /etc/docker/daemon.json and restart Docker; its images have to be made again."
        )
    return said


def _installation(facts: Mapping[str, Any], package_source: str) -> Plan:
    """Which packages are missing, and where they come from."""
    engine, platform = facts["engine"], facts["platform"]
    missing = [part for part, there in _parts(engine).items() if not there]
    refused: list[str] = []
    if not missing:
        return Plan(_requests(facts))
    source = _source(facts, package_source)
    if source == "distribution" and not set(missing) <= set(DISTRIBUTION_PACKAGES.get(platform, ())):
        refused.append(
            f'docker_package_source is "distribution"; on {platform} allowed are "auto" and "docker", because the distribution\'s engine has no Compose v2.'
        )
        return Plan(refused=refused)
    if source == "nobody":
        # Buildx is asked for where images are built.
        if "compose" in missing:
            refused.append(
                f"Docker Engine {engine['version']} came from none of the packages that are known here, and has no Compose v2.18 or newer. "
                "Install that where the engine came from."
            )
        return Plan(_requests(facts), refused=refused)
    catalogue = DISTRIBUTION_PACKAGES[platform] if source == "distribution" else VENDOR_PACKAGES
    packages = [name for part in missing for name in catalogue[part]]
    losers = [name for name in (DISPLACED_BY_VENDOR if source == "docker" else DISPLACED_BY_DISTRIBUTION) if name in facts["packages"] and name not in packages]
    if losers:
        other = {"docker": "distribution", "distribution": "docker"}[source]
        way = f'set docker_package_source to "{other}"' if other == "docker" or _has_engine(platform) else "use another host"
        refused.append(
            f"Installing {', '.join(packages)} would have apt remove {', '.join(losers)}, which something on the host may need. "
            f"Remove {'it' if len(losers) == 1 else 'them'} yourself if nothing does, or {way}."
        )
    repository = source == "docker" and not _apt_sources.of(facts["sources"], REPOSITORY)
    return Plan([*packages, *_requests(facts)], repository, refused=refused)


def _parts(engine: Mapping[str, Any]) -> dict[str, bool]:
    return {"engine": bool(engine["version"]), "compose": version(engine["compose"]) >= OLDEST_COMPOSE, "buildx": bool(engine["buildx"])}


def _source(facts: Mapping[str, Any], package_source: str) -> str:
    """Where missing packages come from: what is there decides, then the operator, then the distribution."""
    engine = facts["engine"]
    if engine["source"]:
        return {"docker.io": "distribution", "docker-ce": "docker"}.get(engine["source"], "nobody")
    if package_source != "auto":
        return package_source
    if "containerd.io" in facts["packages"]:
        return "docker"
    return "distribution" if _has_engine(facts["platform"]) else "docker"


def _has_engine(platform: str) -> bool:
    """Whether the distribution's own engine is new enough."""
    return "engine" in DISTRIBUTION_PACKAGES.get(platform, ())


def _requests(facts: Mapping[str, Any]) -> list[str]:
    """Ansible's Docker modules talk to the engine with it."""
    return [] if "python3-requests" in facts["packages"] else ["python3-requests"]
