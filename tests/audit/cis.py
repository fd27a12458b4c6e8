"""What the CIS Docker Benchmark 1.6.0 says of an engine, its containers and their images: rules over what the engine itself says of them.

Of section 2 the settings that the role docker is asked about, of sections 4 and 5 what `docker inspect` can show. Pure functions.
Not here, because no inspection shows it: 4.2 to 4.5, 4.7, 4.8, 4.11 and 4.12 (where an image is from), 5.9 (which ports are needed),
5.23 and 5.24 (what somebody runs with `docker exec`), 5.28 (whether an image is the latest).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SENSITIVE = {"/", "/boot", "/dev", "/etc", "/lib", "/proc", "/sys", "/usr"}
SOCKET = re.compile(r"/(docker|containerd)\.sock$")
SECRET = re.compile(r"(?i)(password|secret|token|api_?key)[a-z_]*=[^/\s]")
Document = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class Finding:
    """Something that a judge does not like: `rule` and `subject` are what a waiver names."""

    rule: str
    subject: str
    words: str


@dataclass(frozen=True)
class Engine:
    """What was asked of an engine: `docker info`, daemon.json, and `docker inspect` of every container and of every image that one has."""

    info: Document
    daemon: Document
    containers: Sequence[Document]
    images: Mapping[str, Document]
    # What each container runs, by its name: the programs' names.
    processes: Mapping[str, Sequence[str]]
    # Docker's record of how an image was built, by the image's id.
    history: Mapping[str, str]


def judge(engine: Engine) -> list[Finding]:
    """Return all findings."""
    found = list(_daemon(engine))
    for item in engine.containers:
        name = item["Name"].lstrip("/")
        found += [Finding(rule, name, words) for rule, broken, words in _container(item, engine) if broken]
    for identity, image in engine.images.items():
        name = (image.get("RepoTags") or [identity])[0]
        found += [Finding(rule, name, words) for rule, broken, words in _image(image, engine.history.get(identity, "")) if broken]
    return sorted(found)


Row = tuple[str, bool, str]


def _daemon(engine: Engine) -> Iterator[Finding]:
    daemon, info = engine.daemon, engine.info
    rows: list[Row] = [
        ("cis-2.2", daemon.get("icc") is not False, "containers of the default bridge may talk to each other"),
        ("cis-2.4", daemon.get("iptables") is False, "the engine writes no firewall rules"),
        ("cis-2.5", bool(set((info.get("RegistryConfig") or {}).get("InsecureRegistryCIDRs") or []) - {"127.0.0.0/8", "::1/128"}), "insecure registries"),
        ("cis-2.9", not any("userns" in option for option in info.get("SecurityOptions") or []), "users of containers are users of the host"),
        ("cis-2.14", daemon.get("no-new-privileges") is not True, "containers may gain privileges unless they say otherwise"),
        ("cis-2.15", info.get("LiveRestoreEnabled") is not True, "containers end with the engine"),
        ("cis-2.16", daemon.get("userland-proxy") is not False, "published ports have a proxy"),
        ("cis-2.18", info.get("ExperimentalBuild") is True, "experimental features are on"),
        ("cis-5.1", (info.get("Swarm") or {}).get("LocalNodeState", "inactive") != "inactive", "the engine is a node of a swarm"),
    ]
    yield from (Finding(rule, "engine", words) for rule, broken, words in rows if broken)


def _container(item: Document, engine: Engine) -> Iterator[Row]:
    host, config = item["HostConfig"], item["Config"]
    security = host.get("SecurityOpt") or []
    kernel = " ".join(engine.info.get("SecurityOptions") or [])
    mounts = item.get("Mounts") or []
    bindings = [entry for entries in ((item.get("NetworkSettings") or {}).get("Ports") or {}).values() for entry in entries or []]
    user = (config.get("User") or "").partition(":")[0]
    sources = [mount.get("Source", "") for mount in mounts if mount.get("Type") == "bind"]
    sensitive = sorted(set(sources) & SENSITIVE)
    limits = {entry["Name"] for entry in host.get("Ulimits") or []}
    tmpfs = [path for path, options in (host.get("Tmpfs") or {}).items() if "size=" not in options]
    yield "cis-4.1", user in {"", "0", "root"}, "it runs as root"
    yield "cis-5.2", "apparmor" in kernel and (item.get("AppArmorProfile") or "unconfined") == "unconfined", "no AppArmor profile"
    yield "cis-5.3", "selinux" in kernel and not any(option.startswith("label") for option in security), "no SELinux label"
    yield "cis-5.4", bool(host.get("CapAdd")) or "ALL" not in (host.get("CapDrop") or []), "it keeps capabilities"
    yield "cis-5.5", host.get("Privileged") is not False, "it is privileged"
    yield "cis-5.6", bool(sensitive), f"it mounts {', '.join(sensitive)} of the host"
    yield "cis-5.7", "sshd" in engine.processes.get(item["Name"].lstrip("/"), []), "it runs sshd"
    yield "cis-5.8", any(int(entry["HostPort"] or 0) < 1024 for entry in bindings), "it has a privileged port of the host"
    yield "cis-5.10", host.get("NetworkMode") == "host", "it is in the host's network"
    yield "cis-5.11", not host.get("Memory"), "its memory is not limited"
    yield "cis-5.12", not (host.get("CpuShares") or host.get("NanoCpus")), "its processor time is not limited"
    yield "cis-5.13", host.get("ReadonlyRootfs") is not True, "its root can be written"
    yield "cis-5.14", any(entry["HostIp"] in {"", "0.0.0.0", "::"} for entry in bindings), "it publishes a port on every address"
    policy = host.get("RestartPolicy") or {}
    bounded = policy.get("Name") in {"", "no"} or (policy.get("Name") == "on-failure" and 0 < policy.get("MaximumRetryCount", 0) <= 5)
    yield "cis-5.15", not bounded, "it is restarted without end"
    yield "cis-5.16", host.get("PidMode") == "host", "it sees the host's processes"
    yield "cis-5.17", host.get("IpcMode") == "host", "it shares the host's memory segments"
    yield "cis-5.18", bool(host.get("Devices")), "it has devices of the host"
    yield "cis-5.19", "nofile" not in limits, "its open files are not limited"
    yield "cis-5.20", any(mount.get("Propagation") in {"shared", "rshared"} for mount in mounts), "its mounts reach the host"
    yield "cis-5.21", host.get("UTSMode") == "host", "it shares the host's name"
    yield "cis-5.22", any(re.fullmatch("seccomp[=:]unconfined", option) for option in security), "it may make any system call"
    yield "cis-5.25", bool(host.get("CgroupParent")), "it is in a control group of its own choice"
    yield "cis-5.26", not any(re.fullmatch("no-new-privileges(:true|=true)?", option) for option in security), "it may gain privileges"
    yield "cis-5.27", not (config.get("Healthcheck") or {}).get("Test") or config["Healthcheck"]["Test"] == ["NONE"], "nothing asks whether it is healthy"
    yield "cis-5.29", not (host.get("PidsLimit") or 0) > 0, "its processes are not limited"
    yield "cis-5.30", "bridge" in ((item.get("NetworkSettings") or {}).get("Networks") or {}), "it is in the default network"
    yield "cis-5.31", host.get("UsernsMode") == "host", "it has the host's users"
    yield "cis-5.32", any(SOCKET.search(source) for source in sources), "it has the engine's socket"
    yield "tmpfs-size", bool(tmpfs), f"{', '.join(tmpfs)} may grow to half of the host's memory"


def _image(image: Document, history: str) -> Iterator[Row]:
    config = image.get("Config") or {}
    yield "cis-4.6", not (config.get("Healthcheck") or {}).get("Test"), "it says no check of health"
    yield "cis-4.9", bool(re.search(r"(?m)^(/bin/sh -c #\(nop\) )?ADD (?!file:)", history)), "it is built with ADD"
    yield "cis-4.10", bool(SECRET.search(history) or any(SECRET.search(word) for word in config.get("Env") or [])), "it names a secret"


Waiver = Mapping[str, str]


def weigh(found: Sequence[Finding], waivers: Sequence[Waiver], matches: Callable[[str, str], bool]) -> tuple[list[Finding], dict[Finding, str], list[str]]:
    """Return the findings that nothing excuses, those that a waiver does with its reason, and what is wrong with the waivers themselves."""
    excused: dict[Finding, str] = {}
    wrong = []
    for waiver in waivers:
        what = f"{waiver.get('rule')} of {waiver.get('subject')}"
        if set(waiver) != {"rule", "subject", "reason"} or not all(isinstance(value, str) and value.strip() for value in waiver.values()):
            wrong.append(f"The waiver {what} has {sorted(waiver)}; allowed are rule, subject and reason, each a text.")
            continue
        hit = [finding for finding in found if finding.rule == waiver["rule"] and matches(finding.subject, waiver["subject"])]
        excused |= dict.fromkeys(hit, waiver["reason"])
        if not hit:
            wrong.append(f"The waiver {what} excuses nothing that was found: remove it.")
    return [finding for finding in found if finding not in excused], excused, wrong
