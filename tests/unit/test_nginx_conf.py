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
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPSConnection, RemoteDisconnected
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


NAMES = [DOMAIN, "other.example.com"]
# As Debian's package has it, with a site of somebody else.
MAIN = """
{user}
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 768; }}
http {{
    client_body_temp_path {directory}/client_body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    sendfile on;
    tcp_nopush on;
    types_hash_max_size 2048;
    default_type application/octet-stream;
    ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers on;
    access_log {directory}/access.log;
    gzip on;
    include {directory}/agent-stack.conf;
    server {{
        listen 127.0.0.1:80;
        server_name neighbour.example.com;
        location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
    }}
}}
"""


def render(name: str, directory: Path, upstream: int, **values: Any) -> str:
    """A template as Ansible renders it, for a host with nginx as Debian 12 has it, with its paths below `directory`."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)  # noqa: S701  no HTML
    environment.filters["comment"] = lambda text: f"# {text}"
    settings = {
        "ansible_managed": "managed",
        "agent_stack_domain": DOMAIN,
        "nginx_certbot_upstream": f"127.0.0.1:{upstream}",
        "nginx_certbot_requests_per_second": 1000,
        "nginx_certbot_connections_per_client": 100,
        "nginx_certbot_read_timeout_seconds": 120,
        "__nginx_certbot_openai_body_kib": 128,
        "__nginx_certbot_curves": ["X25519", "prime256v1"],
        "__nginx_certbot_ipv6": {"stat": {"exists": False}},
        "__nginx_certbot_http2_directive": False,
        "__nginx_certbot_can_reject_handshake": True,
        "__nginx_certbot_trusted": False,
        "__nginx_certbot_names": NAMES,
        "__nginx_certbot_taken": [],
        "__nginx_certbot_chain": directory / "fullchain.pem",
        "__nginx_certbot_key": directory / "privkey.pem",
        "__nginx_certbot_placeholder": directory,
        "__nginx_certbot_login": directory / "login.conf",
        "__nginx_certbot_tls": directory / "tls.conf",
        "__nginx_certbot_socket": directory / "login.sock",
        "__nginx_certbot_proxy_secret": directory / "proxy_secret.conf",
        "__nginx_certbot_webroot": directory,
    }
    text = environment.from_string((ROLE / "templates" / name).read_text()).render(settings | values)
    return text.replace("/var/log/nginx", str(directory))


class Edge:
    def __init__(self, http: int, port: int, directory: Path) -> None:
        self.http = http
        self.port = port
        self.directory = directory
        # Wrong passwords are counted for each address.
        self.source = "127.0.0.1"

    def connect(self) -> HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.directory / "fullchain.pem"))
        connection = HTTPSConnection(DOMAIN, self.port, context=context, timeout=10)
        # The name is not in the DNS.
        connection.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 10, (self.source, 0)), server_hostname=DOMAIN)
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
    program = ROLE / "files" / "login.py"
    hashed = subprocess.run([sys.executable, program, "hash", "agent"], input=PASSWORD.encode(), capture_output=True, check=True).stdout.decode()
    (directory / "passwords").write_text(hashed)
    (directory / "proxy_secret.conf").write_text(f'proxy_set_header X-Proxy-Secret "{SECRET}";\n')
    http, https = free_port(), free_port()
    for name in ("agent-stack.conf", "login.conf", "tls.conf"):
        text = render(f"{name}.j2", directory, upstream.server_port)
        (directory / name).write_text(text.replace("listen 80", f"listen 127.0.0.1:{http}").replace("listen 443", f"listen 127.0.0.1:{https}"))
    configuration = directory / "nginx.conf"
    main = MAIN.format(user="user root;" if os.geteuid() == 0 else "", directory=directory, upstream=upstream.server_port)
    configuration.write_text(main.replace("127.0.0.1:80;", f"127.0.0.1:{http};"))
    # As systemd hands its socket over.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "login.sock"))
    listener.listen(128)
    handed = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.executable, [sys.executable, '-B', *sys.argv[2:]])"
    command = [sys.executable, "-c", handed, str(listener.fileno()), str(program), "serve", str(directory / "passwords")]
    login = subprocess.Popen(command, pass_fds=(listener.fileno(),))
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
        yield Edge(http, https, directory)
    finally:
        server.terminate()
        server.wait(10)
        login.kill()
        login.wait()
        listener.close()
        upstream.shutdown()


@pytest.fixture(autouse=True)
def _a_client_of_its_own(edge: Edge) -> None:
    edge.source = f"127.0.1.{int(edge.source.rpartition('.')[2]) % 254 + 1}"


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
    assert (seen["x-forwarded-for"], seen["x-real-ip"]) == (edge.source, edge.source)
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


def logged(edge: Edge) -> list[dict[str, Any]]:
    """What was logged until a request of our own, whose line comes after theirs: nginx writes it when the answer is out."""
    mark = f"/end-of-{time.monotonic_ns()}"
    edge.ask(mark, {})
    for _ in range(100):
        entries = [json.loads(entry) for entry in (edge.directory / "agent-stack.access.log").read_text().splitlines()]
        if entries and entries[-1]["path"] == mark:
            return entries[:-1]
        time.sleep(0.05)
    raise AssertionError(f"{mark} is not in the log")


def test_the_log_is_json_without_keys_passwords_and_queries(edge: Edge) -> None:
    edge.seen("/chat?key=inthequery", {"X-Api-Key": KEY})
    edge.seen("/chat", {"Authorization": BASIC, "User-Agent": 'odd "agent"\\'})
    edge.ask("/chat", {"Authorization": "Basic eDp5"})
    everything = "".join(path.read_text() for path in edge.directory.glob("*.log"))
    assert not [secret for secret in (KEY, SECRET, PASSWORD, BASIC[6:], "inthequery", "eDp5") if secret in everything]
    asked, right, wrong = [entry for entry in logged(edge) if entry["path"] == "/chat"][-3:]
    assert (asked["status"], asked["user"], asked["method"], asked["client"]) == (200, "", "GET", edge.source)
    assert (right["status"], right["user"], right["user_agent"]) == (200, "agent", 'odd "agent"\\')
    assert (wrong["status"], wrong["user"]) == (401, "")
    assert re.fullmatch("[0-9a-f]{32}", right["id"])


def test_what_is_refused_is_logged_now_and_then(edge: Edge) -> None:
    before = len(logged(edge))
    for _ in range(300):
        status, _answer = edge.ask("/chat", {"X-Api-Key": KEY, "Content-Length": "70000"})
        assert status == 413
    # One in a hundred: with 300, more than 20 happens once in 10^11 runs.
    assert len(logged(edge)) - before <= 20


def plain(edge: Edge, host: str, path: str = "/", headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    """Ask on port 80. Raises RemoteDisconnected where the connection is closed without an answer."""
    connection = HTTPConnection("127.0.0.1", edge.http, timeout=10)
    connection.request("POST" if body else "GET", path, body, {"Host": host, **(headers or {})})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def test_port_80_redirects_and_writes_nothing(edge: Edge) -> None:
    before = {path: path.stat().st_size for path in edge.directory.glob("*.log")}
    for name in NAMES:
        status, headers, _ = plain(edge, name, "/chat?a=b")
        assert (status, headers["location"]) == (301, f"https://{DOMAIN}/chat?a=b")
    assert plain(edge, DOMAIN, "/x", body=b"x" * 2000)[0] in {301, 413}
    assert {path: path.stat().st_size for path in edge.directory.glob("*.log")} == before


def test_unknown_names_are_dropped(edge: Edge) -> None:
    before = {path: path.stat().st_size for path in edge.directory.glob("*.log")}
    with pytest.raises(RemoteDisconnected):
        plain(edge, "unknown.example.com")
    context = ssl.create_default_context(cafile=str(edge.directory / "fullchain.pem"))
    for name in ("unknown.example.com", "neighbour.example.com"):
        with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", edge.port), 10) as connection:
            context.wrap_socket(connection, server_hostname=name)
    assert {path: path.stat().st_size for path in edge.directory.glob("*.log")} == before


def test_another_site_of_this_nginx_notices_nothing(edge: Edge) -> None:
    status, headers, text = plain(edge, "neighbour.example.com", "/upload", body=b"x" * 200_000)
    assert (status, json.loads(text)["received"]) == (200, 200_000)
    assert not {"strict-transport-security", "x-request-id", "retry-after"} & headers.keys()
    # nginx writes the line after the answer.
    for _ in range(100):
        if '"POST /upload HTTP/1.1" 200' in (edge.directory / "access.log").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail((edge.directory / "access.log").read_text())
    assert "/upload" not in (edge.directory / "agent-stack.access.log").read_text()


def test_nothing_at_the_level_of_http_applies_to_others(tmp_path: Path) -> None:
    for names in (NAMES, ["a" * 60 + ".example.com"]):
        text = re.sub(r"(?m)#.*$", "", render("agent-stack.conf.j2", tmp_path, 1, __nginx_certbot_names=names))
        depth, outside = 0, []
        for directive in re.findall(r"'[^']*'|\"[^\"]*\"|[{}]|[^{}'\"]+", text):
            outside += re.findall(r"(?:^|;)\s*([a-z_]+)", directive) if depth == 0 else []
            depth += (directive == "{") - (directive == "}")
        hashes = {"server_names_hash_bucket_size"} if names != NAMES else set()
        assert set(outside) == {"log_format", "split_clients", "map", "limit_conn_zone", "limit_req_zone", "upstream", "server", *hashes}


def test_default_servers_of_others_stay(tmp_path: Path) -> None:
    for taken in ([], [80], [443], [80, 443]):
        text = render("agent-stack.conf.j2", tmp_path, 1, __nginx_certbot_taken=taken)
        assert [port for port in (80, 443) if re.search(rf"listen {port}\b[^;]*default_server", text)] == [port for port in (80, 443) if port not in taken]
        assert text.count(f"server_name {' '.join(NAMES)};") == 2


def test_wrong_passwords_are_slowed_down_and_who_is_in_stays_in(edge: Edge) -> None:
    wrong = {"Authorization": "Basic " + base64.b64encode(b"agent:wrong").decode()}
    assert edge.ask("/chat", {"Authorization": BASIC})[0] == 200
    statuses = [edge.ask("/chat", wrong)[0] for _ in range(8)]
    first = statuses.index(429)
    assert set(statuses[:first]) == {401}
    assert first <= 5
    connection = edge.connect()
    connection.request("GET", "/chat", headers=wrong)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (429, "http_429")
    assert 1 <= int(answer.headers["Retry-After"]) <= 300
    connection.close()
    # A password that was right a moment ago, a key, and what needs neither.
    assert edge.ask("/chat", {"Authorization": BASIC})[0] == 200
    assert edge.ask("/chat", {"X-Api-Key": KEY})[0] == 200
    assert edge.ask("/health")[0] == 200
