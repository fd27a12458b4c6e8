# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What of a server the stack cannot live with. PRIVATE to the collection: it may change at any time.

Pure functions over the facts of `_server_facts` and the settings of the module server_check. What can be served is; each other thing is one sentence that
names it and says what to do. `refused` sentences stop a play before its first change, `notes` are told and do not.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _apt_sources, _docker_found

PLATFORMS = ("Debian 12", "Debian 13", "Ubuntu 22.04", "Ubuntu 24.04")
ARCHITECTURES = ("x86_64", "aarch64")
# Postgres, Redis, the agent and the monitoring hold about 1.2 GiB once they have started.
LEAST_MEMORY_MIB = 1800
# Unpacked images: all but vLLM's, and vLLM's for CUDA. A host that has them already needs no room for them, so a full disk is told only below the first.
IMAGES_GIB, CUDA_IMAGE_GIB = 6, 30
LEAST_FREE_GIB = 2
# Signatures of package lists and certificates are wrong by then.
MOST_CLOCK_SECONDS = 600
ETHERNET_MTU = 1500
LOOPBACK = ("127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1")  # noqa: S104  compared with, not bound to
OURS = "agent-stack-"

Facts = Mapping[str, Any]
Settings = Mapping[str, Any]
Rule = Callable[[Facts, Settings], Iterator[str]]


def judge(facts: Facts, settings: Settings) -> tuple[list[str], list[str]]:
    """Return the sentences that refuse a host, and the notes.

    Without systemd or on an unknown distribution nothing else counts, because most of it would follow from that.
    """
    refused = [sentence for rule in FIRST for sentence in rule(facts, settings)]
    if refused:
        return refused, []
    return [sentence for rule in REFUSING for sentence in rule(facts, settings)], [sentence for rule in NOTING for sentence in rule(facts, settings)]


def docker_plan(facts: Facts, settings: Settings) -> _docker_found.Plan:
    """What the role docker does on this host."""
    oldest = _docker_found.OLDEST_ENGINE_CDI if settings["gpu"] else _docker_found.OLDEST_ENGINE
    if ipv6_only(facts) and settings["docker"]:
        oldest = max(oldest, _docker_found.OLDEST_ENGINE_IPV6)
    return _docker_found.plan(facts, settings["docker_package_source"], wanted_options(facts, settings), oldest)


def wanted_options(facts: Facts, settings: Settings) -> Mapping[str, Any]:
    """What is wanted in daemon.json. Hardening concerns all containers of the engine, so one of somebody else keeps its own."""
    options: Mapping[str, Any] = settings["docker_daemon_options"]
    return {**settings["docker_daemon_hardening"], **options} if facts["engine"]["ours"] else options


def hardening(facts: Facts, settings: Settings) -> Iterator[str]:
    wanted = {key: value for key, value in settings["docker_daemon_hardening"].items() if key not in settings["docker_daemon_options"]}
    missing = [key for key, value in wanted.items() if facts["engine"]["daemon"].get(key) != value]
    if settings["docker"] and missing and not facts["engine"]["ours"]:
        yield (
            f"The Docker Engine was not installed by this collection, so {' and '.join(sorted(missing))} of docker_daemon_hardening stay as they are. "
            "docker_daemon_options sets them."
        )


def ipv6_only(facts: Facts) -> bool:
    """Whether the host's one way out is IPv6."""
    return "ipv6" in facts["uplinks"] and "ipv4" not in facts["uplinks"]


def network_mtu(facts: Facts, wanted: int) -> int:
    """The MTU of the stack's networks, 0 for Docker's own choice: what is asked for, else that of an uplink that carries less than Ethernet."""
    carried = [uplink["mtu"] for uplink in facts["uplinks"].values() if uplink["mtu"]]
    return wanted or (min(carried) if carried and min(carried) < ETHERNET_MTU else 0)


def model_gib(model: str) -> float:
    """Roughly what a model's weights take, from the number of parameters in its name; 0 if the name has none or is a path."""
    size = re.search(r"(?:^|[-_/])(?:(\d+)x)?(\d+(?:\.\d+)?)\s*([bm])(?=$|[-_.])", model, re.IGNORECASE)
    if not size or model.startswith("/"):
        return 0
    billions = float(size[2]) * int(size[1] or 1) / (1000 if size[3].lower() == "m" else 1)
    small = re.search(r"int4|4bit|awq|gptq|w4a16|nvfp4|mxfp4|fp4", model, re.IGNORECASE)
    half = re.search(r"fp8|int8|8bit|w8a", model, re.IGNORECASE)
    return round(billions * 1e9 * (0.6 if small else 1 if half else 2) / 1024**3, 1)


