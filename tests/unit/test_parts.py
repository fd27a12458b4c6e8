"""What `make check`, `make test` and `make test-all` say of their parts."""

from __future__ import annotations

import sys
from pathlib import Path

import parts
import pytest


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(parts, "DIRECTORY", tmp_path / "parts")
    monkeypatch.delenv("PARTS", raising=False)
    return tmp_path / "parts"


@pytest.mark.parametrize(("script", "status"), [("print('done')", 0), ("raise SystemExit(3)", 3)])
def test_a_part_ends_as_its_command_did(directory: Path, capfd: pytest.CaptureFixture[str], script: str, status: int) -> None:
    assert parts.main(["run", "some", sys.executable, "-c", script]) == status
    name, _begin, _end, recorded = (directory / "seconds.tsv").read_text().split()
    assert (name, int(recorded)) == ("some", status)
    assert f"== some: {'failed' if status else 'passed'} after 0 s" in capfd.readouterr().out


def test_a_quiet_part_shows_why_it_failed_and_nothing_else(directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PARTS", "quiet")
    script = "print('FAILED test_x'); [print('chatter', n) for n in range(100)]; raise SystemExit(1)"
    assert parts.main(["run", "some", sys.executable, "-c", script]) == 1
    out = capfd.readouterr().out
    assert "FAILED test_x" in out
    assert "chatter 99" in out
    assert "chatter 50" not in out
    assert len((directory / "some.log").read_text().splitlines()) == 101


def test_a_quiet_part_that_passes_says_its_seconds(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PARTS", "quiet")
    assert parts.main(["run", "some", sys.executable, "-c", "print('chatter')"]) == 0
    assert capfd.readouterr().out == "== some\n== some: passed after 0 s\n"


def test_the_table_is_in_order_and_has_the_whole() -> None:
    text, minutes = parts.table("late\t160\t220\t1\nearly\t100\t170\t0\n")
    assert [line.split() for line in text.splitlines()] == [
        ["part", "begin", "seconds"],
        ["early", "0", "70"],
        ["late", "60", "60", "failed"],
        ["in", "all", "120"],
    ]
    assert minutes == 2


@pytest.mark.parametrize(("limit", "status"), [([], 0), (["3"], 0), (["1"], 1)])
def test_a_limit_in_minutes(directory: Path, limit: list[str], status: int) -> None:
    directory.mkdir()
    (directory / "seconds.tsv").write_text("some\t100\t220\t0\n")
    assert parts.main(["table", *limit]) == status


def test_nothing_was_run() -> None:
    assert parts.main(["reset"]) == 0
    assert parts.table("") == ("nothing was run", 0)


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "name"], ["table", "1", "2"]])
def test_bad_arguments(arguments: list[str]) -> None:
    assert parts.main(arguments) == 2
