"""The public edge, asked from the host itself: read-only, so it may be pointed at a production host (as root)."""

from __future__ import annotations

import json
import re

import pytest
from testinfra.host import Host


class Edge:
    """The running nginx, with what its effective configuration says about the site."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.dump = host.run("nginx -T")
        self.domain = self.setting(r"return 301 https://([a-z0-9.-]+)\$request_uri")
        self.certificate = self.setting(rf"server_name {re.escape(self.domain)}[^;]*;\s+include \S+/tls.conf;\s+ssl_certificate (\S+);")
        self.key = self.setting(rf"ssl_certificate_key ({re.escape(self.certificate.rsplit('/', 1)[0])}/\S+);")
        self.passwords = "/etc/nginx/agent-stack/passwords"

    def setting(self, pattern: str) -> str:
        found = re.search(pattern, self.dump.stdout)
        assert found, f"nginx -T shows nothing for {pattern}: {self.dump.stderr}"
        return found.group(1)

    def curl(self, path: str, *options: str, scheme: str = "https") -> tuple[int, dict[str, str], str]:
        resolve = " ".join(f"--resolve {self.domain}:{port}:127.0.0.1" for port in (80, 443))
        answer = self.host.run(f"curl -ski -m 10 {resolve} {' '.join(options)} {scheme}://{self.domain}{path}")
        assert answer.rc == 0, f"curl exited with {answer.rc}: {answer.stderr}"
        head, _, body = answer.stdout.replace("\r\n", "\n").partition("\n\n")
        status, *lines = head.split("\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(status.split()[1]), headers, body


@pytest.fixture(scope="module")
def edge(host: Host) -> Edge:
    return Edge(host)


def test_nginx_runs_and_its_configuration_is_clean(host: Host, edge: Edge) -> None:
    service = host.service("nginx")
    assert (service.is_running, service.is_enabled) == (True, True), host.run("journalctl -u nginx -n 30 --no-pager").stdout
    assert edge.dump.rc == 0
    assert "[warn]" not in edge.dump.stderr


def test_nginx_listens_on_http_and_https_only(host: Host) -> None:
    listening = host.check_output("ss -Hltnp").splitlines()
    ports = {line.split()[3].rsplit(":", 1)[1] for line in listening if '"nginx"' in line}
    assert ports == {"80", "443"}


def test_http_redirects_to_https(edge: Edge) -> None:
    status, headers, _ = edge.curl("/chat?a=b", scheme="http")
    assert status == 301
    assert headers["location"] == f"https://{edge.domain}/chat?a=b"


@pytest.mark.parametrize("path", ["/", "/chat", "/ready", "/metrics", "/healthy"])
def test_nothing_answers_without_the_password(edge: Edge, path: str) -> None:
    status, headers, body = edge.curl(path)
    assert status == 401
    assert headers["www-authenticate"].startswith("Basic")
    assert set(json.loads(body)["error"]) == {"code", "message", "id"}


def test_a_wrong_password_is_refused(edge: Edge) -> None:
    assert edge.curl("/", "--user agent:wrong")[0] == 401


def test_a_key_is_the_agents_to_judge(edge: Edge) -> None:
    for header in ("X-Api-Key: none", "Authorization: Bearer none"):
        status, headers, body = edge.curl("/threads", f"--request POST --header '{header}'")
        assert (status, headers["www-authenticate"], json.loads(body)["error"]["code"]) == (401, "Bearer", "unauthorized")
        for path in ("/metrics", "/ready"):
            status, headers, _ = edge.curl(path, f"--header '{header}'")
            assert (status, headers["www-authenticate"].split()[0]) == (401, "Basic")
        assert edge.curl("/v1/models", f"--header '{header}'")[0] == 404


def test_the_proxy_secret_is_closed_to_other_users(host: Host) -> None:
    file = host.file("/etc/nginx/agent-stack/proxy_secret.conf")
    assert (file.user, file.mode) == ("root", 0o600)


def test_health_needs_no_password(edge: Edge) -> None:
    status, headers, _ = edge.curl("/health")
    assert status in {200, 502, 503, 504}
    assert headers["content-type"].startswith("application/json")
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])


@pytest.mark.parametrize("path", ["/v1", "/v1/models", "//v1/models", "/V1/models", "/%76%31/models", "/health/../v1/models"])
def test_the_models_api_is_closed(edge: Edge, path: str) -> None:
    assert edge.curl(path, "--path-as-is")[0] == 404


def test_a_large_body_is_refused(edge: Edge) -> None:
    status, _, body = edge.curl("/health", "--http1.1 --header 'Content-Length: 70000' --request POST --data-raw x")
    assert status == 413
    assert len(body) < 200


def test_the_server_does_not_tell_its_version(edge: Edge) -> None:
    assert edge.curl("/")[1]["server"] == "nginx"


def test_the_served_certificate_is_the_file(host: Host, edge: Edge) -> None:
    show = "openssl x509 -noout -serial -ext subjectAltName"
    served = host.check_output(f"openssl s_client -connect 127.0.0.1:443 -servername {edge.domain} </dev/null 2>/dev/null | {show}")
    assert served == host.check_output(f"{show} -in {edge.certificate}")
    assert f"DNS:{edge.domain}" in served


def test_hsts_comes_with_a_certificate_of_a_ca_only(edge: Edge) -> None:
    trusted = edge.certificate.startswith("/etc/letsencrypt/live/")
    assert ("strict-transport-security" in edge.curl("/")[1]) == trusted


@pytest.mark.parametrize(("version", "answers"), [("1.1", False), ("1.2", True), ("1.3", True)])
def test_tls_versions(host: Host, edge: Edge, version: str, answers: bool) -> None:
    only = f"--tlsv{version} --tls-max {version}"
    handshake = host.run(f"curl -sk -m 10 -o /dev/null {only} --resolve {edge.domain}:443:127.0.0.1 https://{edge.domain}/")
    assert (handshake.rc == 0) == answers


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "https://127.0.0.1/"])
def test_another_name_gets_no_answer(host: Host, url: str) -> None:
    answer = host.run(f"curl -ski -m 10 {url}")
    assert answer.rc != 0
    assert answer.stdout == ""


def test_secrets_are_closed_to_other_users(host: Host, edge: Edge) -> None:
    passwords, key = host.file(edge.passwords), host.file(host.check_output(f"readlink -f {edge.key}"))
    assert (passwords.user, passwords.group, passwords.mode) == ("root", "agent-stack-login", 0o640)
    assert re.fullmatch(r"[^:\n]+:[0-9a-f]{32}:[0-9a-f]{64}\n", passwords.content_string)
    assert host.group("agent-stack-login").members == []
    assert (key.user, key.mode) == ("root", 0o600)


def test_renewal_is_on(host: Host, edge: Edge) -> None:
    if not edge.certificate.startswith("/etc/letsencrypt/live/"):
        pytest.skip("the host serves its self-signed certificate")
    timer = host.service("certbot.timer")
    assert timer.is_running
    assert timer.is_enabled
    assert host.run("test -x /etc/letsencrypt/renewal-hooks/deploy/agent-stack-nginx").rc == 0


def test_the_login_is_sandboxed_and_answers_nginx_alone(host: Host) -> None:
    assert host.service("agent-stack-login.socket").is_enabled
    socket = host.file("/run/agent-stack-login.sock")
    assert (socket.user, socket.mode) == ("www-data", 0o600)
    assert host.run("systemd-analyze security --no-pager --threshold=20 agent-stack-login.service").rc == 0


def test_the_log_is_json_without_queries(host: Host, edge: Edge) -> None:
    assert edge.curl("/health?key=canary")[0] in {200, 502, 503, 504}
    last = json.loads(host.check_output("tail -n 1 /var/log/nginx/agent-stack.access.log"))
    assert (last["path"], last["method"], last["client"]) == ("/health", "GET", "127.0.0.1")
    assert host.run("grep -r canary /var/log/nginx").rc == 1


@pytest.mark.parametrize("unit", ["nginx.service", "certbot.service"])
def test_the_packages_units_are_sandboxed(host: Host, unit: str) -> None:
    """From 9.6 and 9.2: what is left lets nginx start as root, and sites of others have their files where they want."""
    judged = host.run(f"systemd-analyze security --no-pager --threshold=35 {unit}")
    assert judged.rc == 0, judged.stdout