def distribution(facts: Facts, settings: Settings) -> Iterator[str]:
    if facts["platform"] not in PLATFORMS:
        yield f"The host runs {facts['platform']}; supported are Debian 12 and 13, Ubuntu 22.04 and 24.04."
    elif facts["architecture"] not in ARCHITECTURES:
        yield f"The host is a machine of the kind {facts['architecture']}; supported are {' and '.join(ARCHITECTURES)}."


def systemd(facts: Facts, settings: Settings) -> Iterator[str]:
    if not facts["systemd"]:
        yield (
            f"The host runs no systemd (its first process is {facts['init'] or 'unknown'}), as containers that are rented as pods do not. "
            "The stack needs a server or a virtual machine with systemd, in which Docker can run."
        )


def root(facts: Facts, settings: Settings) -> Iterator[str]:
    if facts["user"] != 0:
        yield f"The play has the user id {facts['user']} on the host; allowed is root. Set ansible_user to root, or ansible_become to true."


def docker(facts: Facts, settings: Settings) -> Iterator[str]:
    if settings["docker"]:
        yield from docker_plan(facts, settings).refused


def forwarding(facts: Facts, settings: Settings) -> Iterator[str]:
    engine = facts["engine"]
    told = engine["daemon"].get("ip-forward") is False or engine["flags"].get("ip-forward") == "false"
    if settings["docker"] and told and facts["forwarding"] == "0":
        yield 'Docker is told not to forward ("ip-forward": false) and the kernel does not either, so no container reaches anything outside. Remove that key.'


def apt_sources(facts: Facts, settings: Settings) -> Iterator[str]:
    for repository, files in _apt_sources.conflicts(facts["sources"]):
        if not replaced(files, settings):
            yield (
                f"apt reads no list at all, because {' and '.join(files)} name different keys for {repository}. Remove all but one of these entries"
                f"{'' if len(files) > 1 else ' in the file'}."
            )


def replaced(files: list[str], settings: Settings) -> bool:
    """Whether the role nvidia_toolkit removes all but one of the files."""
    return len([file for file in files if file not in settings["replaced_sources"]]) < 2 and len(files) > 1


def ports(facts: Facts, settings: Settings) -> Iterator[str]:
    """Each wanted port is free, or held by what the stack itself put there."""
    containers = {entry["port"]: entry["container"] for entry in facts["published"]}
    for wanted in settings["ports"]:
        holder = _holder(facts, containers, int(wanted["port"]), wanted["reach"])
        if holder:
            name = wanted["variable"]
            way = f"Stop that, or set {name} to another port." if name else "Stop that, or have it listen elsewhere: nginx of the stack needs this port."
            yield f"Port {wanted['port']}{' of ' + name if name else ''} is taken by {holder}. {way}"


def _holder(facts: Facts, containers: Mapping[int, str], port: int, reach: str) -> str:
    """Who keeps the stack from listening on a port; nothing if nobody does."""
    if port in containers:
        return "" if containers[port].startswith(OURS) else f"the container {containers[port]}"
    for entry in facts["listening"]:
        if entry["port"] != port or (reach == "loopback" and entry["address"] not in LOOPBACK):
            continue
        if reach == "all" and entry["process"] == "nginx" and not entry["container"]:
            continue
        if entry["container"]:
            return f"{entry['process']} in a container on the host's network"
        if entry["pid"] == 1:
            return "a socket of systemd (systemctl list-sockets names it)"
        unit = f", {entry['unit']}" if entry["unit"].endswith(".service") else ""
        return f"{entry['process'] or 'an unknown process'} (process {entry['pid']}{unit})"
    return ""


def disk(facts: Facts, settings: Settings) -> Iterator[str]:
    for path, free in facts["disk"].items():
        if free < LEAST_FREE_GIB:
            yield f"{path} is on a file system with {free} GiB free; needed are {LEAST_FREE_GIB} at the least. Free some, or put it on another disk."


def disk_for_images(facts: Facts, settings: Settings) -> Iterator[str]:
    """On a host without any of the stack's networks: its images are not there either."""
    if facts["engine"]["networks"] or not settings["docker"]:
        return
    directory = facts["engine"]["directory"]
    needed = IMAGES_GIB + (CUDA_IMAGE_GIB if settings["gpu"] else 0)
    free = facts["disk"].get(directory, needed)
    if LEAST_FREE_GIB <= free < needed:
        yield f"{directory} has {free} GiB free; the images of the stack take about {needed} GiB. Free some, or move Docker's directory (data-root)."


def disk_for_model(facts: Facts, settings: Settings) -> Iterator[str]:
    needed = model_gib(settings["model"])
    path = settings["model_directory"]
    free = facts["disk"].get(path, needed)
    # Where the stack is already, the plan of the role vllm knows which files are missing.
    if needed and not facts["engine"]["networks"] and LEAST_FREE_GIB <= free < needed:
        yield (
            f"{path} has {free} GiB free; the weights of {settings['model']} take about {needed} GiB. Free some, or set agent_stack_data_dir to another disk."
        )


