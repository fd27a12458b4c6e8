"""`make demo` ends with a sentence and the last lines of the service that failed, whatever happened, and cleans up after itself."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import host as test_host
import pytest

PASSWORD = "password"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that the demo writes, in a directory of the test's own."""
    group_vars = tmp_path / "group_vars"
    group_vars.mkdir()
    monkeypatch.setattr(demo, "STATE", tmp_path / ".demo")
    monkeypatch.setattr(demo, "CA_FILE", tmp_path / ".demo" / "ca.pem")
    monkeypatch.setattr(demo, "SECRETS", group_vars / "secrets.yml")
    monkeypatch.setattr(demo, "MACHINE", tmp_path / "machine.json")
    (group_vars / "main.yml").write_text("the user's own\n")
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, name: str) -> int:
    monkeypatch.setattr(sys, "argv", ["demo.py", name])
    return demo.main()


@pytest.fixture
def started(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make believe that the host is there; what a command on it says is the command itself."""
    monkeypatch.setattr(test_host, "up", lambda *_arguments: True)
    monkeypatch.setattr(test_host, "run", lambda *words, **_options: " ".join(words))
    demo.SECRETS.write_text(f"agent_stack_secrets: {{nginx_certbot_password: {PASSWORD}}}\n")
    return checkout


def ansible_playbook(checkout: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program in ansible-playbook's place."""
    program = checkout / "bin" / "ansible-playbook"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http.client.RemoteDisconnected("closed"), "RemoteDisconnected: closed"),
        (http.client.BadStatusLine("?"), "BadStatusLine: ?"),
        (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: [Errno 111] Connection refused"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (TypeError("not subscriptable"), "TypeError: not subscriptable"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "JSONDecodeError: Expecting value"),
        (test_host.HostError("`docker exec ...` exited with 1:\nno such container"), "`docker exec ...` exited with 1:\nno such container"),
        (demo.DemoError("POST /chat answered 500"), "POST /chat answered 500"),
    ],
)
def test_what_fails_in_the_proof_shows_the_services_last_lines(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, says: str
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise error

    monkeypatch.setattr(demo, "play", lambda: None)
    monkeypatch.setattr(demo, "request", fail)
    assert command(monkeypatch, "run") == 1
    text = capsys.readouterr().err
    assert text.startswith(f"\nerror: {says}")
    assert "\nLast lines of agent:\ndocker exec -i agent-stack-demo docker compose --file /opt/agent-stack/agent/compose.yml logs" in text


def test_lines_that_cannot_be_read_do_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_arguments: Any, **_options: Any) -> str:
        raise test_host.HostError("no such container")

    monkeypatch.setattr(test_host, "run", gone)
    with pytest.raises(demo.DemoError) as told, demo.ask_of("postgres", "postgres"):
        raise demo.DemoError("down")
    assert str(told.value) == "down\nLast lines of postgres:\nThey cannot be read: no such container"


def test_the_model_is_asked_in_the_slot_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str, **_options: Any) -> str:
        if words[-1] == demo.SLOTS:
            return '{"active": "green"}'
        assert "agent-stack-vllm-green-server-1" in words
        return 'vllm:prompt_tokens_total{engine="0"} 3.0\nvllm:generation_tokens_total{engine="0"} 4.0'

    monkeypatch.setattr(test_host, "run", run)
    assert demo.model_counters() == {"prompt_tokens": 3, "generation_tokens": 4}


def test_no_model_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_host, "run", lambda *_words, **_options: '{"active": ""}')
    with pytest.raises(demo.DemoError, match="No model serves"):
        demo.model_counters()


def test_a_play_that_fails_is_a_sentence(started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ansible_playbook(started, monkeypatch, "echo the last line; exit 2")
    assert command(monkeypatch, "run") == 1
    captured = capsys.readouterr()
    assert captured.out.endswith("the last line\n")
    assert captured.err == "\nerror: The play failed; its last lines above say where.\n"


@pytest.fixture
def _interrupts_count() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_count")
def test_an_interrupt_stops_the_play_and_says_how_to_go_on(started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # It interrupts the demo alone, as `kill -INT` does, once that reads its output, and would go on for a minute.
    ansible_playbook(started, monkeypatch, f"trap 'kill $!; echo ended > {started}/trace; exit 1' TERM\nsleep 0.5\nkill -INT $PPID\nsleep 60 &\nwait")
    assert command(monkeypatch, "run") == 130
    assert capsys.readouterr().err == "\ninterrupted: `make demo` goes on from here, `make demo-clean` removes what there is.\n"
    assert (started / "trace").read_text() == "ended\n"


@pytest.mark.parametrize("engine", [True, False])
def test_clean_leaves_no_file(checkout: Path, monkeypatch: pytest.MonkeyPatch, engine: bool) -> None:
    removed: list[str] = []

    def down(name: str) -> None:
        removed.append(name)
        if not engine:
            raise test_host.HostError("No Docker engine answers")

    demo.STATE.mkdir()
    demo.CA_FILE.write_text("certificate")
    for name in ("secrets.yml", "api_keys.yml"):
        demo.SECRETS.with_name(name).write_text("secret")
    monkeypatch.setattr(test_host, "down", down)
    assert command(monkeypatch, "clean") == (0 if engine else 1)
    assert removed == [demo.NAME]
    assert sorted(path.name for path in checkout.rglob("*")) == ["group_vars", "main.yml"]
    assert command(monkeypatch, "clean") == (0 if engine else 1)
