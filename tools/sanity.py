"""ansible-test sanity on the archive that users get, with each ansible-core, without Docker.

    python tools/sanity.py [2.19 ...]     all cores that tools/cores.py supports, if none is named

ansible-test makes a virtual environment for each of its tests, with packages from pip's index, and has a home of its own below .cache. Its first step
would fetch get-pip from the project's server; Python's ensurepip does the same from what Python has with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import cores
import machine
from cores import CoreError

# The oldest Python of the hosts, Ubuntu 22.04's. ansible-test only compiles and imports with it, as modules are to run there.
HOST_PYTHON = "3.10"
HOST_TESTS = ("compile", "import")
SANITY = cores.ROOT / "tests" / "sanity"
GET_PIP = '''"""In place of get-pip: the pip that Python has with it."""
import ensurepip

ensurepip.bootstrap(default_pip=True)
'''


def pip_version(source: str) -> str:
    """Return the version of pip that ansible-test asks for, from the source of its python_requirements.py. Raises CoreError."""
    found = re.search(r"^\s+pip='([0-9.]+)',$", source, re.M)
    if not found:
        raise CoreError("ansible-test does not say in python_requirements.py which pip it fetches; tools/sanity.py has to be adapted to this ansible-core.")
    return found[1]


def pip_conf(settings: Mapping[str, str]) -> str:
    """Return a pip.conf with these settings: ansible-test passes none of pip's variables on, and the user's own file is in another home."""
    lines = [f"{name} = {' '.join(value.split())}" for name, value in sorted(settings.items())]
    return "\n".join(["[global]", *lines]) + "\n"


def expand(rules: str, files: Iterable[str]) -> str:
    """Return the lines of the ignore files: each rule of ignore.in for each of the archive's files that its pattern names. Raises CoreError."""
    names = sorted(files)
    lines = []
    for rule in rules.splitlines():
        if not rule or rule.startswith("#"):
            continue
        found = re.fullmatch(r"(\S+) (\S+) # (\S.*)", rule)
        if not found:
            raise CoreError(f"tests/sanity/ignore.in has the line {rule!r}; allowed is `PATTERN TEST # REASON`.")
        pattern, test, reason = found.groups()
        # `**/` is any number of directories, none as well.
        expression = "[^/]*".join("(?:.*/)?".join(map(re.escape, part.split("**/"))) for part in re.split(r"(?<!\*)\*(?!\*)", pattern))
        meant = [name for name in names if re.fullmatch(expression, name)]
        if not meant:
            raise CoreError(f"tests/sanity/ignore.in names {pattern}, and the archive has no such file.")
        lines += [f"{name} {test} # {reason}" for name in meant]
    return "".join(f"{line}\n" for line in lines)


def write_ignores(collection: Path) -> None:
    """Write the ignore file of every core, here and in the staged collection, as the archive's files are now."""
    files = [path.relative_to(collection).as_posix() for path in collection.rglob("*") if path.is_file()]
    content = expand((SANITY / "ignore.in").read_text(), files)
    for core in cores.SUPPORTED:
        for directory in (SANITY, collection / "tests" / "sanity"):
            (directory / f"ignore-{core}.txt").write_text(content)


def not_run(output: str) -> dict[str, str]:
    """Return the tests that did not run, with the reason, from the output of `ansible-test sanity -v`."""
    reasons, test, missing = {}, "", ""
    for line in output.splitlines():
        if running := re.match(r'Running sanity test "([a-z-]+)"', line):
            test, missing = running[1], ""
        elif skipped := re.match(r'WARNING: Skipping sanity test "([a-z-]+)" (.*)$', line):
            reasons[skipped[1]] = skipped[2]
        elif program := re.match(r'WARNING: Required program "(.+)" not found', line):
            missing = f"there is no program {program[1]}"
        elif line == "No tests applicable." and test:
            reasons[test] = missing or "the archive has no file of its kind"
    return reasons


def worth_showing(line: str) -> bool:
    """Whether a line of ansible-test is about the tests, rather than the packages that it installs for them."""
    return line.startswith(("Running sanity test", "ERROR:", "FATAL:", "WARNING: Skipping", "WARNING: Required"))


def prepare_home(name: str) -> Path:
    """Return ansible-test's home: get-pip in its cache, and pip's settings."""
    home = cores.directory(name) / "home"
    (internals,) = cores.programs(name).parent.glob("lib/python*/site-packages/ansible_test/_internal/python_requirements.py")
    file = f"get_pip_{pip_version(internals.read_text()).replace('.', '_')}.py"
    for path, content in {home / ".ansible/test/cache" / file: GET_PIP, home / ".config/pip/pip.conf": pip_conf(machine.pip_settings())}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return home


def check(core: str) -> bool:
    """Run all tests, show their output, and say at the end which of them did not run. Return whether those that ran passed."""
    name = f"core-{core}"
    programs = cores.ensure(name)
    archive = cores.build(programs / "ansible-galaxy", cores.directory(name) / "archive")
    collection = cores.stage(archive, cores.directory(name) / "collections")
    write_ignores(collection)
    # ansible-test asks git for the files, and would find those of the checkout around it, of which .cache is none.
    cores.run(["git", "init", "--quiet", str(collection)])
    environ = cores.environment(name, prepare_home(name))
    host_python = cores.find_python(HOST_PYTHON)
    environ["PATH"] += f"{os.pathsep}{host_python.parent}"
    command = [str(programs / "ansible-test"), "sanity", "--color", "no", "-v"]
    own = ["--python", cores.SUPPORTED[core]]
    host = [word for test in HOST_TESTS for word in ("--test", test)] + ["--python", HOST_PYTHON]
    left_out: dict[str, str] = {}
    passed = True
    for arguments in (own, host):
        print(f"== ansible-core {core}: ansible-test sanity {' '.join(arguments)}", flush=True)
        started = time.monotonic()
        status, output = follow([*command, *arguments], collection, environ)
        passed = passed and status == 0
        left_out |= not_run(output)
        print(f"== ansible-core {core}: {'passed' if status == 0 else f'failed ({status})'}, {time.monotonic() - started:.0f} s", flush=True)
    for test, reason in left_out.items():
        print(f"== ansible-core {core}: not run: {test}: {reason}", flush=True)
    return passed


def follow(command: list[str], cwd: Path, environ: Mapping[str, str]) -> tuple[int, str]:
    """Run ansible-test and show what is about the tests while it comes, and its last lines if it fails. Return its exit status and the whole output."""
    lines = []
    with subprocess.Popen(command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            if worth_showing(line):
                print(line, end="", flush=True)
    if process.returncode != 0:
        print("...", *(line.rstrip()[:300] for line in lines[-20:]), sep="\n", flush=True)
    return process.returncode, "".join(lines)


def main() -> None:
    try:
        failed = [core for core in cores.chosen(sys.argv[1:]) if not check(core)]
    except CoreError as error:
        raise SystemExit(f"error: {error}") from None
    if failed:
        raise SystemExit(f"error: ansible-test sanity failed with ansible-core {', '.join(failed)}; what it found stands above.")


if __name__ == "__main__":
    main()
