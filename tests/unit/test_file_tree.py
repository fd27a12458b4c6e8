"""Directories and files in one step, through Ansible itself."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.play

ROOT = Path(__file__).resolve().parents[2]
ME = str(os.geteuid())


def run(arguments: dict[str, Any], *options: str) -> tuple[dict[str, Any], str]:
    """Run the module on this machine. Return its result and all that Ansible printed."""
    command = [str(Path(sys.executable).parent / "ansible"), "localhost", "-m", "selfhosted.agent_stack.file_tree", "-a", json.dumps(arguments)]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    start = done.stdout.index("=> {") + 3
    return json.JSONDecoder().raw_decode(done.stdout[start:])[0], done.stdout


def wanted(directory: Path, **file: str) -> dict[str, Any]:
    """A directory and a file in it, as the module's arguments."""
    content = {"path": str(directory / "sub" / "file"), "content": "one\n", "owner": ME, "mode": "0640"} | file
    return {"directories": [{"path": str(directory / "sub"), "owner": ME, "mode": "0700"}], "files": [content]}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_writes_once(tmp_path: Path) -> None:
    result, _ = run(wanted(tmp_path / "a" / "b"))
    directory = tmp_path / "a" / "b" / "sub"
    assert result["changed"]
    assert result["paths"] == [str(directory), str(directory / "file")]
    assert (directory / "file").read_text() == "one\n"
    assert (mode(tmp_path / "a"), mode(directory), mode(directory / "file")) == (0o755, 0o700, 0o640)
    assert [path.name for path in directory.iterdir()] == ["file"]
    inode = (directory / "file").stat().st_ino
    result, _ = run(wanted(tmp_path / "a" / "b"))
    assert not result["changed"]
    assert result["paths"] == []
    assert (directory / "file").stat().st_ino == inode


def test_corrects_content_and_mode(tmp_path: Path) -> None:
    run(wanted(tmp_path))
    path = tmp_path / "sub" / "file"
    path.write_text("else")
    path.chmod(0o666)
    result, output = run(wanted(tmp_path), "--diff")
    assert result["changed"]
    assert "-else" in output
    assert "+one" in output
    assert (path.read_text(), mode(path)) == ("one\n", 0o640)
    path.chmod(0o600)
    result, _ = run(wanted(tmp_path))
    assert result["paths"] == [str(path)]
    assert mode(path) == 0o640


def test_check_mode_only_says_so(tmp_path: Path) -> None:
    result, output = run(wanted(tmp_path), "--check", "--diff")
    assert result["changed"]
    assert "+one" in output
    assert list(tmp_path.iterdir()) == []
    run(wanted(tmp_path))
    result, _ = run(wanted(tmp_path, content="two\n", mode="0600"), "--check")
    assert result["changed"]
    assert (tmp_path / "sub" / "file").read_text() == "one\n"
    assert mode(tmp_path / "sub" / "file") == 0o640


def test_invalid_content_is_not_put_in_place(tmp_path: Path) -> None:
    run(wanted(tmp_path))
    result, _ = run(wanted(tmp_path, content="if\n", validate="/bin/sh -n %s"))
    assert str(tmp_path / "sub" / "file") in result["msg"]
    assert "not valid" in result["msg"]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["file"]
    assert (tmp_path / "sub" / "file").read_text() == "one\n"
    result, _ = run(wanted(tmp_path, content="true\n", validate="/bin/sh -n %s"))
    assert result["changed"]
    assert (tmp_path / "sub" / "file").read_text() == "true\n"


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".file.new").symlink_to(tmp_path / "victim")
    run(wanted(tmp_path))
    assert not (tmp_path / "victim").exists()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["a file where a directory should be", "a directory where a file should be"])
def test_names_the_path_that_is_in_the_way(tmp_path: Path, kind: str) -> None:
    if kind.startswith("a file"):
        (tmp_path / "sub").write_text("")
    else:
        (tmp_path / "sub" / "file").mkdir(parents=True)
    result, _ = run(wanted(tmp_path))
    assert result["msg"].startswith(f"Cannot write {tmp_path / 'sub'}")
