"""What Galaxy says of the archive: galaxy-importer, and ansible-builder on the requirements of an execution environment.

`python tools/importer.py [ARCHIVE]` builds the archive if none is given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cores
from cores import CoreError

NAME = "importer"
# Galaxy's own settings, and what Automation Hub asks for beside them. Sanity is tools/sanity.py's.
SETTINGS = """[galaxy-importer]
check_required_tags = true
run_ansible_test = false
run_flake8 = false
"""


def complaints(output: str) -> dict[str, list[str]]:
    """Return the importer's errors and warnings."""
    found: dict[str, list[str]] = {"ERROR": [], "WARNING": []}
    for line in output.splitlines():
        level, _colon, text = line.partition(": ")
        if level in found:
            found[level].append(text)
    return found


def check(archive: Path) -> None:
    """Show what both programs say. Raises CoreError if one of them finds an error."""
    programs = cores.ensure(NAME)
    directory = cores.directory(NAME)
    settings = directory / "galaxy-importer.cfg"
    settings.write_text(SETTINGS)
    environ = {**cores.environment(NAME, directory / "home"), "GALAXY_IMPORTER_CONFIG": str(settings)}
    output = cores.run([str(programs / "python"), "-m", "galaxy_importer.main", str(archive)], quiet=True, environ=environ, cwd=directory)
    print(output, end="", flush=True)
    found = complaints(output)
    if found["ERROR"]:
        raise CoreError(f"galaxy-importer found {len(found['ERROR'])} errors in {archive.name}; the first is: {found['ERROR'][0]}")
    collections = directory / "collections"
    cores.stage(archive, collections)
    # It leaves out what every image has, such as PyYAML. Files that it cannot read end it with an error.
    command = [str(programs / "ansible-builder"), "introspect", "--verbosity", "1", str(collections)]
    introspected = cores.run(command, quiet=True, environ=environ, cwd=directory)
    if f"# from collection {cores.NAMESPACE}.{cores.NAME}" not in introspected:
        raise CoreError("ansible-builder introspect finds nothing in meta/execution-environment.yml.")
    print(introspected, end="", flush=True)
    print(f"== {archive.name}: no error, {len(found['WARNING'])} warnings", flush=True)


def main() -> None:
    try:
        archive = Path(sys.argv[1]).resolve() if sys.argv[1:] else cores.build(cores.ensure(NAME) / "ansible-galaxy", cores.directory(NAME) / "archive")
        check(archive)
    except CoreError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
