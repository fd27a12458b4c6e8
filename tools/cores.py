"""A virtual environment for each ansible-core that the collection supports, and for those that it refuses.

    python tools/cores.py lock     write tests/cores/*.lock again from their .in files

tools/sanity.py and tools/versions.py use the rest. What belongs to a core lies below .cache/core-<version>/.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "tests" / "cores"
# The Python that runs each core here. Together they are those on which the collection's controller side runs.
SUPPORTED = {"2.19": "3.11", "2.20": "3.12", "2.21": "3.13"}
# One sentence is all that these get.
TOO_OLD = {"2.16": "3.11", "2.18": "3.11"}
# Name of each environment, its lock and its directory, and its Python.
ENVIRONMENTS = {**{f"core-{core}": python for core, python in {**TOO_OLD, **SUPPORTED}.items()}, "importer": "3.11"}
NAMESPACE, NAME = "selfhosted", "agent_stack"


class CoreError(Exception):
    """What is missing or wrong, in one sentence for the user."""


def chosen(names: Iterable[str], known: Mapping[str, str] = SUPPORTED) -> list[str]:
    """Return the cores asked for, all of `known` if none was. Raises CoreError."""
    names = list(names)
    for name in names:
        if name not in known:
            raise CoreError(f"CORE is {name!r}; allowed are {', '.join(known)}.")
    return names or list(known)


def directory(name: str) -> Path:
    """Return where all lies that belongs to an environment."""
    return ROOT / ".cache" / name


def programs(name: str) -> Path:
    """Return the directory of an environment's own programs."""
    return directory(name) / "venv" / "bin"


def search_path(environ: Mapping[str, str]) -> str:
    """Return PATH with the Pythons of pyenv at its end: pyenv's own shims do not run those that are not chosen."""
    root = Path(environ.get("PYENV_ROOT") or Path(environ.get("HOME", "/")) / ".pyenv")
    found = [str(path) for path in sorted(root.glob("versions/3.*/bin"))]
    kept = [path for path in environ.get("PATH", os.defpath).split(os.pathsep) if path != str(root / "shims")]
    return os.pathsep.join([*kept, *found])


def find_python(version: str) -> Path:
    """Return the interpreter of this version, such as 3.12. Raises CoreError."""
    result = subprocess.run(
        ["uv", "python", "find", "--no-project", "--system", version],
        env={**os.environ, "PATH": search_path(os.environ)},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise CoreError(f"Python {version} is missing: install python{version}, or run `pyenv install {version}` or `uv python install {version}`.")
    return Path(result.stdout.strip())


def ensure(name: str) -> Path:
    """Make an environment where it is missing or its lock has changed, and return the directory of its programs. Raises CoreError."""
    lock = LOCKS / f"requirements-{name}.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    mark = directory(name) / "venv" / ".complete"
    if not mark.exists() or mark.read_text() != digest:
        interpreter = find_python(ENVIRONMENTS[name])
        print(f"== {name}: a virtual environment in {mark.parent.relative_to(ROOT)}", flush=True)
        run(["uv", "venv", "--quiet", "--clear", "--python", str(interpreter), str(mark.parent)])
        run(["uv", "pip", "install", "--quiet", "--python", str(programs(name) / "python"), "--require-hashes", "-r", str(lock)])
        mark.write_text(digest)
    return programs(name)


def environment(name: str, home: Path) -> dict[str, str]:
    """Return the environment variables for the programs of `name`: a home of their own, and no setting of the user's Ansible."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_") and key not in dropped}
    home.mkdir(parents=True, exist_ok=True)
    return {**kept, "HOME": str(home), "PATH": f"{programs(name)}{os.pathsep}{search_path(os.environ)}"}


def build(galaxy: Path, target: Path, source: Path = ROOT) -> Path:
    """Build the collection's archive into `target`, which is emptied first, and return the file. Raises CoreError."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    run([str(galaxy), "collection", "build", "--output-path", str(target), str(source)], quiet=True)
    (archive,) = target.glob(f"{NAMESPACE}-{NAME}-*.tar.gz")
    return archive


def stage(archive: Path, target: Path) -> Path:
    """Unpack the archive to where the collection is below `target`, which is emptied first, and return that directory."""
    shutil.rmtree(target, ignore_errors=True)
    collection = target / "ansible_collections" / NAMESPACE / NAME
    collection.mkdir(parents=True)
    # Debian 12's Python has no safe tarfile.extractall.
    run(["tar", "--extract", "--file", str(archive), "--directory", str(collection)])
    return collection


def run(command: list[str], *, quiet: bool = False, environ: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a command, show its output or return it. Raises CoreError with what it wrote."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    result = subprocess.run(command, cwd=cwd, env=environ, text=True, check=False, **output)  # type: ignore[call-overload]
    if result.returncode != 0:
        raise CoreError(f"`{' '.join(command)}` ended with {result.returncode}.\n{(result.stdout or '').strip()}".strip())
    return result.stdout or ""


def attempt(command: list[str], environ: Mapping[str, str]) -> tuple[str, int]:
    """Run a command that may fail, and return its output and exit status."""
    result = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return result.stdout, result.returncode


def lock() -> None:
    for name, python in ENVIRONMENTS.items():
        source = LOCKS / f"requirements-{name}.in"
        options = ["--quiet", "--universal", "--python-version", python, "--generate-hashes", "--no-emit-index-url", "--no-header"]
        run(["uv", "pip", "compile", *options, source.name, "-o", source.with_suffix(".lock").name], cwd=LOCKS)


if __name__ == "__main__":
    if sys.argv[1:] != ["lock"]:
        raise SystemExit(__doc__)
    try:
        lock()
    except CoreError as error:
        raise SystemExit(f"error: {error}") from None
