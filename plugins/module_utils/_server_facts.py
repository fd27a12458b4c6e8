# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What there is on a server before anything changes. PRIVATE to the collection: it may change at any time.

Only reads, in one go, and never raises: what cannot be read is left empty. `_server_rules` judges it.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _apt_sources, _nvml
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._uninstall import RECORD

# A question to a program that hangs costs no more than this.
PATIENCE_SECONDS = 4
MIB, GIB = 1024**2, 1024**3
ENGINE_PACKAGES = ("docker-ce", "docker.io", "moby-engine")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SHOWN_PACKAGES = ("docker", "containerd", "runc", "podman", "nginx", "apache", "certbot", "nvidia", "unattended")
# The names of containers in a process's control groups.
CONTAINERS = re.compile(r"docker[-/][0-9a-f]{12,64}|libpod-[0-9a-f]+|kubepods[^/\n]*")
TCP_LISTEN = "0A"
LOCKS = ("/var/lib/dpkg/lock-frontend", "/var/lib/apt/lists/lock")


def run(*command: str, timeout: float = PATIENCE_SECONDS) -> tuple[int, str]:
    """Return the exit status and the output of a program; 127 if it is not there, 124 if it hangs."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        # run_command has no limit of time, and what is asked here may hang.
        # pylint: disable-next=ansible-bad-function
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return 124, ""
    except OSError:
        return 127, ""
    return result.returncode, result.stdout


def read(path: str) -> str:
    """Return the text of a file; nothing if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def gather(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all facts. `settings` are the arguments of the module server_check."""
    packages = installed_packages()
    docker = engine(packages)
    docker["ours"] = ours(docker["source"], read(f"{settings['stack']}/{RECORD}") if settings["stack"] else "")
    return {
        "platform": platform(read("/etc/os-release")),
        "architecture": os.uname().machine,
        "user": os.geteuid(),
        "systemd": os.path.isdir("/run/systemd/system"),
        "init": read("/proc/1/comm").strip(),
        "packages": packages,
        "engine": docker,
        "sources": sources(),
        "apt_lock": lock_holder(),
        "listening": listeners(),
        "published": published() if docker["running"] else [],
        "disk": {path: free_gib(path) for path in [*settings["paths"], docker["directory"]]},
        "memory_mib": memory_mib(read("/proc/meminfo")),
        "forwarding": read("/proc/sys/net/ipv4/ip_forward").strip(),
        "addresses": addresses(),
        "uplinks": uplinks(read("/proc/net/route"), read("/proc/net/ipv6_route")),
        "routes": routes(read("/proc/net/route")),
        "resolved": resolve(settings["domain"]) if settings["domain"] else [],
        "proxy": proxy(os.environ),
        "time": time.time(),
        "sites": sites(),
        "gpu": _nvml.gpu_report(shutil.which("nvidia-smi"), 20) if settings["gpu"] else {},
        "nvswitch": bool(glob.glob("/dev/nvidia-nvswitch[0-9]*")),
        "fabric_manager": run("systemctl", "is-active", "nvidia-fabricmanager.service")[1].strip() if glob.glob("/dev/nvidia-nvswitch[0-9]*") else "",
        "unattended_upgrades": "unattended-upgrades" in packages,
    }


def platform(os_release: str) -> str:
    """Distribution and version as they are spoken of: Debian 13, Ubuntu 24.04."""
    fields = {}
    for line in os_release.splitlines():
        name, _sep, value = line.partition("=")
        fields[name.strip()] = value.strip().strip("\"'")
    name = {"debian": "Debian", "ubuntu": "Ubuntu"}.get(fields.get("ID", ""), fields.get("NAME", "an unknown system"))
    return f"{name} {fields.get('VERSION_ID', '')}".strip()


def installed_packages() -> dict[str, dict[str, Any]]:
    """Each installed Debian package with `version` and whether it is `held`."""
    _status, output = run("dpkg-query", "--show", "--showformat", "${db:Status-Abbrev}\t${Package}\t${Version}\n", timeout=20)
    found = {}
    for line in output.splitlines():
        status, _sep, rest = line.partition("\t")
        name, _sep, version = rest.partition("\t")
        if status[1:2] == "i":
            found[name] = {"version": version, "held": status[:1] == "h"}
    return found


def engine(packages: Mapping[str, Any]) -> dict[str, Any]:
    """The Docker engine: version, where it is from, and the settings that others made."""
    unit = unit_of("docker.service")
    daemon, daemon_error = daemon_settings(read("/etc/docker/daemon.json"))
    info = docker_info()
    program = shutil.which("dockerd") or ""
    version = str(info.get("ServerVersion") or "") or (re.findall(r"version ([^,\s]+)", run(program, "--version")[1]) or [""])[0] if program or info else ""
    source = engine_source(packages, os.path.realpath(shutil.which("docker") or ""), os.path.isdir("/snap/docker"), version)
    found = {
        "version": version,
        "source": source,
        "running": bool(info),
        "swarm": (info.get("Swarm") or {}).get("LocalNodeState") == "active",
        "rootless": any("rootless" in str(option) for option in info.get("SecurityOptions") or []),
        "flags": dockerd_flags(unit),
        "daemon": daemon,
        "daemon_error": daemon_error,
        "directory": str(info.get("DockerRootDir") or daemon.get("data-root") or "/var/lib/docker"),
        "compose": "",
        "buildx": "",
        "networks": {},
        "remote": remote_engine(os.environ, read(os.path.expanduser("~/.docker/config.json"))),
    }
    if version and source not in ("snap", "podman-docker"):
        found["compose"] = run("docker", "compose", "version", "--short")[1].strip()
        found["buildx"] = (re.findall(r"v?(\d+\.\d+\S*)", run("docker", "buildx", "version")[1]) or [""])[0]
        found["networks"] = networks() if info else {}
    return found


def engine_source(packages: Mapping[str, Any], program: str, snap: bool, version: str) -> str:
    """Who installed the engine: a package's name, `snap`, `other`, or nothing where there is none."""
    if snap or program.startswith("/snap/") or program == "/usr/bin/snap":
        return "snap"
    if "podman-docker" in packages:
        return "podman-docker"
    return next((name for name in ENGINE_PACKAGES if name in packages), "other" if version else "")


def ours(source: str, record: str) -> bool:
    """Whether the stack installs the engine or did so: none is there, or its package came after the record of what was on the host."""
    try:
        before = json.loads(record or "{}")
    except ValueError:
        before = {}
    return not source or (source in ENGINE_PACKAGES and bool(before.get("complete")) and source not in before["packages"])


def docker_info() -> dict[str, Any]:
    """What the running engine says of itself; nothing if none answers."""
    _status, output = run("docker", "info", "--format", "{{json .}}")
    try:
        info = json.loads(output)
    except ValueError:
        return {}
    return info if isinstance(info, dict) and info.get("ServerVersion") else {}


def networks() -> dict[str, dict[str, Any]]:
    """The stack's own networks: `subnets`, and `mtu` as Docker was told."""
    names = run("docker", "network", "ls", "--filter", "name=^agent-stack-", "--format", "{{.Name}}")[1].split()
    if not names:
        return {}
    try:
        described = json.loads(run("docker", "network", "inspect", *names)[1])
    except ValueError:
        return {}
    return {
        network["Name"]: {
            "subnets": [pool["Subnet"] for pool in network["IPAM"]["Config"] or []],
            "mtu": (network.get("Options") or {}).get("com.docker.network.driver.mtu", ""),
        }
        for network in described
    }


def published() -> list[dict[str, Any]]:
    """The ports that running containers publish, with the container's name."""
    lines = run("docker", "ps", "--format", "{{.Names}}\t{{.Ports}}")[1].splitlines()
    return [entry for line in lines for entry in published_ports(*line.partition("\t")[::2])]


def published_ports(name: str, ports: str) -> list[dict[str, Any]]:
    """From 127.0.0.1:8080->8080/tcp, [::]:90-91->90-91/tcp."""
    found = []
    for first, last in re.findall(r":(\d+)(?:-(\d+))?->[\d-]+/tcp", ports):
        found += [{"port": port, "container": name} for port in range(int(first), int(last or first) + 1)]
    return found


def daemon_settings(text: str) -> tuple[dict[str, Any], str]:
    """Return daemon.json and why it cannot be used. An empty or missing file is in order."""
    if not text.strip():
        return {}, ""
    try:
        settings = json.loads(text)
    except ValueError as error:
        return {}, str(error)
    return (settings, "") if isinstance(settings, dict) else ({}, "it is no object")


def unit_of(name: str) -> str:
    """The command line of a service, as it runs or, if it does not, as its unit has it."""
    _status, output = run("systemctl", "show", name, "--property=MainPID,ExecStart")
    fields = dict(line.partition("=")[::2] for line in output.splitlines())
    process = fields.get("MainPID", "0").strip()
    if process not in ("", "0"):
        return " ".join(shlex.quote(word) for word in read(f"/proc/{process}/cmdline").split("\0") if word)
    found = re.search(r"argv\[\]=(.*?) ;", fields.get("ExecStart", ""))
    return found[1] if found else ""


def dockerd_flags(command: str) -> dict[str, str]:
    """The flags of dockerd by name; one without a value is `true`."""
    try:
        words = shlex.split(command)[1:]
    except ValueError:
        words = command.split()[1:]
    flags = {}
    for position, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[position + 1] if position + 1 < len(words) else ""
            flags[name] = value if equals else "true" if not following or following.startswith("-") else following
    return flags


def remote_engine(environment: Mapping[str, str], config: str) -> str:
    """What makes root's docker command talk to another engine; nothing if nothing does."""
    host = environment.get("DOCKER_HOST", "")
    if host and host not in ("unix:///var/run/docker.sock", "unix:///run/docker.sock"):
        return f"DOCKER_HOST={host}"
    try:
        context = json.loads(config).get("currentContext", "default") if config else "default"
    except (ValueError, AttributeError):
        context = "default"
    return "" if context in ("", "default") else f"The Docker context {context}"


def sources() -> list[dict[str, Any]]:
    """apt's sources, from all of its files."""
    files = ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*.list")), *sorted(glob.glob("/etc/apt/sources.list.d/*.sources"))]
    return [entry for file in files for entry in _apt_sources.parse(file, read(file))]


def lock_holder() -> str:
    """The program that holds the lock of apt or dpkg at the moment; nothing if it is free."""
    inodes = set()
    for path in LOCKS:
        try:
            inodes.add(os.stat(path).st_ino)
        except OSError:
            continue
    for line in read("/proc/locks").splitlines():
        # 1: POSIX  ADVISORY  WRITE 1234 fe:01:5678 0 EOF
        words = line.split()
        if len(words) > 5 and words[1] != "->" and words[5].rpartition(":")[2].isdigit() and int(words[5].rpartition(":")[2]) in inodes:
            return read(f"/proc/{words[4]}/comm").strip() or "another program"
    return ""


def listeners() -> list[dict[str, Any]]:
    """TCP ports that are listened on: `port`, `address`, and of the holder `process`, `pid`, its `unit` and whether it is in a `container`."""
    sockets = [entry for family in ("tcp", "tcp6") for entry in listening_sockets(read(f"/proc/net/{family}"))]
    holders = socket_holders({entry["inode"] for entry in sockets})
    own = set(CONTAINERS.findall(read("/proc/1/cgroup")))
    found = []
    for entry in sockets:
        pid = holders.get(entry.pop("inode"), 0)
        group = read(f"/proc/{pid}/cgroup") if pid else ""
        unit = re.findall(r"/([^/\n]+\.(?:service|socket))", group)
        # A server may be a container itself: what it runs is in the group of its first process.
        container = not set(CONTAINERS.findall(group)) <= own
        process = read(f"/proc/{pid}/comm").strip() if pid else ""
        found.append({**entry, "pid": pid, "process": process, "unit": unit[-1] if unit else "", "container": container})
    return found


def listening_sockets(table: str) -> list[dict[str, Any]]:
    """The listening rows of /proc/net/tcp or tcp6."""
    found = []
    for line in table.splitlines()[1:]:
        words = line.split()
        if len(words) > 9 and words[3] == TCP_LISTEN:
            address, port = words[1].split(":")
            packed = b"".join(struct.pack("<I", int(address[start : start + 8], 16)) for start in range(0, len(address), 8))
            family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
            found.append({"port": int(port, 16), "address": socket.inet_ntop(family, packed), "inode": words[9]})
    return found


def socket_holders(inodes: set[str]) -> dict[str, int]:
    """The process of each socket."""
    holders: dict[str, int] = {}
    for process in (name for name in os.listdir("/proc") if name.isdigit()):
        try:
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                target = os.readlink(f"/proc/{process}/fd/{descriptor}")
                if target.startswith("socket:[") and target[8:-1] in inodes:
                    # The first one is the parent of those that inherited it.
                    holders[target[8:-1]] = min(int(process), holders.get(target[8:-1], int(process)))
        except OSError:
            continue
    return holders


def free_gib(path: str) -> float:
    """Room in the file system that a directory is in, or would be in."""
    while not os.path.isdir(path) and path not in ("/", ""):
        path = os.path.dirname(path)
    try:
        status = os.statvfs(path or "/")
    except OSError:
        return 0.0
    return round(status.f_bavail * status.f_frsize / GIB, 1)


def memory_mib(meminfo: str) -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def addresses() -> list[str]:
    """The host's own addresses beyond loopback and link-local ones."""
    _status, output = run("ip", "-oneline", "address", "show", "scope", "global")
    return re.findall(r"\binet6? ([0-9a-fA-F.:]+)/", output)


def uplinks(ipv4: str, ipv6: str) -> dict[str, dict[str, Any]]:
    """For `ipv4` and `ipv6` the interface of the default route and its MTU; a family without one is missing. From /proc/net/route and ipv6_route."""
    devices: dict[str, str] = {}
    for words in (line.split() for line in ipv4.splitlines()[1:]):
        if len(words) > 7 and words[1] == words[7] == "00000000":
            devices.setdefault("ipv4", words[0])
    for words in (line.split() for line in ipv6.splitlines()):
        # Without a way out the kernel keeps a default route that rejects, on the loopback interface.
        if len(words) > 9 and set(words[0]) == {"0"} and words[1] == "00" and words[9] != "lo":
            devices.setdefault("ipv6", words[9])
    found = {}
    for family, device in devices.items():
        mtu = read(f"/sys/class/net/{device}/mtu").strip()
        found[family] = {"device": device, "mtu": int(mtu) if mtu.isdigit() else 0}
    return found


def routes(table: str) -> list[dict[str, str]]:
    """The networks that the host has a route to, as /proc/net/route has them, without the default route."""
    found = []
    for line in table.splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and words[7] != "00000000":
            network, mask = (socket.inet_ntoa(struct.pack("<I", int(word, 16))) for word in (words[1], words[7]))
            found.append({"network": f"{network}/{mask}", "device": words[0]})
    return found


def resolve(domain: str) -> list[str]:
    """The addresses of a name. In a program of its own, because the resolver knows no limit of time."""
    return sorted({line.split()[0] for line in run("getent", "ahosts", domain, timeout=3)[1].splitlines() if line.strip()})


def proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """The proxy settings of the environment that the play has on the host, in small letters. Logins in them are not shown."""
    found = {name: environment.get(name) or environment.get(name.upper(), "") for name in PROXY_VARIABLES}
    return {name: str(without_logins(value)) for name, value in found.items() if value}


def shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as they may be printed: no logins, no values of daemon.json, and of thousands of packages those that matter here."""
    packages = {name: package for name, package in facts["packages"].items() if name.startswith(SHOWN_PACKAGES)}
    engine = {**facts["engine"], "daemon": sorted(facts["engine"]["daemon"])}
    return dict(without_logins({**facts, "packages": packages, "engine": engine}))


def without_logins(value: Any) -> Any:
    """Take user and password out of every URL."""
    if isinstance(value, str):
        return re.sub(r"//[^/@\s]*@", "//", value)
    if isinstance(value, dict):
        return {name: without_logins(part) for name, part in value.items()}
    return [without_logins(part) for part in value] if isinstance(value, list) else value


def sites() -> list[dict[str, Any]]:
    """nginx's server blocks outside of the main file, in what it includes from sites-enabled and conf.d."""
    files = sorted(glob.glob("/etc/nginx/sites-enabled/*")) + sorted(glob.glob("/etc/nginx/conf.d/*.conf"))
    return [{"file": file, **block} for file in files for block in server_blocks(read(file))]


def server_blocks(text: str) -> list[dict[str, list[str]]]:
    """Of each server block what it listens on and its names. Good enough to see who claims a name; nginx itself judges the rest."""
    text = re.sub(r"(^|\s)#[^\n]*", " ", text)
    found = []
    for block in re.split(r"(?<![\w$-])server\s*\{", text)[1:]:
        names = [name for names in re.findall(r"\bserver_name\s+([^;]+);", block) for name in names.split()]
        found.append({"listen": [" ".join(words.split()) for words in re.findall(r"\blisten\s+([^;]+);", block)], "names": names})
    return found
