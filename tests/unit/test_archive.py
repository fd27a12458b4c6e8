"""What `ansible-galaxy collection build` packs: what a user needs, and nothing that must stay with the one who builds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    *(
        "README.md",
        "LICENSE",
        "LICENSES/GPL-3.0-or-later.txt",
        "LICENSES/BSD-2-Clause.txt",
        "CHANGELOG.md",
        "meta/runtime.yml",
        "meta/execution-environment.yml",
        "requirements.yml",
        "plugins/lookup/image.py",
    ),
    *("playbooks/site.yml", "playbooks/api_keys.yml", "inventories/prod/group_vars/all/main.yml", "files/agent/Dockerfile"),
    # Named like what must not be packed.
    *("roles/agent_stack/tasks/secrets.yml", "roles/agent_stack/tasks/api_keys.yml"),
}
PRIVATE = {
    *("mine/hosts.yml", "mine/group_vars/all/main.yml", "mine/group_vars/all/secrets.yml"),
    *("inventories/demo/group_vars/all/secrets.yml", "inventories/prod/group_vars/all/api_keys.yml"),
    *("inventories/prod/group_vars/agent/secrets.yml", "inventories/lab/deeper/group_vars/secrets.yml", "inventories/prod/host_vars/agent/api_keys.yml"),
    *("group_vars/all/secrets.yml", "playbooks/group_vars/all/api_keys.yml"),
    *(".venv/pyvenv.cfg", ".cache/pip.conf", ".demo/ca.pem", ".collections/ansible_collections/other/x"),
    *("tests/x.py", "tests/cores/x", "tests/swap/x", "tests/system/x", "molecule/default/inventory/group_vars/all/secrets.yml"),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the archive of a copy of this checkout in which everything private lies about."""
    checkout = tmp_path_factory.mktemp("build") / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "__pycache__", "mine"))
    for name in PRIVATE:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("private")
    galaxy = str(Path(sys.executable).parent / "ansible-galaxy")
    command = [galaxy, "collection", "build", "--output-path", str(checkout.parent), str(checkout)]
    result = subprocess.run(command, cwd=checkout.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (file,) = checkout.parent.glob("*.tar.gz")
    with tarfile.open(file) as tar:
        return set(tar.getnames())


def test_what_a_user_needs_is_packed(archive: set[str]) -> None:
    assert archive >= NEEDED


def test_nothing_private_is_packed(archive: set[str]) -> None:
    assert archive & PRIVATE == set()
    assert {name.partition("/")[0] for name in archive} & {"mine", "molecule", ".venv", ".cache", ".demo"} == set()


def test_nothing_that_only_a_checkout_needs_is_packed(archive: set[str]) -> None:
    assert {name for name in archive if name.startswith("tests") and not name.startswith("tests/sanity/ignore")} == {
        "tests",
        "tests/config.yml",
        "tests/sanity",
    }
    assert [name for name in archive if name.startswith("files/agent/tests")] == []
    allowed = {"changelogs", "docs", "files", "inventories", "meta", "playbooks", "plugins", "roles", "tests", "LICENSES"}
    files = {"CHANGELOG.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md", "SECURITY.md", "requirements.yml", "site.yml"}
    assert {name.partition("/")[0] for name in archive} - allowed - files == {"group_vars"}  # left empty by the test's own private files
    assert [name for name in archive if name.startswith("inventories/demo")] == []


def test_every_file_that_a_play_reads_is_packed(archive: set[str]) -> None:
    tracked = subprocess.run(["git", "ls-files", "roles", "plugins", "playbooks", "files", "meta"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    wanted = {name for name in tracked.stdout.splitlines() if not name.startswith("files/agent/tests/") and (ROOT / name).exists()}
    assert {name for name in wanted if "/." not in name} - archive == set()


def test_git_ignores_the_same_and_no_source() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = "\n".join(sorted(PRIVATE | NEEDED))
    result = subprocess.run(["git", "check-ignore", "--no-index", "--stdin"], cwd=ROOT, input=names, capture_output=True, text=True, check=False)
    assert set(result.stdout.splitlines()) == {name for name in PRIVATE if not name.startswith("tests/")}
