"""A server as the module server_check describes it, and what the play wants of it; tests change parts of both."""

from __future__ import annotations

import copy
from typing import Any

NOW = 1_800_000_000.0
ENGINE: dict[str, Any] = {
    "version": "",
    "source": "",
    "ours": False,
    "running": False,
    "swarm": False,
    "rootless": False,
    "flags": {},
    "daemon": {},
    "daemon_error": "",
    "directory": "/var/lib/docker",
    "compose": "",
    "buildx": "",
    "networks": {},
    "remote": "",
}
BARE: dict[str, Any] = {
    "platform": "Debian 13",
    "architecture": "x86_64",
    "user": 0,
    "systemd": True,
    "init": "systemd",
    "packages": {"python3-requests": {"version": "2.32.3", "held": False}},
    "engine": ENGINE,
    "sources": [],
    "apt_lock": "",
    "listening": [],
    "published": [],
    "disk": {"/opt/agent-stack": 100.0, "/var/lib/agent-stack": 100.0, "/var/lib/docker": 100.0},
    "memory_mib": 16000,
    "forwarding": "0",
    "addresses": ["192.0.2.10"],
    "uplinks": {"ipv4": {"device": "eth0", "mtu": 1500}},
    "routes": [{"network": "192.0.2.0/255.255.255.0", "device": "eth0"}],
    "resolved": ["192.0.2.10"],
    "proxy": {},
    "time": NOW,
    "sites": [],
    "gpu": {},
    "nvswitch": False,
    "fabric_manager": "",
    "unattended_upgrades": False,
}
SETTINGS: dict[str, Any] = {
    "paths": ["/opt/agent-stack", "/var/lib/agent-stack"],
    "ports": [
        {"port": 80, "reach": "all", "variable": ""},
        {"port": 443, "reach": "all", "variable": ""},
        {"port": 8080, "reach": "loopback", "variable": "agent_port"},
        {"port": 9090, "reach": "loopback", "variable": "monitoring_prometheus_port"},
    ],
    "docker": True,
    "docker_package_source": "auto",
    "docker_daemon_options": {"log-driver": "json-file", "log-opts": {"max-size": "50m"}, "live-restore": True},
    "docker_daemon_hardening": {},
    "stack": "/opt/agent-stack",
    "subnets": {},
    "mtu": 0,
    "front": True,
    "nginx": True,
    "domain": "agent.example.com",
    "certificate": "acme",
    "gpu": False,
    "cuda_version": "13.0",
    "toolkit_version": "1.20.1-1",
    "toolkit_packages": ["nvidia-container-toolkit"],
    "toolkit_repository": "https://nvidia.github.io/libnvidia-container/stable/deb",
    "toolkit_source": "/etc/apt/sources.list.d/nvidia-container-toolkit.sources",
    "replaced_sources": [],
    "model": "",
    "model_directory": "/var/lib/agent-stack",
    "cpu_model": False,
    "needs_way_out": True,
    "pulls": False,
    "controller_time": NOW,
}
GPU: dict[str, Any] = {"state": "present", "reason": "", "driver_version": "580.159.04", "cuda_version": "13.0", "gpus": [{}]}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with changes; a key such as engine.version names a part."""
    result = copy.deepcopy(base)
    for name, value in changes.items():
        *parents, last = name.split("/")
        part = result
        for parent in parents:
            part = part[parent]
        part[last] = value
    return result


def facts(**changes: Any) -> dict[str, Any]:
    """A bare Debian 13 server with changes; engine={...} and packages=[...] are merged."""
    packages = {name: {"version": "1", "held": False} for name in changes.pop("packages", [])}
    engine = changes.pop("engine", {})
    result = merged(BARE, changes)
    result["engine"] = {**ENGINE, **engine}
    result["packages"] = {**BARE["packages"], **packages}
    return result


def settings(**changes: Any) -> dict[str, Any]:
    return merged(SETTINGS, changes)


def listener(port: int, process: str, address: str = "0.0.0.0", pid: int = 812, unit: str = "", container: bool = False) -> dict[str, Any]:
    return {"port": port, "address": address, "pid": pid, "process": process, "unit": unit, "container": container}