def memory(facts: Facts, settings: Settings) -> Iterator[str]:
    """The model's own memory is the GPU's, which the plan of the role vllm counts; on the CPU it is the host's."""
    needed = (LEAST_MEMORY_MIB if settings["front"] else 0) + (int(model_gib(settings["model"]) * 1024) if settings["cpu_model"] else 0)
    if facts["memory_mib"] and facts["memory_mib"] < needed:
        what, smaller = ("the stack needs", "")
        if settings["cpu_model"]:
            what, smaller = (f"the stack with {settings['model']} on the CPU needs", " or a smaller model")
        yield f"The host has {facts['memory_mib']} MiB of memory; {what} about {needed}. Use a larger host{smaller}."


def way_out(facts: Facts, settings: Settings) -> Iterator[str]:
    if not facts["uplinks"] and settings["needs_way_out"] and not facts["proxy"]:
        yield (
            "The host has no default route, for IPv4 or IPv6, so it can fetch neither packages nor images. "
            "Give it a way out, or set agent_stack_image_source to archive and use a mirror."
        )


def clock(facts: Facts, settings: Settings) -> Iterator[str]:
    if not settings["controller_time"]:
        return
    off = facts["time"] - settings["controller_time"]
    if abs(off) > MOST_CLOCK_SECONDS:
        days = abs(off) / 86400
        span = f"{days:.0f} days" if days >= 2 else f"{abs(off) / 60:.0f} minutes"
        yield (
            f"The host's clock is {span} {'ahead of' if off > 0 else 'behind'} the controller's, and package lists and certificates would be refused. "
            "Set the wrong one of the two (timedatectl set-ntp true)."
        )


def subnets(facts: Facts, settings: Settings) -> Iterator[str]:
    """The address ranges that the operator chose overlap nothing."""
    taken: list[tuple[str, Any]] = [
        (f"the host's route over {route['device']}", ipaddress.ip_network(route["network"]))
        for route in facts["routes"]
        if not route["device"].startswith("as-")
    ]
    for name, text in sorted(settings["subnets"].items()):
        try:
            subnet = ipaddress.ip_network(text)
        except ValueError:
            yield f'docker_network_subnets has "{text}" for {name}; allowed is an address range such as 10.89.1.0/24 or fd00:89:1::/64, without host bits.'
            continue
        for owner, other in taken:
            if other.version == subnet.version and other.overlaps(subnet):
                yield f"docker_network_subnets has {text} for {name}, and that overlaps {other} of {owner}; allowed is a range that nothing else uses."
        taken.append((f"the network {name}", subnet))
        present = facts["engine"]["networks"].get(OURS + name, {}).get("subnets", [])
        if present and text not in present:
            yield (
                f"docker_network_subnets has {text} for {name}, and the network {OURS}{name} has {', '.join(present)}. "
                f"Stop the stack (systemctl stop agent-stack.target), remove the network (docker network rm {OURS}{name}), and run the play again."
            )


def nginx_sites(facts: Facts, settings: Settings) -> Iterator[str]:
    """Server blocks of others that would take the stack's requests."""
    if not settings["nginx"]:
        return
    for site in (site for site in facts["sites"] if not re.search(r"agent[-_]stack", site["file"])):
        if settings["domain"] in site["names"]:
            yield (
                f"{site['file']} already serves {settings['domain']}, the agent_stack_domain. Remove that name there, or choose another domain for the stack."
            )
        listens = [listen for listen in site["listen"] if re.search(r"\bdefault_server\b", listen) and re.match(r"(\S+:)?(80|443)\b", listen)]
        if listens and not site["file"].endswith("/sites-enabled/default"):
            yield (
                f"{site['file']} has a default_server on {listens[0].split()[0]}; the stack's nginx has one there that drops unknown names. "
                "Remove the word default_server from that file."
            )


def gpu(facts: Facts, settings: Settings) -> Iterator[str]:
    if not settings["gpu"]:
        return
    report = facts["gpu"]
    if report["state"] != "present":
        yield (
            f"vllm_device is cuda, and the host has no GPU that works: {report['reason']}. Install NVIDIA's driver, or restart the "
            "host if that was just done, until nvidia-smi lists the GPU; or set vllm_device to cpu."
        )
        return
    if _docker_found.version(report["cuda_version"]) < _docker_found.version(settings["cuda_version"]):
        yield (
            f"The host's NVIDIA driver {report['driver_version']} supports CUDA {report['cuda_version'] or 'of an unknown version'}; vLLM's image needs CUDA "
            f"{settings['cuda_version']}. Install a driver that supports it (nvidia-smi names the version), or give "
            "an image for an older one in agent_stack_image_overrides, and its CUDA in nvidia_toolkit_cuda_version."
        )
    if facts["nvswitch"] and facts["fabric_manager"] != "active":
        yield (
            "The GPUs are connected by NVSwitch, and the fabric manager does not run, so CUDA would end with error 802. Install the package "
            f"nvidia-fabricmanager of the driver's version {report['driver_version']}, and start it (systemctl enable --now nvidia-fabricmanager)."
        )


