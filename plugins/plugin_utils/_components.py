# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each component of the stack declares of itself. PRIVATE to the collection: it may change at any time.

A component is a role with meta/component.yml, which has any of:

images                NAME: {reference, context, base, wheels}. `reference` is what a registry has, `context` a directory of this collection that builds
                      the image where none is reachable, `base` the Debian release that it builds on, `wheels` whether agent_stack_wheel_dir goes in
base_images           RELEASE: the reference of the image that builds on this release start from
secrets               names of secrets that are generated where the inventory gives none
kept_secrets          those of them that playbooks/rotate.yml does not replace, each with the reason
metrics               what Prometheus scrapes: {job, target}; with `per_host: true` also every other host that serves a model, at /hosts/HOST/metrics
                      of the target
ports                 the role's variable with a port, or the port itself: who reaches it, one of `loopback`, `peers` and `all`
networks              names of the networks that its containers are in, without the prefix agent-stack-
uid                   the user that its containers run as; `uids` where several services have one each: SERVICE: uid. No two services have the same
directories           {path, owner, mode}, as the module file_tree has them; {root} is agent_stack_root and {data} is agent_stack_data_dir
optional_directories  PART: directories that only a part needs which may be off

What it leaves on the host outside of these two directories, which is what uninstalling takes away again:

packages              NAME: {leaves, data, in_use} of each Debian package that the role may install. `leaves` are paths that the package keeps when it is
                      purged, `data` those that stay while the data stays, and then it is removed and not purged. `in_use` says when it stays because
                      others need it: `containers`, if the engine runs any that are not ours, or patterns of files
paths                 patterns of files; one that ends with a slash is a directory, which is removed if it is empty
replaces              PATH: the unit that reads the file, or nothing, of each file of others that the role writes or removes. What was there is put back
merges                PATH: keys of a JSON file of others that the role sets, each as names with dots between them
data_paths            patterns of what goes with the data only; {domain} is agent_stack_domain
groups                names of groups that came with the packages
users                 names of users that the role makes, which begin with agent-stack-
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

# The user of everything that has none of its own.
NOBODY = 65534
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
    kept_secrets: Mapping[str, str] = field(default_factory=dict)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    ports: Mapping[str, str] = field(default_factory=dict)
    networks: list[str] = field(default_factory=list)
    uid: int = 0
    uids: Mapping[str, int] = field(default_factory=dict)
    directories: list[Mapping[str, Any]] = field(default_factory=list)
    optional_directories: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    packages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    replaces: Mapping[str, str | None] = field(default_factory=dict)
    merges: Mapping[str, list[str]] = field(default_factory=dict)
    data_paths: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)


PACKAGE = ("leaves", "data", "in_use")
KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("images", "base_images", "kept_secrets", "ports", "uids", "optional_directories", "packages", "replaces", "merges"), (dict, "a mapping")),
    **dict.fromkeys(("secrets", "metrics", "networks", "directories", "paths", "data_paths", "groups", "users"), (list, "a list")),
    "uid": (int, "a number"),
}


@cache
def load(roles: Path) -> dict[str, Component]:
    """Return the components among the roles in a directory, by name. Raises ComponentError."""
    components = {path.parent.parent.name: read(path) for path in sorted(roles.glob("*/meta/component.yml"))}
    for kind in ("images", "base_images", "secrets", "ports"):
        _each_once(kind, components.values())
    users(components.values())
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
    for name, package in declared.get("packages", {}).items():
        if not isinstance(package, dict) or set(package) - set(PACKAGE):
            raise ComponentError(f"{path}: packages has {name}: {package!r}; allowed is a mapping of any of {', '.join(PACKAGE)}.")
    return Component(path.parent.parent.name, **declared)


def secret_list(components: Iterable[Component]) -> list[dict[str, str]]:
    """Return `name`, the component as `owner`, and `kept`, why it is not rotated or nothing, of each secret."""
    found = [{"name": name, "owner": each.name, "kept": each.kept_secrets.get(name, "")} for each in components for name in each.secrets]
    return sorted(found, key=lambda secret: secret["name"])


def images(components: Iterable[Component]) -> dict[str, Mapping[str, Any]]:
    """Return the catalogue of images."""
    return {name: image for component in components for name, image in component.images.items()}


def base_images(components: Iterable[Component]) -> dict[str, str]:
    """Return the base image of each Debian release."""
    return {release: reference for component in components for release, reference in component.base_images.items()}


def secrets(components: Iterable[Component]) -> list[str]:
    """Return the names of all secrets, in alphabetical order."""
    return sorted(name for component in components for name in component.secrets)


def users(components: Iterable[Component]) -> dict[int, str]:
    """Return whose each uid is, as COMPONENT or COMPONENT/SERVICE.

    Raises ComponentError for one that two have: what runs as the same user reads the other's secrets below /proc. The host's nobody and root are no one's.
    """
    owners: dict[int, str] = {}
    for component in components:
        for name, uid in {component.name: component.uid, **{f"{component.name}/{service}": uid for service, uid in component.uids.items()}}.items():
            if (uid or "/" in name) and not (isinstance(uid, int) and 0 < uid < NOBODY):
                raise ComponentError(f"{name} has the uid {uid!r}; allowed is a number from 1 to {NOBODY - 1}.")
            if uid and owners.setdefault(uid, name) != name:
                raise ComponentError(f"{name} and {owners[uid]} both have the uid {uid}; allowed is one of its own for each.")
    return owners


def listens(components: Iterable[Component], value_of: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Return the ports that components listen on: `port`, `reach`, and `variable`, the name of the setting that moves it or nothing.

    `value_of(VARIABLE)` returns nothing for a variable that is not known in the play; its port is left out.
    """
    found = []
    for name, reach in ((name, reach) for component in components for name, reach in component.ports.items()):
        fixed = str(name).isdigit()
        port = name if fixed else value_of(name)
        if str(port).isdigit():
            found.append({"port": int(port), "reach": reach, "variable": "" if fixed else name})
    return found


def footprint(components: Iterable[Component], domain: str) -> dict[str, Any]:
    """Return what all of them leave on a host outside of the stack's own two directories, as the module `uninstall` takes it."""
    known = list(components)
    packages: dict[str, dict[str, Any]] = {}
    for name, package in (each for component in known for each in component.packages.items()):
        packages[name] = {**packages.get(name, {}), **package}
    merges: dict[str, list[str]] = {}
    for path, keys in (each for component in known for each in component.merges.items()):
        merges[path] = [*merges.get(path, []), *keys]

    def listed(kind: str) -> list[str]:
        return list(dict.fromkeys(name for component in known for name in getattr(component, kind)))

    found = {kind: listed(kind) for kind in ("paths", "groups", "networks", "users")}
    found["data_paths"] = [path.replace("{domain}", domain) for path in listed("data_paths")]
    found["images"] = [str(image["reference"]) for image in images(known).values() if "reference" in image] + list(base_images(known).values())
    return {"packages": packages, "merges": merges, "replaces": {k: v for component in known for k, v in component.replaces.items()}, **found}


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
