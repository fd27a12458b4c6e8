# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What was on a host before the stack, and how it becomes so again. PRIVATE to the collection: it may change at any time.

The record is made once, before the first change. It has the names of what is installed, and the content of the files that the roles write over.
"""

from __future__ import annotations

import copy
import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD = "before.json"
# In the data's directory, where that stays: the packages whose data stays with it.
KEPT = "uninstalled.json"
PREFIX = "agent-stack-"
UNITS = "agent-stack*"
FIELDS = ("db:Status-Abbrev", "Package", "Pre-Depends", "Depends", "Recommends", "Provides")
QUERY = "\x1f".join(f"${{{name}}}" for name in FIELDS) + "\x1e"
# agent-stack-vllm-blue, and not a project of somebody else that begins in the same way.
PROJECT = re.compile(r"agent-stack-(vllm-blue|vllm-green|vllm-[0-9]+|[a-z][a-z0-9_]*)")


class UninstallError(Exception):
    """Why nothing, or not all, was removed; the message is for the user."""


@dataclass(frozen=True)
class Package:
    """One Debian package. `depends` and `recommends` are lists of alternatives, `provides` its own name and what it stands for."""

    name: str
    installed: bool
    depends: Sequence[Sequence[str]] = ()
    recommends: Sequence[Sequence[str]] = ()
    provides: Sequence[str] = ()


def parse_packages(text: str) -> dict[str, Package]:
    """Return the packages that dpkg knows, by name, from what dpkg-query says with QUERY. One that is only configured is not installed."""
    packages = {}
    for row in text.split("\x1e"):
        if not row.strip():
            continue
        status, name, pre, depends, recommends, provides = row.lstrip("\n").split("\x1f")
        packages[name] = Package(name, status[1:2] == "i", _clauses(pre) + _clauses(depends), _clauses(recommends), [name, *_names(provides)])
    return packages


def _names(text: str) -> list[str]:
    return [re.split(r"[ (:]", part.strip(), maxsplit=1)[0] for part in text.split(",") if part.strip()]


def _clauses(text: str) -> list[list[str]]:
    return [_names(clause.replace("|", ",")) for clause in text.split(",") if clause.strip()]


def removable(packages: Mapping[str, Package], declared: Iterable[str], automatic: Iterable[str], before: Iterable[str]) -> list[str]:
    """Return which packages go: the declared ones that were not there before, and what came with them, unless one that stays needs it.

    `automatic` are those that apt installed for others. What a package recommends counts as needed if that package came later than the record,
    because before it the host did without.
    """
    known = set(before)
    installed = {name: package for name, package in packages.items() if package.installed}
    providers: dict[str, set[str]] = {}
    for package in installed.values():
        for name in package.provides:
            providers.setdefault(name, set()).add(package.name)
    ours = set(declared) & set(installed) - known
    may_go = set(automatic) & set(installed) - known
    waiting = list(ours)
    while waiting:
        package = installed[waiting.pop()]
        wanted = {name for clause in [*package.depends, *package.recommends] for name in clause}
        found = set().union(*(providers.get(name, set()) for name in wanted)) & may_go - ours
        ours |= found
        waiting += found
    while True:
        needed: set[str] = set()
        for package in installed.values():
            if package.name in ours:
                continue
            for clause in [*package.depends, *([] if package.name in known else package.recommends)]:
                having = set().union(*(providers.get(name, set()) for name in clause))
                needed |= having if having <= ours else set()
        if not needed:
            return sorted(ours)
        ours -= needed


def undo_keys(now: Mapping[str, Any], before: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return a JSON object with these keys as they were before; one that was not there goes, and so does a mapping that has become empty."""
    result = copy.deepcopy(dict(now))
    for key in keys:
        *parents, last = key.split(".")
        place: Any = result
        old: Any = before
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
            old = old.get(parent, {}) if isinstance(old, dict) else {}
        if not isinstance(place, dict):
            continue
        if isinstance(old, dict) and last in old:
            place[last] = copy.deepcopy(old[last])
        else:
            place.pop(last, None)
        for depth in range(len(parents), 0, -1):
            _drop_empty(result, parents[:depth], before)
    return result