def toolkit_elsewhere(facts: Facts, settings: Settings) -> Iterator[str]:
    """A file that has the toolkit's repository among others is not ours to remove, and would conflict with the role's own."""
    if settings["gpu"] and settings["toolkit_repository"]:
        for source in _apt_sources.of(facts["sources"], settings["toolkit_repository"]):
            if source["file"] not in (settings["toolkit_source"], *settings["replaced_sources"]):
                yield (
                    f"{source['file']} has {source['uri']} among other sources, and the role nvidia_toolkit writes that with a key of its own. "
                    "Remove that line there."
                )


def held_toolkit(facts: Facts, settings: Settings) -> Iterator[str]:
    wanted = settings["toolkit_version"]
    if settings["gpu"] and wanted:
        for name in settings["toolkit_packages"]:
            package = facts["packages"].get(name)
            if package and package["held"] and package["version"] != wanted:
                yield (
                    f"The package {name} is on hold at {package['version']}, and nvidia_toolkit_version is {wanted}. "
                    f"Release it (apt-mark unhold {name}), or set nvidia_toolkit_version to {package['version']}."
                )


def domain_elsewhere(facts: Facts, settings: Settings) -> Iterator[str]:
    if not (settings["nginx"] and settings["certificate"] == "acme" and settings["domain"]):
        return
    if not facts["resolved"]:
        yield f"{settings['domain']} has no address in DNS yet. Until it leads to this host, the certificate authority gives no certificate."
    elif facts["addresses"] and not set(facts["resolved"]) & {*facts["addresses"], "127.0.0.1", "::1"}:
        yield (
            f"{settings['domain']} leads to {', '.join(facts['resolved'])}, and this host has {', '.join(facts['addresses'])}. "
            "That is in order behind address translation; otherwise the certificate authority gives no certificate."
        )


def docker_differences(facts: Facts, settings: Settings) -> Iterator[str]:
    if settings["docker"]:
        yield from docker_plan(facts, settings).notes


def mtu_of_networks(facts: Facts, settings: Settings) -> Iterator[str]:
    wanted = network_mtu(facts, settings["mtu"])
    for name, network in sorted(facts["engine"]["networks"].items()):
        if wanted and int(network["mtu"] or ETHERNET_MTU) > wanted:
            yield (
                f"The network {name} was made for packets of {network['mtu'] or ETHERNET_MTU} bytes, and the uplink carries {wanted}: large answers may stall. "
                f"Stop the stack, remove the network (docker network rm {name}), and run the play again."
            )


def apt_lock(facts: Facts, settings: Settings) -> Iterator[str]:
    if facts["apt_lock"]:
        yield f"{facts['apt_lock']} holds the lock of apt at the moment; the play waits for it for up to ten minutes."


def moving_driver(facts: Facts, settings: Settings) -> Iterator[str]:
    if not (settings["gpu"] and facts["unattended_upgrades"]):
        return
    drivers = [name for name, package in facts["packages"].items() if re.match(r"nvidia-driver-\d|nvidia-driver$|cuda-drivers", name) and not package["held"]]
    if drivers:
        yield (
            f"unattended-upgrades may replace {', '.join(sorted(drivers))} while the model serves, and the GPU is then lost until the host restarts. "
            f"apt-mark hold {' '.join(sorted(drivers))} prevents that."
        )


def proxy_of_docker(facts: Facts, settings: Settings) -> Iterator[str]:
    if facts["proxy"].get("https_proxy") and not facts["engine"]["daemon"].get("proxies") and settings["docker"] and settings["pulls"]:
        yield (
            f"The play's environment has the proxy {facts['proxy']['https_proxy']}. Docker pulls images through it only if it is told so, "
            "by proxies in daemon.json (docker_daemon_options) or in its unit."
        )


FIRST: tuple[Rule, ...] = (distribution, systemd, root)
REFUSING: tuple[Rule, ...] = (
    *(docker, forwarding, apt_sources, ports, disk, disk_for_images, disk_for_model, memory, way_out, clock, subnets),
    *(nginx_sites, gpu, toolkit_elsewhere, held_toolkit),
)
NOTING: tuple[Rule, ...] = (domain_elsewhere, docker_differences, hardening, mtu_of_networks, apt_lock, moving_driver, proxy_of_docker)
