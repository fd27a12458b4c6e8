"""The collection with each ansible-core, and the sentence that older ones get.

`python tools/versions.py [--inventory DIRECTORY] [2.19 ...]` takes all cores that tools/cores.py supports, if none is named. For each of them: the
archive is built and installed, every playbook passes the syntax check, every plugin and role has documentation, and the unit tests of the plugins pass.
With an inventory of a running test host, such as inventories/demo after `make demo`, site.yml also runs there with --check --diff.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import ansible.release
import cores
from cores import CoreError

COLLECTION = f"{cores.NAMESPACE}.{cores.NAME}"
MACHINE = cores.ROOT / ".cache" / "machine.json"
# Kinds of plugins that ansible-doc knows, and their directories. Action plugins have their documentation in the module of the same name.
KINDS = {"module": "modules", "lookup": "lookup", "filter": "filter", "test": "test"}


def documented(listing: str, names: Iterable[str]) -> None:
    """Raise CoreError for a name that `ansible-doc --json` tells nothing of."""
    found = {name for name, about in json.loads(listing).items() if about}
    missing = sorted(set(names) - found)
    if missing:
        raise CoreError(f"ansible-doc has nothing on {', '.join(missing)}.")


def deprecations(output: str) -> list[str]:
    """Return what Ansible says will go, without the colours and breaks of its lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    # Wrapped sentences go on in the next line, up to an empty one or the next message.
    found = re.findall(r"\[DEPRECATION WARNING\]: (.*?)(?=\n\n|\n\[|\nPLAY|\nTASK|\Z)", plain, re.S)
    return [" ".join(text.split()) for text in found]


def refusal(output: str, full: str) -> str:
    """Return the sentence with which the first task refuses an ansible-core. Raises CoreError if another task came first, or something changed."""
    tasks = re.findall(r"^TASK \[(.*?)\]", output, re.M)
    sentence = re.search(rf"This is ansible-core {re.escape(full)}; {re.escape(COLLECTION)} needs [0-9.]+ or newer\.", output)
    if sentence is None or len(tasks) != 1 or not re.search(r"ok=0 +changed=0 +unreachable=0 +failed=1", output):
        raise CoreError(f"ansible-core {full} is not refused by the first task: {' | '.join(tasks) or 'no task ran'}\n{output.strip()[-2000:]}")
    return sentence[0]


def plugin_tests() -> list[str]:
    """Return the unit tests that load something of the collection."""
    return [str(path.relative_to(cores.ROOT)) for path in sorted((cores.ROOT / "tests" / "unit").glob("test_*.py")) if COLLECTION in path.read_text()]