def _drop_empty(tree: dict[str, Any], path: Sequence[str], before: Mapping[str, Any]) -> None:
    *parents, last = path
    place: Any = tree
    old: Any = before
    for parent in parents:
        place, old = place[parent], old.get(parent, {}) if isinstance(old, dict) else {}
    if place.get(last) == {} and not (isinstance(old, dict) and last in old):
        del place[last]


def flat_keys(options: Mapping[str, Any]) -> list[str]:
    """Return the keys of a JSON object, each as names with dots between them."""
    return [
        key if not rest else f"{key}.{rest}" for key, value in options.items() for rest in (flat_keys(value) if isinstance(value, Mapping) and value else [""])
    ]


def familiar(reference: str) -> tuple[str, str]:
    """Return repository and tag of an image as the engine lists them: without Docker's own registry."""
    name, tag = reference.partition("@")[0].rsplit(":", 1)
    return re.sub(r"^docker\.io/(library/)?", "", name), tag


Run = Callable[..., "tuple[int, str]"]


def run_program(*command: str, **environment: str) -> tuple[int, str]:
    """Run a program. Return its status, 127 if there is none of that name, and its output: what it said to both streams if it failed."""
    try:
        # Tests play the host with a function of this form, and run_command belongs to a module.
        # pylint: disable-next=ansible-bad-function
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    except OSError as error:
        return 127, str(error)
    return result.returncode, result.stdout if result.returncode == 0 else result.stdout + result.stderr


@dataclass
class Host:
    """The host: where its files begin, and how a program is run on it."""

    slash: Path = Path("/")
    run: Run = run_program

    def path(self, path: str) -> Path:
        return self.slash / path.lstrip("/")

    def found(self, pattern: str) -> list[str]:
        """Return the paths that a pattern names, as the host has them."""
        return sorted("/" + os.path.relpath(path, self.slash) for path in glob.glob(str(self.path(pattern))) if os.path.lexists(path))

    def lines(self, *command: str) -> list[str]:
        """Return the lines of a program's output: none if it failed or is not there."""
        status, output = self.run(*command)
        return output.split("\n")[:-1] if status == 0 and output else []

    def packages(self) -> dict[str, Package]:
        status, output = self.run("dpkg-query", "--show", "--showformat", QUERY)
        if status != 0:
            raise UninstallError(f"dpkg-query cannot list the packages: {output.strip()}")
        return parse_packages(output)


def pulled_images(host: Host, root: str) -> list[str]:
    """Return the references that plays ever pulled, of whatever version; the role agent_stack writes them down."""
    file = host.path(f"{root}/pulled-images")
    return file.read_text().split() if file.is_file() else []


def take_record(host: Host, replaces: Iterable[str], merges: Iterable[str], stack: str) -> dict[str, Any]:
    """Return what is on the host, as JSON. `complete` is false on one on which an earlier version has put the stack already."""
    files: dict[str, Any] = {}
    for name in dict.fromkeys([*replaces, *merges]):
        path = host.path(name)
        if path.is_symlink():
            files[name] = {"link": os.readlink(path)}
        elif path.is_file():
            files[name] = {"content": path.read_text(), "mode": path.stat().st_mode & 0o7777, "owner": path.stat().st_uid, "group": path.stat().st_gid}
        else:
            files[name] = None
    return {
        "complete": not host.found(f"{stack}/*/compose.yml"),
        "packages": sorted(name for name, package in host.packages().items() if package.installed),
        "groups": sorted(line.partition(":")[0] for line in host.path("/etc/group").read_text().splitlines()),
        "images": sorted(set(host.lines("docker", "image", "ls", "--no-trunc", "--quiet"))),
        "files": files,
    }


