"""Prepare a release: version, changelog, archive, and what Galaxy says of it. Nothing is committed and nothing is published.

`python tools/release.py VERSION` wants a clean checkout, and leaves it as it was if a step fails.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import cores
import importer
import sanity
import yaml
from cores import ROOT, CoreError

TODO = """
== {archive} is ready. What a person still has to do:
   1. read `git diff` and CHANGELOG.md, and correct the fragments' sentences in changelogs/changelog.yaml if need be
   2. make test-all && make sanity && make versions && make drills
   3. git commit -am "Release {version}" && git tag -s {version} && git push --follow-tags
   4. ansible-galaxy collection publish {archive}
   5. with the first change after it: set the next version in galaxy.yml"""


def key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def refusal(version: str, current: str, released: Iterable[str], changed: str, fragments: Iterable[str]) -> str:
    """Return the sentence that says why there can be no such release now, or nothing.

    `current` is galaxy.yml's version, `changed` what `git status --porcelain` prints, `fragments` the changes that no release has.
    """
    if not re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", version):
        return f"VERSION is {version!r}; allowed is MAJOR.MINOR.PATCH, such as 1.2.0."
    newest = max(released, key=key, default="0.0.0")
    if key(version) <= key(newest):
        return f"VERSION is {version!r}, and {newest} is released; allowed is a newer one."
    if key(version) < key(current):
        return f"VERSION is {version!r}, and galaxy.yml already has {current}; allowed is that or a newer one."
    if changed.strip():
        return f"The checkout has changes that are not committed, such as {changed.strip().splitlines()[0].split()[-1]}; commit them or put them away."
    if not list(fragments):
        return "changelogs/fragments has no change, so there is nothing to release."
    return ""


def with_version(galaxy: str, version: str) -> str:
    """Return the text of galaxy.yml with another version."""
    text, count = re.subn(r"^version: \S+$", f"version: {version}", galaxy, flags=re.M)
    if count != 1:
        raise CoreError(f"galaxy.yml has {count} lines with `version: `; allowed is one.")
    return text


def with_added(plugin: str, old: str, new: str) -> str:
    """Return the text of a plugin that was added in this release, which was to be called `old`."""
    return re.sub(rf"^(\s*)version_added: {re.escape(old)}$", rf"\1version_added: {new}", plugin, flags=re.M)


def write(version: str, current: str) -> Path:
    """Write all that names the version, and return the archive after Galaxy's checks. Raises CoreError."""
    galaxy = ROOT / "galaxy.yml"
    galaxy.write_text(with_version(galaxy.read_text(), version))
    for path in sorted((ROOT / "plugins").glob("*/*.py")):
        text = path.read_text()
        if (changed := with_added(text, current, version)) != text:
            path.write_text(changed)
    programs = Path(sys.executable).parent
    environ = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    cores.run([str(programs / "antsibull-changelog"), "release", "--version", version], environ=environ)
    cores.run([sys.executable, "-m", "pytest", "-q", "tests/unit/test_versions.py", "tests/unit/test_archive.py"], environ=environ)
    # The ignore files are made from the archive's list of files.
    archive = cores.build(programs / "ansible-galaxy", ROOT / ".cache" / "release")
    sanity.write_ignores(cores.stage(archive, ROOT / ".cache" / "release" / "staged"))
    archive = cores.build(programs / "ansible-galaxy", ROOT / ".cache" / "release")
    importer.check(archive)
    return archive


def main() -> None:
    try:
        if len(sys.argv) != 2 or not sys.argv[1]:
            raise CoreError("VERSION is missing; for example: make release VERSION=1.2.0.")
        version = sys.argv[1]
        current = str(yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"])
        released = yaml.safe_load((ROOT / "changelogs" / "changelog.yaml").read_text())["releases"]
        fragments = [path.name for path in (ROOT / "changelogs" / "fragments").glob("*.y*ml")]
        reason = refusal(version, current, released, cores.run(["git", "status", "--porcelain"], quiet=True), fragments)
        if reason:
            raise CoreError(reason)
        # A version that is released stays in the plugins that came with it.
        try:
            archive = write(version, current if current not in released else version)
        except BaseException:
            # It was clean before, so all that is there now is from here.
            cores.run(["git", "restore", "--worktree", "."])
            cores.run(["git", "clean", "--quiet", "-fd"])
            raise
        print(TODO.format(archive=archive.relative_to(ROOT), version=version))
    except CoreError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