class Core:
    """One supported ansible-core, with the collection installed beside it."""

    def __init__(self, core: str) -> None:
        self.core = core
        self.name = f"core-{core}"
        self.programs = cores.ensure(self.name)
        self.directory = cores.directory(self.name)
        self.installed = self.directory / "installed"
        environ = cores.environment(self.name, self.directory / "home")
        self.environ = {**environ, "ANSIBLE_COLLECTIONS_PATH": str(self.installed), "ANSIBLE_DEPRECATION_WARNINGS": "true", "ANSIBLE_NOCOLOR": "true"}
        self.checkout = {**environ, "ANSIBLE_CONFIG": str(cores.ROOT / "ansible.cfg"), "ANSIBLE_DEPRECATION_WARNINGS": "true", "ANSIBLE_NOCOLOR": "true"}

    def install(self) -> str:
        """Dependencies are not fetched: those that the `ansible` package brings must be within galaxy.yml's bounds."""
        archive = cores.build(self.programs / "ansible-galaxy", self.directory / "archive")
        return self.run("ansible-galaxy", "collection", "install", "--offline", "--force", "-p", str(self.installed), str(archive))

    def syntax(self) -> str:
        root = self.installed / "ansible_collections" / cores.NAMESPACE / cores.NAME
        playbooks = [f"{COLLECTION}.{path.stem}" for path in sorted((root / "playbooks").glob("*.yml"))]
        return self.run("ansible-playbook", "--syntax-check", "-i", str(root / "inventories" / "prod"), *playbooks)

    def documentation(self) -> str:
        root = self.installed / "ansible_collections" / cores.NAMESPACE / cores.NAME
        output = ""
        for kind, directory in KINDS.items():
            names = [f"{COLLECTION}.{path.stem}" for path in sorted((root / "plugins" / directory).glob("*.py"))]
            if names:
                listing = self.run("ansible-doc", "--json", "-t", kind, *names)
                documented(listing[listing.index("{") :], names)
                output += self.run("ansible-doc", "-t", kind, *names)
        roles = [f"{COLLECTION}.{path.name}" for path in sorted((root / "roles").iterdir())]
        listing = self.run("ansible-doc", "--json", "-t", "role", *roles)
        documented(listing[listing.index("{") :], roles)
        return output + self.run("ansible-doc", "-t", "role", *roles)

    def unit(self) -> str:
        command = [str(self.programs / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", *plugin_tests()]
        return cores.run(command, quiet=True, environ=self.checkout)

    def run(self, program: str, *arguments: str) -> str:
        return cores.run([str(self.programs / program), *arguments], quiet=True, environ=self.environ, cwd=self.directory)

    def check_host(self, inventory: Path) -> str:
        """Raises CoreError if the host is not there, or the play fails or would not end."""
        playbook = str(self.programs / "ansible-playbook")
        # What this machine's proxies and mirrors make necessary, where tools/machine.py wrote it down.
        extra = ["-e", f"@{MACHINE}"] if MACHINE.exists() else []
        cores.run([str(self.programs / "ansible"), "all", "-i", str(inventory), "-m", "ansible.builtin.ping"], quiet=True, environ=self.checkout)
        output = cores.run([playbook, "site.yml", "-i", str(inventory), *extra, "--check", "--diff"], quiet=True, environ=self.checkout)
        print("\n".join(line for line in output.splitlines() if "changed=" in line), flush=True)
        return output


def step(core: str, title: str, work: Callable[[], str]) -> list[str]:
    """Do one step, say how long it took, and return the deprecations that it met. Raises CoreError."""
    started = time.monotonic()
    output = work()
    found = sorted(set(deprecations(output)))
    print(f"== ansible-core {core}: {title}: {time.monotonic() - started:.0f} s{f', {len(found)} deprecations' if found else ''}", flush=True)
    return [f"ansible-core {core}, {title}: {text}" for text in found]


def refuse(core: str) -> str:
    """site.yml with a core that is too old, on the inventory of the example. Raises CoreError."""
    name = f"core-{core}"
    programs = cores.ensure(name)
    environ = {**cores.environment(name, cores.directory(name) / "home"), "ANSIBLE_CONFIG": str(cores.ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "true"}
    version = cores.run([str(programs / "ansible"), "--version"], quiet=True, environ=environ)
    (full,) = re.findall(r"^ansible \[core (\S+)\]", version, re.M)
    output, status = cores.attempt([str(programs / "ansible-playbook"), "site.yml", "-i", "inventories/prod", "-c", "local"], environ)
    if status == 0:
        raise CoreError(f"site.yml does not fail with ansible-core {full}.")
    return refusal(output, full)


def main() -> None:
    parser = argparse.ArgumentParser(description="The collection with each ansible-core.")
    parser.add_argument("--inventory", type=Path, help="inventory of a running test host, for site.yml --check --diff")
    parser.add_argument("--after-make-test", action="store_true", help="leave out the unit tests with this environment's core: they have run already")
    parser.add_argument("core", nargs="*")
    arguments = parser.parse_args()
    try:
        if arguments.inventory and not arguments.inventory.exists():
            raise CoreError(f"--inventory is {str(arguments.inventory)!r}; allowed is an inventory that exists, such as inventories/demo.")
        found = []
        for core in cores.chosen(arguments.core):
            with_core = Core(core)
            found += step(core, "build and install", with_core.install)
            found += step(core, "syntax of every playbook", with_core.syntax)
            found += step(core, "ansible-doc of every plugin and role", with_core.documentation)
            if arguments.after_make_test and ansible.release.__version__.startswith(f"{core}."):
                print(f"== ansible-core {core}: unit tests of the plugins: `make test` runs them with this core", flush=True)
            else:
                found += step(core, "unit tests of the plugins", with_core.unit)
            if arguments.inventory:
                found += step(core, f"site.yml --check --diff, {arguments.inventory}", partial(with_core.check_host, arguments.inventory.resolve()))
        for core in cores.TOO_OLD:
            print(f"== ansible-core {core} is refused: {refuse(core)}", flush=True)
        if found:
            raise CoreError("Ansible announces that these go:\n" + "\n".join(found))
    except CoreError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