@dataclass(frozen=True)
class Wish:
    """What is to go. `footprint` is what the components declare, `options` are those of the engine that the inventory sets beside the declared ones."""

    root: str
    data: str
    footprint: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    with_data: bool = False
    with_packages: bool = True


class Removal:
    """Takes the stack off a host. Each step looks for what is there, so that it works where half of it is, and a second time."""

    def __init__(self, host: Host, wish: Wish, *, dry: bool = False) -> None:
        self.host, self.wish, self.dry = host, wish, dry
        self.removed: dict[str, list[str]] = {}
        self.kept: list[str] = []
        self.footprint = wish.footprint
        self.record: Mapping[str, Any] = {}
        # The record, if it tells what was there before the stack.
        self.before: Mapping[str, Any] = {}

    def everything(self) -> None:
        """Do all of it. Raises UninstallError; what was done until then stays done, and a repetition goes on."""
        for path in (self.wish.root, self.wish.data):
            self._refuse_what_others_own(path)
        self.record = self._read(f"{self.wish.root}/{RECORD}")
        self.before = self.record if self.record.get("complete") else {}
        self._units()
        engine_answers = self.host.run("docker", "version", "--format", "{{.Server.Version}}")[0] == 0
        if engine_answers:
            self._containers()
        restored = self._restore()
        self._files()
        self._read_again(restored, engine_answers)
        going = self._packages_that_go()
        if engine_answers and not set(going) & set(self._engine_packages()):
            self._images()
        self._packages(going)
        self._users()
        self._data()
        # Last, because the record is in it.
        self._tree(self.wish.root)

    def _read(self, path: str) -> dict[str, Any]:
        file = self.host.path(path)
        if not file.exists():
            return {}
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise UninstallError(f"{path} on the host is not JSON ({error}). Move it away: packages and files of others then stay as they are.") from error
        return dict(content)

    def _refuse_what_others_own(self, path: str) -> None:
        if path.count("/") < 2 or self.host.run("dpkg-query", "--search", path)[0] == 0:
            raise UninstallError(f"{path} would be removed with all that is in it, and belongs to the system; allowed is a directory of the stack alone.")

    def _note(self, kind: str, name: str) -> None:
        names = self.removed.setdefault(kind, [])
        if name not in names:
            names.append(name)

    def _do(self, *command: str, **environment: str) -> None:
        """Run a program that changes something, and must not fail."""
        if self.dry:
            return
        status, output = self.host.run(*command, **environment)
        if status != 0:
            raise UninstallError(f"`{' '.join(command)}` ended with {status}: {output.strip()}")

    def _units(self) -> None:
        """Stop them, timers first, so that nothing starts anew what goes."""
        listed = self.host.lines("systemctl", "list-units", "--all", "--plain", "--no-legend", UNITS)
        loaded = [line.split()[0] for line in listed if line.strip() and "not-found" not in line.split()]
        loaded = [name for name in loaded if name.startswith((PREFIX, "agent-stack@")) or name == "agent-stack.target"]
        # systemd's own slice for the units with an instance ends with them.
        loaded = [name for name in loaded if not name.endswith(".slice")]
        for name in sorted(loaded, key=lambda name: (not name.endswith(".timer"), name != "agent-stack.target", name)):
            self._note("units", name)
            self._do("systemctl", "stop", name)
        files = self.host.lines("systemctl", "list-unit-files", "--plain", "--no-legend", UNITS)
        for line in files:
            name, state = [*line.split(), ""][:2]
            if state == "enabled" and "@." not in name:
                self._note("units", name)
                self._do("systemctl", "disable", "--quiet", name)
        if loaded and not self.dry:
            # Otherwise systemd goes on to name those that failed.
            self.host.run("systemctl", "reset-failed", UNITS)

    def _containers(self) -> None:
        for line in self.host.lines("docker", "ps", "--all", "--format", '{{.ID}} {{.Label "com.docker.compose.project"}} {{.Names}}'):
            identity, project, name = [*line.split(" "), "", ""][:3]
            if PROJECT.fullmatch(project):
                self._note("containers", name)
                self._do("docker", "rm", "--force", "--volumes", identity)
        wanted = {PREFIX + name for name in self.footprint["networks"]}
        for line in self.host.lines("docker", "network", "ls", "--format", '{{.Name}} {{.Label "com.docker.compose.project"}}'):
            name, project = [*line.split(" "), ""][:2]
            if name in wanted or PROJECT.fullmatch(project):
                self._note("networks", name)
                self._do("docker", "network", "rm", name)

    def _files(self) -> None:
        certificates = False
        for pattern in self.footprint["paths"]:
            for path in self.host.found(pattern.rstrip("/")):
                if pattern.endswith("/"):
                    self._empty_directory(path)
                    continue
                certificates |= path.startswith("/usr/local/share/ca-certificates/")
                self._tree(path)
        if certificates and self.host.found("/usr/sbin/update-ca-certificates"):
            self._do("update-ca-certificates", "--fresh")

    def _empty_directory(self, path: str) -> None:
        """Remove it if it is empty, or in a dry run would be, and no package has it."""
        place = self.host.path(path)
        left = [entry for entry in place.iterdir() if "/" + os.path.relpath(entry, self.host.slash) not in self.removed.get("paths", [])]
        if place.is_dir() and not left and self.host.run("dpkg-query", "--search", path)[0] != 0:
            self._note("paths", path)
            if not self.dry:
                place.rmdir()

    def _tree(self, path: str) -> None:
        place = self.host.path(path)
        if not os.path.lexists(place):
            return
        if place.is_symlink() or not place.is_dir():
            self._note("paths", path)
            if not self.dry:
                place.unlink()
        elif not place.is_mount():
            self._note("paths", path)
            if not self.dry:
                shutil.rmtree(place)
        else:
            # A disk of its own: what is on it goes, the place where it is mounted stays.
            for entry in sorted(place.iterdir()):
                self._tree(f"{path}/{entry.name}")

    def _restore(self) -> list[str]:
        """Put back what the roles wrote over. Return the units that have to read it."""
        units = []
        for path, keys in self.footprint["merges"].items():
            if self._unmerge(path, [*keys, *flat_keys(self.wish.options)]):
                units.append("docker.service")
        for path, unit in self.footprint["replaces"].items():
            before = self.before.get("files", {}).get(path)
            copied = self.host.path(path + ".before-agent-stack")
            if before is None and copied.exists():
                before = {"content": copied.read_text(), "mode": 0o644, "owner": 0, "group": 0}
            if before is not None and self._put_back(path, before) and unit:
                units.append(unit)
        return units

    def _put_back(self, path: str, before: Mapping[str, Any]) -> bool:
        place = self.host.path(path)
        if not place.parent.is_dir():
            return False
        if os.path.lexists(place) if "link" in before else place.is_file() and place.read_text() == before["content"]:
            return False
        self._note("restored", path)
        if self.dry:
            return True
        if "link" in before:
            place.symlink_to(before["link"])
            return True
        new = place.with_name(f".{place.name}.new")
        new.write_text(before["content"])
        new.chmod(before["mode"])
        if os.geteuid() == 0:
            os.chown(new, before["owner"], before["group"])
        new.replace(place)
        return True

    def _unmerge(self, path: str, keys: Sequence[str]) -> bool:
        place = self.host.path(path)
        # Without a record nothing says that the stack was ever here.
        if not place.is_file() or not self.record:
            return False
        before = self.before.get("files", {}).get(path) or {}
        try:
            now = json.loads(place.read_text())
            old = json.loads(before.get("content") or "{}")
        except ValueError:
            self.kept.append(f"{path}, which is not JSON")
            return False
        after = undo_keys(now, old, keys)
        if after == now:
            return False
        if not after and not before:
            self._tree(path)
        else:
            text = before["content"] if after == old and before else json.dumps(after, indent=4) + "\n"
            self._put_back(path, {"content": text, "mode": 0o644, "owner": 0, "group": 0, **{key: before[key] for key in ("mode", "owner") if key in before}})
        return True

    def _foreign(self) -> list[str]:
        """Return what the engine has that is not ours: containers and volumes, by name."""
        containers = self.host.lines("docker", "ps", "--all", "--format", '{{.Label "com.docker.compose.project"}} {{.Names}}')
        others = [line.split(" ", 1)[1] for line in containers if not PROJECT.fullmatch(line.split(" ", 1)[0])]
        volumes = self.host.lines("docker", "volume", "ls", "--format", '{{.Label "com.docker.compose.project"}} {{.Name}}')
        return others + [line.split(" ", 1)[1] for line in volumes if not PROJECT.fullmatch(line.split(" ", 1)[0])]

    def _read_again(self, restored: Sequence[str], engine_answers: bool) -> None:
        """Have systemd and what goes on running read what is there now."""
        removed = self.removed.get("paths", [])
        if any(path.startswith("/etc/systemd/system/") for path in removed):
            self._do("systemctl", "daemon-reload")
        for unit in dict.fromkeys(path.split("/")[4].removesuffix(".d") for path in removed if path.startswith("/etc/systemd/system/") and ".timer.d/" in path):
            self._do("systemctl", "try-restart", unit)
        for unit in dict.fromkeys(restored):
            if unit != "docker.service":
                self._do("systemctl", "try-reload-or-restart", unit)
            elif engine_answers and self._foreign():
                # They might not survive it, now that live-restore may be off.
                self.kept.append("the running engine's options, until it starts again, because it has containers of others")
            elif engine_answers:
                self._do("systemctl", "try-restart", unit)

    def _engine_packages(self) -> list[str]:
        return [name for name, package in self.footprint["packages"].items() if package.get("in_use") == "containers"]

    def _packages_that_go(self) -> list[str]:
        if not self.wish.with_packages:
            self.kept.append("all packages, as asked")
            return []
        if self.record and not self.before:
            self.kept.append("all packages: an older version installed the stack, and did not record which were there before")
        if not self.before:
            return []
        known = self.host.packages()
        declared = set(self.footprint["packages"])
        for name, package in self.footprint["packages"].items():
            reason = self._in_use(package.get("in_use"))
            if reason and name in known and known[name].installed and name not in self.before["packages"]:
                declared.discard(name)
                self.kept.append(f"the package {name}, because of {reason}")
        return removable(known, declared, self.host.lines("apt-mark", "showauto"), self.before["packages"])

    def _in_use(self, by: Any) -> str:
        """Return what of others needs a package, or nothing."""
        if by == "containers":
            return next(iter(self._foreign()), "")
        ours = [*self.footprint["data_paths"], *self.footprint["replaces"]]
        return next((path for pattern in by or [] for path in self.host.found(pattern) if path not in ours), "")

    def _packages(self, going: Sequence[str]) -> None:
        declared = self.footprint["packages"]
        with_data = [name for name in going if declared.get(name, {}).get("data")]
        stays = [] if self.wish.with_data else with_data
        # First what only is removed: it needs some of the others, which apt would otherwise not take without it.
        for word, names in (("remove", stays), ("purge", [name for name in going if name not in stays])):
            if names:
                self._apt(word, names, going)
        for name in going:
            for path in declared.get(name, {}).get("leaves", []) if name not in stays else []:
                if path.endswith("/"):
                    if self.host.path(path).is_dir():
                        self._empty_directory(path.rstrip("/"))
                else:
                    self._tree(path)
        if stays and self.host.path(self.wish.data).is_dir() and not self.dry:
            self.host.path(f"{self.wish.data}/{KEPT}").write_text(json.dumps({"packages": stays}) + "\n")
        if going:
            self._groups()
            if set(going) & set(self._engine_packages()) and self.host.lines("ip", "-oneline", "link", "show", "docker0"):
                self._note("networks", "docker0")
                self._do("ip", "link", "delete", "docker0")

    def _apt(self, word: str, names: Sequence[str], allowed: Sequence[str] = ()) -> None:
        flags = ("-y", "-q", "-o", "APT::Get::AutomaticRemove=false", "-o", "DPkg::Lock::Timeout=120")
        status, said = self.host.run("apt-get", *flags, "--simulate", word, *names, LC_ALL="C")
        if status != 0:
            raise UninstallError(f"apt cannot remove {', '.join(names)}: {said.strip()}")
        would = {line.split()[1].partition(":")[0] for line in said.splitlines() if line.startswith(("Remv ", "Purg "))}
        more = would - {*names, *allowed}
        if more:
            raise UninstallError(f"apt would also remove {', '.join(sorted(more))}, so no package was removed. Remove them by hand.")
        for name in names:
            self._note("packages", name)
        self._do("apt-get", *flags, word, *names, DEBIAN_FRONTEND="noninteractive")

    def _users(self) -> None:
        present = {line.partition(":")[0] for line in self.host.path("/etc/passwd").read_text().splitlines()}
        for name in self.footprint["users"]:
            if name in present:
                self._note("users", name)
                self._do("userdel", name)

    def _groups(self) -> None:
        present = {line.partition(":")[0]: line.split(":")[-1] for line in self.host.path("/etc/group").read_text().splitlines()}
        for name in self.footprint["groups"]:
            if name not in present or name in self.before["groups"]:
                continue
            if present[name]:
                self.kept.append(f"the group {name}, because {present[name]} is in it")
                continue
            self._note("groups", name)
            self._do("groupdel", name)

    def _images(self) -> None:
        """Those that were not there before and that no container uses. What the stack built has a name of its own, in every version."""
        wanted = {familiar(reference) for reference in [*self.footprint["images"], *pulled_images(self.host, self.wish.root)]}
        before = set(self.record.get("images", []))
        for line in self.host.lines("docker", "image", "ls", "--no-trunc", "--digests", "--format", "{{.Repository}} {{.Tag}} {{.Digest}} {{.ID}}"):
            repository, tag, digest, identity = line.split()
            built = repository.startswith("agent-stack/")
            # What was pulled by its digest has no tag.
            pulled = bool(self.record) and identity not in before and any(repository == name and tag in (its, "<none>") for name, its in wanted)
            if not built and not pulled:
                continue
            name = f"{repository}@{digest}" if tag == "<none>" else f"{repository}:{tag}"
            if not self.dry and self.host.run("docker", "image", "rm", name)[0] != 0:
                self.kept.append(f"the image {name}, which a container uses")
                continue
            self._note("images", name)

    def _data(self) -> None:
        if not self.wish.with_data:
            if self.host.path(self.wish.data).is_dir():
                self.kept.append(f"the data in {self.wish.data}")
            return
        for path in self.footprint["data_paths"]:
            self._tree(path)
        gone = {name for name in self.removed.get("packages", []) if self.footprint["packages"].get(name, {}).get("data")}
        if not self.record:
            known = self.host.packages()
            gone |= {name for name in self._read(f"{self.wish.data}/{KEPT}").get("packages", []) if name in known and not known[name].installed}
            purged = sorted(gone - set(self.removed.get("packages", [])))
            if purged:
                self._apt("purge", purged)
        for name in sorted(gone):
            package = self.footprint["packages"].get(name, {})
            for path in [*package.get("data", []), *package.get("leaves", [])]:
                self._tree(path)
        self._tree(self.wish.data)
