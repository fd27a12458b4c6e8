"""The edge's configuration in a real nginx, in front of a server that answers with what it was asked."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
import pytest

ROLE = Path(__file__).resolve().parents[2] / "roles" / "nginx_certbot"
DOMAIN = "agent.example.com"
SECRET = "s" * 40
PASSWORD = "a good password"
BASIC = "Basic " + base64.b64encode(f"agent:{PASSWORD}".encode()).decode()
KEY = "ask_ci_" + "x" * 43


class Echo(BaseHTTPRequestHandler):
    """Answers with the request's own headers; below /stream, with three events a while apart."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        received = len(self.rfile.read(length))
        if "/stream" in self.path:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(3):
                event = f"id: {number}\ndata: {number}\n\n".encode()
                self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
                time.sleep(0.3)
            self.wfile.write(b"0\r\n\r\n")
            return
        answer = json.dumps({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}, "received": received}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def render(directory: Path, upstream: int) -> str:
    """The template as Ansible renders it, for a host with nginx as Debian 12 has it, with its paths below `directory`."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)  # noqa: S701  no HTML
    environment.filters["comment"] = lambda text: f"# {text}"
    text = environment.from_string((ROLE / "templates" / "nginx.conf.j2").read_text()).render(
        ansible_managed="managed",
        agent_stack_domain=DOMAIN,
        nginx_certbot_upstream=f"127.0.0.1:{upstream}",
        nginx_certbot_requests_per_second=1000,
        nginx_certbot_connections_per_client=100,
        nginx_certbot_read_timeout_seconds=120,
        __nginx_certbot_openai_body_kib=128,
        __nginx_certbot_curves=["X25519", "prime256v1"],
        __nginx_certbot_ipv6={"stat": {"exists": False}},
        __nginx_certbot_http2_directive=False,
        __nginx_certbot_can_reject_handshake=True,
        __nginx_certbot_trusted=False,
        __nginx_certbot_served=directory,
        __nginx_certbot_placeholder=directory,
        __nginx_certbot_htpasswd=directory / "htpasswd",
        __nginx_certbot_proxy_secret=directory / "proxy_secret.conf",
        __nginx_certbot_webroot=directory,
    )
    text = re.sub(r"(?m)^user .*\n", "user root;\n" if os.geteuid() == 0 else "", text)
    temporary = "".join(f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    text = text.replace("http {", "http { " + temporary, 1)
    text = re.sub(r"(?m)^ *include /etc/nginx/.*\n", "", text)
    return text.replace("/run/nginx.pid", f"{directory}/pid").replace("/var/log/nginx", str(directory))


class Edge:
    def __init__(self, port: int, directory: Path) -> None:
        self.port = port
        self.directory = directory

    def connect(self) -> HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.directory / "fullchain.pem"))
        connection = HTTPSConnection(DOMAIN, self.port, context=context, timeout=10)
        # The name is not in the DNS.
        connection.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 10), server_hostname=DOMAIN)
        return connection

    def ask(self, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, Any]:
        connection = self.connect()
        connection.request("POST" if body else "GET", path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text)

    def seen(self, path: str, headers: dict[str, str]) -> dict[str, str]:
        """The headers that arrived behind nginx."""
        status, answer = self.ask(path, headers)
        assert status == 200, answer
        return dict(answer["headers"])


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert nginx, "nginx is missing: sh tests/packages.sh"
    directory = tmp_path_factory.mktemp("nginx")
    directory.chmod(0o755)
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    files = ["-keyout", "privkey.pem", "-out", "fullchain.pem"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run(
        ["openssl", "req", "-x509", *curve, "-nodes", "-days", "1", "-subj", f"/CN={DOMAIN}", "-addext", f"subjectAltName=DNS:{DOMAIN}", *files],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    crypted = subprocess.run(["openssl", "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True).stdout
    (directory / "htpasswd").write_text(f"agent:{crypted}")
    (directory / "proxy_secret.conf").write_text(f'proxy_set_header X-Proxy-Secret "{SECRET}";\n')
    http, https = free_port(), free_port()
    text = render(directory, upstream.server_port)
    text = text.replace("listen 80", f"listen 127.0.0.1:{http}").replace("listen 443", f"listen 127.0.0.1:{https}")
    configuration = directory / "nginx.conf"
    configuration.write_text(text)
    command = [nginx, "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(configuration)]
    check = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    assert "[warn]" not in check.stderr
    server = subprocess.Popen([*command, "-g", "daemon off;"])
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", https)) == 0:
                    break
            time.sleep(0.05)
        yield Edge(https, directory)
    finally:
        server.terminate()
        server.wait(10)
        upstream.shutdown()


PATHS = ["/", "/chat", "/threads/search", "/runs/wait", "/openai/v1/chat/completions", "/metrics", "/ready"]
UNGUARDED = {"/metrics", "/ready"}


@pytest.mark.parametrize("path", PATHS)
def test_a_password_or_a_key(edge: Edge, path: str) -> None:
    for headers in ({}, {"Authorization": "Basic eDp5"}, {"X-Forwarded-User": "ada", "X-Proxy-Secret": SECRET}, {"X-Api-Key": ""}):
        status, body = edge.ask(path, headers)
        assert (status, body["error"]["code"]) == (401, "http_401"), headers
    seen = edge.seen(path, {"Authorization": BASIC})
    # The agent asks nobody who they are on the last two.
    assert seen.get("x-forwarded-user") == (None if path in UNGUARDED else "agent")
    assert seen["x-proxy-secret"] == SECRET
    assert "authorization" not in seen


@pytest.mark.parametrize("path", [path for path in PATHS if path not in UNGUARDED])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_a_key_is_passed_on_and_speaks_for_no_user(edge: Edge, path: str, scheme: str) -> None:
    for spoof in ({}, {"X-Forwarded-User": "ada", "X-Proxy-Secret": "x"}):
        seen = edge.seen(path, {"Authorization": f"{scheme} {KEY}", **spoof})
        assert seen["authorization"] == f"{scheme} {KEY}"
        assert "x-forwarded-user" not in seen
        seen = edge.seen(path, {"X-Api-Key": KEY, **spoof})
        assert seen["x-api-key"] == KEY
        assert not {"authorization", "x-forwarded-user"} & seen.keys()
    # nginx did not look at this password, so the agent must hear of no user.
    for password in (BASIC, "Basic eDp5"):
        assert not {"authorization", "x-forwarded-user"} & edge.seen(path, {"X-Api-Key": KEY, "Authorization": password}).keys()


@pytest.mark.parametrize("path", sorted(UNGUARDED))
def test_a_key_opens_nothing_that_the_agent_does_not_guard(edge: Edge, path: str) -> None:
    for headers in ({"X-Api-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
        assert edge.ask(path, headers)[0] == 401


@pytest.mark.parametrize("path", ["/v1", "/v1/models", "//v1/models", "/V1/models", "/%76%31/models", "/health/../v1/models", "/openai/../v1/models"])
def test_the_models_api_stays_closed(edge: Edge, path: str) -> None:
    for headers in ({}, {"Authorization": BASIC}, {"X-Api-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
        assert edge.ask(path, headers)[0] == 404


def test_health_is_open_and_speaks_for_nobody(edge: Edge) -> None:
    assert "x-forwarded-user" not in edge.seen("/health", {"Authorization": "Basic YWRtaW46eA=="})


def test_the_clients_address_is_set_not_appended(edge: Edge) -> None:
    seen = edge.seen("/chat", {"X-Api-Key": KEY, "X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1", "X-Real-IP": "10.0.0.1"})
    assert (seen["x-forwarded-for"], seen["x-real-ip"]) == ("127.0.0.1", "127.0.0.1")
    assert "forwarded" not in seen


@pytest.mark.parametrize("headers", [{"Authorization": BASIC}, {"X-Api-Key": KEY}])
def test_the_largest_body(edge: Edge, headers: dict[str, str]) -> None:
    assert edge.ask("/chat", headers, b"x" * 65536)[1]["received"] == 65536
    status, body = edge.ask("/chat", headers, b"x" * 65537)
    assert (status, body["error"]["code"]) == (413, "http_413")


@pytest.mark.parametrize("headers", [{"Authorization": BASIC}, {"X-Api-Key": KEY}])
def test_the_largest_conversation(edge: Edge, headers: dict[str, str]) -> None:
    path = "/openai/v1/chat/completions"
    assert edge.ask(path, headers, b"x" * 131_072)[1]["received"] == 131_072
    status, body = edge.ask(path, headers, b"x" * 131_073)
    assert (status, body["error"]["code"], body["error"]["type"]) == (400, "context_length_exceeded", "invalid_request_error")
    assert "128 KiB" in body["error"]["message"]


def test_nginx_and_the_agent_take_the_same_by_default() -> None:
    [default] = re.findall(r"agent_openai_body_kib \| default\((\d+)\)", (ROLE / "vars" / "main.yml").read_text())
    [agents] = re.findall(r"(?m)^agent_openai_body_kib: (\d+)$", (ROLE.parent / "agent" / "defaults" / "main.yml").read_text())
    assert default == agents


@pytest.mark.parametrize("path", ["/chat/stream", "/threads/a/runs/stream", "/runs/stream"])
def test_events_are_not_held_back(edge: Edge, path: str) -> None:
    connection = edge.connect()
    connection.request("POST", path, b"{}", {"X-Api-Key": KEY})
    answer = connection.getresponse()
    times = []
    while line := answer.readline():
        if line.startswith(b"data:"):
            times.append(time.monotonic())
    connection.close()
    assert len(times) == 3
    assert all(later - earlier > 0.2 for earlier, later in itertools.pairwise(times))


def test_no_key_and_no_password_is_logged(edge: Edge) -> None:
    edge.seen("/chat", {"X-Api-Key": KEY})
    edge.seen("/chat", {"Authorization": BASIC})
    log = (edge.directory / "access.log").read_text() + (edge.directory / "error.log").read_text()
    assert "/chat" in log
    assert not [secret for secret in (KEY, SECRET, PASSWORD, BASIC[6:]) if secret in log]
