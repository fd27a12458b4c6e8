# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each component of the stack declares of itself. PRIVATE to the collection: it may change at any time.

A component is a role with meta/component.yml, which has any of:

images                NAME: {reference, context, base, wheels}. `reference` is what a registry has, `context` a directory of this collection that builds
                      the image where none is reachable, `base` the Debian release that it builds on, `wheels` whether agent_stack_wheel_dir goes in
base_images           RELEASE: the reference of the image that builds on this release start from
secrets               names of secrets that are generated where the inventory gives none
metrics               what Prometheus scrapes: {job, target}; with `per_host: true` also every other host that serves a model, at /hosts/HOST/metrics
                      of the target
ports                 the role's variable with a port, or the port itself: who reaches it, one of `loopback`, `peers` and `all`
networks              names of the networks that its containers are in, without the prefix agent-stack-
uid                   the user that its containers run as
directories           {path, owner, mode}, as the module file_tree has them; {root} is agent_stack_root and {data} is agent_stack_data_dir
optional_directories  PART: directories that only a part needs which may be off
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REACH = ("loopback", "peers", "all")


class ComponentError(ValueError):
    """A declaration cannot be used."""


@dataclass(frozen=True)
class Component:
    """One declaration; the fields are those of the file."""

    name: str
    images: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base_images: Mapping[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    ports: Mapping[str, str] = field(default_factory=dict)
    networks: list[str] = field(default_factory=list)
    uid: int = 0
    directories: list[Mapping[str, Any]] = field(default_factory=list)
    optional_directories: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)


KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("images", "base_images", "ports", "optional_directories"), (dict, "a mapping")),
    **dict.fromkeys(("secrets", "metrics", "networks", "directories"), (list, "a list")),
    "uid": (int, "a number"),
}


@cache
def load(roles: Path) -> dict[str, Component]:
    """Return the components among the roles in a directory, by name. Raises ComponentError."""
    components = {path.parent.parent.name: read(path) for path in sorted(roles.glob("*/meta/component.yml"))}
    for kind in ("images", "base_images", "secrets", "ports"):
        _each_once(kind, components.values())
    return components


def read(path: Path) -> Component:
    """Return what a file declares; the role's directory is its name. Raises ComponentError."""
    declared = yaml.safe_load(path.read_text()) or {}
    known = [each.name for each in fields(Component) if each.name != "name"]
    if not isinstance(declared, dict) or set(declared) - set(known):
        wrong = ", ".join(sorted(set(declared) - set(known))) if isinstance(declared, dict) else repr(declared)
        raise ComponentError(f"{path} has {wrong}; allowed are {', '.join(known)}.")
    for name, value in declared.items():
        kind, words = KINDS[name]
        if not isinstance(value, kind):
            raise ComponentError(f"{path}: {name} is {value!r}; allowed is {words}.")
    for port, reach in declared.get("ports", {}).items():
        if reach not in REACH:
            raise ComponentError(f"{path}: the port {port} is reached by {reach!r}; allowed is one of {', '.join(REACH)}.")
    for metric in declared.get("metrics", []):
        if not {"job", "target"} <= set(metric) <= {"job", "target", "per_host"}:
            raise ComponentError(f"{path}: metrics has {metric!r}; allowed are job and target, and per_host if wanted.")
    return Component(path.parent.parent.name, **declared)


def images(components: Iterable[Component]) -> dict[str, Mapping[str, Any]]:
    """Return the catalogue of images."""
    return {name: image for component in components for name, image in component.images.items()}


def base_images(components: Iterable[Component]) -> dict[str, str]:
    """Return the base image of each Debian release."""
    return {release: reference for component in components for release, reference in component.base_images.items()}


def secrets(components: Iterable[Component]) -> list[str]:
    """Return the names of all secrets, in alphabetical order."""
    return sorted(name for component in components for name in component.secrets)


def scrape_configs(components: Iterable[Component], host: str, serving: list[str]) -> list[dict[str, Any]]:
    """Return Prometheus' scrape_configs on a host. `serving` are the hosts that serve a model."""
    configs: list[dict[str, Any]] = []
    for metric in (metric for component in components for metric in component.metrics):
        target = metric["target"]
        targets = [target]
        # Everything says which host it is of, so that one alert about a host that is away can stand for all others.
        relabel: list[dict[str, Any]] = [{"target_label": "host", "replacement": host}]
        config: dict[str, Any] = {"job_name": metric["job"], "relabel_configs": relabel}
        if metric.get("per_host"):
            # Prometheus has no way to another host. The target forwards: a host stands among the targets as a name without a port.
            targets = [target] * (host in serving) + [name for name in serving if name != host]
            source = {"source_labels": ["__address__"]}
            relabel += [
                {**source, "regex": "([^:]+)", "target_label": "__metrics_path__", "replacement": "/hosts/$1/metrics"},
                {**source, "regex": "([^:]+)", "target_label": "instance"},
                {**source, "regex": "([^:]+)", "target_label": "host"},
                {**source, "regex": "[^:]+", "target_label": "__address__", "replacement": target},
            ]
        configs.append({**config, "static_configs": [{"targets": targets}]})
    return configs


def declaration(component: Component, root: str, data: str) -> dict[str, Any]:
    """Return a component as a role uses it: a mapping, with the paths of this host."""

    def on_host(directories: list[Mapping[str, Any]]) -> list[dict[str, str]]:
        return [{name: str(value).replace("{root}", root).replace("{data}", data) for name, value in each.items()} for each in directories]

    found = {each.name: getattr(component, each.name) for each in fields(Component)}
    optional = {part: on_host(directories) for part, directories in component.optional_directories.items()}
    return {**found, "directories": on_host(component.directories), "optional_directories": optional}


def checked(components: Iterable[Component], roles: Path) -> list[str]:
    """Return the roles whose inputs can be checked before anything changes."""
    return [component.name for component in components if (roles / component.name / "tasks" / "check.yml").exists()]


def _each_once(kind: str, components: Iterable[Component]) -> None:
    owners: dict[str, str] = {}
    for component in components:
        for name in getattr(component, kind):
            if owners.setdefault(name, component.name) != component.name:
                raise ComponentError(f"{component.name} and {owners[name]} both declare {name} among their {kind}; allowed is one of them.")
