"""Make a signed apt repository of the toolkit's packages, in the flat form of NVIDIA's own. Runs on the test host, as root:
`python3 repository.py NVIDIA_CTK DIRECTORY`.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# An older one, the role's default, and a newer one that must not be taken.
VERSIONS = ("1.19.0-1", "1.20.1-1", "1.21.0-1")
# What each needs of the others, as NVIDIA's do: none of them can be changed alone.
DEPENDS = {
    "libnvidia-container1": "",
    "libnvidia-container-tools": "libnvidia-container1 (= {version})",
    "nvidia-container-toolkit-base": "",
    "nvidia-container-toolkit": "nvidia-container-toolkit-base (= {version}), libnvidia-container-tools (= {version})",
}
RUNTIME = '#!/bin/sh\nexec runc "$@"\n'


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def package(name: str, version: str, ctk: Path, directory: Path) -> str:
    """Build one package into the directory; return its paragraph of the index."""
    architecture = run("dpkg", "--print-architecture").strip()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        tree.chmod(0o755)
        if name == "nvidia-container-toolkit-base":
            programs = tree / "usr" / "bin"
            programs.mkdir(parents=True)
            shutil.copy(ctk, programs / "nvidia-ctk")
            (programs / "nvidia-container-runtime").write_text(RUNTIME)
            for program in programs.iterdir():
                program.chmod(0o755)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: a test <test@example.com>\n"
        if DEPENDS[name]:
            control += f"Depends: {DEPENDS[name].format(version=version)}\n"
        control += "Description: a stand-in for the package of this name\n"
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN" / "control").write_text(control)
        file = directory / f"{name}_{version}_{architecture}.deb"
        run("dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, file)
    content = file.read_bytes()
    return f"{control}Filename: ./{file.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"


def main() -> None:
    ctk, root = Path(sys.argv[1]), Path(sys.argv[2])
    directory = root / run("dpkg", "--print-architecture").strip()
    directory.mkdir(parents=True)
    index = "\n".join(package(name, version, ctk, directory) for version in VERSIONS for name in DEPENDS)
    (directory / "Packages").write_text(index)
    release = f"Date: {run('date', '--utc', '--rfc-email').strip()}\nSHA256:\n {hashlib.sha256(index.encode()).hexdigest()} {len(index)} Packages\n"
    (directory / "Release").write_text(release)
    with tempfile.TemporaryDirectory() as home:
        gpg = ("gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", "")
        run(*gpg, "--quick-generate-key", "test@example.com", "ed25519", "sign")
        run(*gpg, "--clearsign", "--output", directory / "InRelease", directory / "Release")
        run(*gpg, "--armor", "--output", root / "gpgkey", "--export")
        run(*gpg, "--output", root / "gpgkey.gpg", "--export")
        run("gpgconf", "--homedir", home, "--kill", "all")


if __name__ == "__main__":
    main()
