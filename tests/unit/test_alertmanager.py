"""What is made of monitoring_alert_receivers: which lists are refused with which words, and who hears of what from a real Alertmanager."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import promql
import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _alertmanager

HOOK = {"name": "ops", "type": "webhook", "url": "https://chat.example.com/hooks/x"}
MAIL = {"name": "mail", "type": "email", "to": "ops@example.com", "from": "stack@example.com", "smarthost": "smtp.example.com:587"}
PREFIX = "monitoring_alert_receivers "

REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"type": "webhook"}], "has the name None at place 1; allowed: letters, digits"),
    ([{**HOOK, "name": "none"}], "has the name 'none' at place 1"),
    ([{**HOOK, "name": "a b"}], "has the name 'a b' at place 1"),
    ([HOOK, HOOK], "has the name ops twice; allowed: different names."),
    (
        [{**HOOK, "name": "watchdog"}],
        'has watchdog, and none of them gets alerts of the severity critical; allowed: an empty list, or a receiver (not "watchdog")',
    ),
    ([{**HOOK, "severities": ["critical"]}], "has ops, and none of them gets alerts of the severity warning"),
    ([{**HOOK, "severities": []}], "has severities [] at ops; allowed: a list of critical and warning."),
    ([{**HOOK, "severities": ["page"]}], "has severities ['page'] at ops"),
    ([{"name": "ops"}], "has nothing to send with at ops; allowed: a type, one of email, slack, webhook, ntfy, telegram, pagerduty, or *_configs."),
    ([{**HOOK, "webhook_configs": [{}]}], "has webhook_configs and a type at ops"),
    ([{"name": "ops", "webhook_configs": []}], "has an empty webhook_configs at ops"),
    ([{"name": "ops", "webhook_configs": [{}], "url": "x"}], "has url at ops; allowed: name, severities and *_configs."),
    ([{"name": "ops", "type": "pigeon"}], "has the type 'pigeon' at ops; allowed: one of email, slack, webhook, ntfy, telegram, pagerduty."),
    ([{"name": "ops", "type": "slack"}], "lacks url at ops; allowed: url for the type slack."),
    ([{**MAIL, "urls": "x"}], "has urls at mail; allowed: to, from, smarthost, username, password, require_tls for the type email."),
    ([{**HOOK, "url": "chat.example.com"}], "has a value that is not shown as url at ops; allowed: an address that begins with http:// or https://."),
    ([{**HOOK, "url": "https://chat.example.com:99999/"}], "has a value that is not shown as url at ops"),
    ([{**HOOK, "url": ["https://chat.example.com"]}], "has a value that is not shown as url at ops"),
    ([{**MAIL, "to": "ops"}], "has 'ops' as to at mail; allowed: one e-mail address."),
    ([{**MAIL, "smarthost": "smtp.example.com"}], "has 'smtp.example.com' as smarthost at mail; allowed: host:port."),
    ([{**MAIL, "password": "two\nlines"}], "has a value that is not shown as password at mail; allowed: a text of one line."),
    ([{**MAIL, "require_tls": "no"}], "has 'no' as require_tls at mail; allowed: true or false."),
    ([{"name": "t", "type": "telegram", "token": "1:x", "chat_id": "@ops"}], "has '@ops' as chat_id at t; allowed: a whole number."),
]


@pytest.mark.parametrize(("receivers", "words"), REFUSED)
def test_what_is_refused(receivers: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(_alertmanager.ReceiverError) as caught:
        _alertmanager.configuration(receivers)
    assert str(caught.value).startswith(PREFIX + words)


@pytest.mark.parametrize(
    ("receivers", "routed"),
    [
        ([], []),
        ([HOOK], ["ops"]),
        ([HOOK, MAIL, {**HOOK, "name": "watchdog"}], ["ops", "mail"]),
        ([{**HOOK, "severities": ["critical"]}, {**MAIL, "severities": ["warning"]}], ["ops", "mail"]),
        ([{"name": "own", "webhook_configs": [{"url": "http://127.0.0.1:1/"}]}], ["own"]),
    ],
)
def test_every_receiver_is_routed(receivers: list[dict[str, Any]], routed: list[str]) -> None:
    config = _alertmanager.configuration(receivers)
    heartbeat, *others = config["route"]["routes"]
    assert [route["receiver"] for route in others] == routed
    assert heartbeat["receiver"] == ("watchdog" if "watchdog" in [receiver["name"] for receiver in receivers] else "none")
    assert {route["receiver"] for route in config["route"]["routes"]} | {"none"} == {receiver["name"] for receiver in config["receivers"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service(ThreadingHTTPServer):
    """Takes what the services of the receivers take, and refuses what they would refuse."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, list[str]], dict[str, str], Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [path for path, *_ in self.got]


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append((parts.path, parse_qs(parts.query), dict(self.headers.items()), body))
        answer = b'{"ok": true, "status": "success", "result": {"message_id": 1, "date": 0, "chat": {"id": 1, "type": "group"}}}'
        self.send_response(202 if parts.path == "/v2/enqueue" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Mailbox:
    """An SMTP server for one letter at a time."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, str, str]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, connection.makefile("rwb") as stream:
                    self._one(stream)

    def _one(self, stream: Any) -> None:
        def say(text: str) -> None:
            stream.write(f"{text}\r\n".encode())
            stream.flush()

        say("220 mail.example.com")
        sender = recipient = ""
        for line in stream:
            word = line.decode().strip()
            if word.upper().startswith(("EHLO", "HELO")):
                say("250 mail.example.com")
            elif word.upper().startswith("MAIL FROM:"):
                sender = word[10:].split()[0].strip("<>")
                say("250 ok")
            elif word.upper().startswith("RCPT TO:"):
                recipient = word[8:].strip("<>")
                say("250 ok")
            elif word.upper() == "DATA":
                say("354 go on")
                lines = []
                for text in stream:
                    if text == b".\r\n":
                        break
                    lines.append(text)
                self.letters.append((sender, recipient, str(message_from_bytes(b"".join(lines))["Subject"])))
                say("250 ok")
            elif word.upper() == "QUIT":
                say("221 bye")
                return
            else:
                say("502 no")


class Alertmanager:
    """Debian's, with what the role would write, and shorter waits."""

    def __init__(self, directory: Path, receivers: list[dict[str, Any]]) -> None:
        program = shutil.which("prometheus-alertmanager")
        if program is None:
            pytest.fail("prometheus-alertmanager is not installed; tests/packages.sh does that")
        config = _alertmanager.configuration(receivers)
        for route in (config["route"], *config["route"]["routes"]):
            route |= {"group_wait": "200ms", "group_interval": "1s"}
        path = directory / "alertmanager.yml"
        path.write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = directory / "log"
        flags = [
            f"--config.file={path}",
            f"--storage.path={directory}",
            "--cluster.listen-address=",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self.process = subprocess.Popen([program, *flags], stdout=self.log.open("wb"), stderr=subprocess.STDOUT)
        wait(lambda: self._asks("/-/ready") == 200, "Alertmanager is ready")

    def _asks(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return int(answer.status)
        except OSError:
            return 0

    def alert(self, *alerts: dict[str, str]) -> None:
        body = [
            {"labels": labels, "annotations": {"summary": f"{labels['alertname']}!", "description": "Do this.", "runbook_url": "http://r/"}}
            for labels in alerts
        ]
        request = urllib.request.Request(f"{self.url}/api/v2/alerts", json.dumps(body).encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()


def wait(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        yield server
        server.shutdown()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[dict[str, Any]]], Alertmanager]]:
    started: list[Alertmanager] = []

    def begin(receivers: list[dict[str, Any]]) -> Alertmanager:
        started.append(Alertmanager(tmp_path, receivers))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.wait()


def every_type(service: Service, mailbox: Mailbox) -> list[dict[str, Any]]:
    return [
        {"name": "mail", "type": "email", "to": "ops@example.com", "from": "stack@example.com", "smarthost": mailbox.address, "require_tls": False},
        {"name": "slack", "type": "slack", "url": f"{service.url}/slack", "channel": "#ops"},
        {"name": "hook", "type": "webhook", "url": f"{service.url}/hook", "token": "secret-1"},
        {"name": "phone", "type": "ntfy", "url": f"{service.url}/topic", "token": "secret-2"},
        {"name": "telegram", "type": "telegram", "url": service.url, "token": "123:abc", "chat_id": -100},
        {"name": "duty", "type": "pagerduty", "url": f"{service.url}/v2/enqueue", "routing_key": "k" * 32},
    ]


def test_each_type_says_what_its_service_wants_to_hear(start: Callable[[list[dict[str, Any]]], Alertmanager], service: Service) -> None:
    mailbox = Mailbox()
    start(every_type(service, mailbox)).alert({"alertname": "RedisDown", "severity": "critical", "job": "redis"})
    wait(lambda: len({*service.paths()}) == 5 and bool(mailbox.letters), "all six heard of it")
    got = {path: (query, headers, body) for path, query, headers, body in service.got}
    assert mailbox.letters[0][:2] == ("stack@example.com", "ops@example.com")
    assert "RedisDown" in mailbox.letters[0][2]
    _, _, slack = got["/slack"]
    assert slack["channel"] == "#ops"
    assert slack["attachments"][0]["title"] == "1 firing: RedisDown"
    assert "Do this." in slack["attachments"][0]["text"]
    _, headers, hook = got["/hook"]
    assert headers["Authorization"] == "Bearer secret-1"
    assert (hook["status"], hook["alerts"][0]["labels"]["alertname"]) == ("firing", "RedisDown")
    query, headers, phone = got["/topic"]
    assert headers["Authorization"] == "Bearer secret-2"
    # ntfy's own templates, over the body that it gets.
    assert query == {"tpl": ["1"], "t": [_alertmanager.NTFY["t"]], "m": [_alertmanager.NTFY["m"]]}
    assert phone["groupLabels"]["alertname"] == "RedisDown"
    assert phone["alerts"][0]["annotations"]["description"] == "Do this."
    _, _, telegram = got["/bot123:abc/sendMessage"]
    assert int(telegram["chat_id"]) == -100
    assert telegram["text"].startswith("1 firing: RedisDown")
    _, _, duty = got["/v2/enqueue"]
    assert (duty["routing_key"], duty["event_action"], duty["payload"]["severity"]) == ("k" * 32, "trigger", "critical")


def test_severities_choose_and_the_heartbeat_goes_to_the_watchdog_alone(start: Callable[[list[dict[str, Any]]], Alertmanager], service: Service) -> None:
    def hook(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "type": "webhook", "url": f"{service.url}/{name}", **more}

    manager = start([hook("pager", severities=["critical"]), hook("chat"), hook("watchdog"), hook("tickets", severities=["warning"])])
    manager.alert(
        {"alertname": "PostgresDown", "severity": "critical"},
        {"alertname": "GpuHot", "severity": "warning"},
        {"alertname": "Own", "severity": "info"},
        {"alertname": "Watchdog", "severity": "none"},
    )
    wait(lambda: len(service.got) >= 6, "all are sent")
    time.sleep(1)
    heard: dict[str, set[str]] = {}
    for path, _, _, body in service.got:
        heard.setdefault(path, set()).update(alert["labels"]["alertname"] for alert in body["alerts"])
    assert heard == {"/pager": {"PostgresDown"}, "/chat": {"PostgresDown", "GpuHot", "Own"}, "/watchdog": {"Watchdog"}, "/tickets": {"GpuHot"}}


def test_what_explains_silences_what_is_explained(start: Callable[[list[dict[str, Any]]], Alertmanager], service: Service) -> None:
    manager = start([{"name": "ops", "type": "webhook", "url": f"{service.url}/ops"}])
    manager.alert(
        {"alertname": "HostDown", "severity": "critical", "host": "gpu-1"},
        {"alertname": "ModelAway", "severity": "warning", "host": "gpu-1", "job": "vllm"},
        {"alertname": "TargetDown", "severity": "critical", "host": "gpu-2", "job": "node"},
        {"alertname": "RedisDown", "severity": "critical", "host": "front"},
        {"alertname": "AgentNotReady", "severity": "warning", "dependency": "redis"},
        {"alertname": "AgentNotReady", "severity": "warning", "dependency": "postgres"},
        {"alertname": "ModelFirstTokenSlow", "severity": "warning", "model_name": "chat"},
        {"alertname": "ModelLatencyHigh", "severity": "warning", "model_name": "chat"},
        {"alertname": "ModelLatencyHigh", "severity": "warning", "model_name": "other"},
    )
    wait(lambda: len(service.got) >= 6, "the others are sent")
    time.sleep(1)
    heard = {tuple(sorted(alert["labels"].items())) for *_, body in service.got for alert in body["alerts"]}
    named = {(dict(labels)["alertname"], *(dict(labels)[key] for key in ("host", "dependency", "model_name") if key in dict(labels))) for labels in heard}
    assert named == {
        ("HostDown", "gpu-1"),
        ("TargetDown", "gpu-2"),
        ("RedisDown", "front"),
        ("AgentNotReady", "postgres"),
        ("ModelFirstTokenSlow", "chat"),
        ("ModelLatencyHigh", "other"),
    }


def test_inhibitions_name_alerts_that_there_are() -> None:
    names = {rule["alert"] for rule in promql.rules() if "alert" in rule}
    for rule in _alertmanager.INHIBITIONS:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            if matcher.startswith("alertname"):
                assert set(re.findall(r"[A-Z]\w+", matcher)) <= names, matcher


@pytest.mark.parametrize("receivers", [[], [HOOK, MAIL], [{"name": "own", "slack_configs": [{"api_url": "https://s.example.com/", "channel": "#x"}]}]])
def test_amtool_takes_it(tmp_path: Path, receivers: list[dict[str, Any]]) -> None:
    path = tmp_path / "alertmanager.yml"
    path.write_text(yaml.safe_dump(_alertmanager.configuration(receivers)))
    result = subprocess.run(["amtool", "check-config", str(path)], capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stdout + result.stderr
