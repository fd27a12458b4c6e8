"""The metric contract against real scrapes: of Debian's exporters, of HAProxy with the role's configuration, and of the scripted model server.

RECORD_SCRAPES=1 writes them down for the tests of the dashboards, without what the contract does not have.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import promql
import pytest
import yaml
from programs import load
from test_gateway import Stack, directory_for_haproxy, free_port

from test_metrics_contract import SCRAPES, families

ROLE = promql.ROLE
watchdog = load("roles/vllm/files/watchdog.py")
backup = load("roles/postgres/files/backup.py")


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def compare(exporter: str, text: str) -> None:
    wanted = {name: entry for name, entry in promql.contract().items() if entry["exporter"] == exporter}
    found = families(text)
    for name, entry in wanted.items():
        assert name in found, f"{exporter} exports no {name}"
        assert found[name][0] == entry["type"], name
        assert found[name][1] >= set(entry["labels"]), name
    if os.environ.get("RECORD_SCRAPES"):
        names = "|".join(map(re.escape, wanted))
        kept = [line for line in text.splitlines() if re.match(rf"(# (HELP|TYPE) )?({names})(_bucket|_count|_sum)?([ {{]|$)", line)]
        (SCRAPES / f"{exporter}.txt").write_text("\n".join(kept) + "\n")


@contextlib.contextmanager
def running(directory: Path, *command: str) -> Iterator[str]:
    """A program of Debian's that serves HTTP at the address that is given."""
    if shutil.which(command[0]) is None:
        pytest.fail(f"{command[0]} is not installed; tests/packages.sh does that")
    address = f"127.0.0.1:{free_port()}"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                fetch(f"http://{address}/metrics")
                break
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def test_node_exporter(tmp_path: Path) -> None:
    """With the role's own flags, but for where the host is."""
    text = (ROLE / "templates" / "compose.yml.j2").read_text()
    flags = [flag for flag in re.findall(r"^      - (--collector\S+)$", text, flags=re.MULTILINE) if "textfile.directory" not in flag]
    assert "--collector.disable-defaults" in flags
    (tmp_path / "host.prom").write_text("agent_stack_swap_under_way 0\n")
    with running(tmp_path, "prometheus-node-exporter", *flags, f"--collector.textfile.directory={tmp_path}") as url:
        answer = fetch(f"{url}/metrics")
    compare("node", answer.replace(f'file="{tmp_path}', 'file="/host/var/lib/agent-stack/textfile'))


def test_gateway() -> None:
    with directory_for_haproxy() as directory, contextlib.closing(Stack(directory)) as stack:
        stack.start()
        stack.model("blue")
        stack.gateway.route("blue")
        stack.ask()
        own = re.search(r"frontend gateway_metrics\n  bind (\S+)", (directory / "haproxy.cfg").read_text())
        assert own
        compare("gateway", fetch(f"http://{own[1]}/metrics"))
        compare("vllm", fetch(f"http://127.0.0.1:{stack.metrics_port}/metrics"))


def test_watchdog() -> None:
    compare("watchdog", watchdog.metrics(watchdog.Memory()))


def test_backup() -> None:
    backups = [{"type": kind, "timestamp": {"stop": stop}, "info": {"size": 1, "repository": {"delta": 1}}} for kind, stop in (("full", 1), ("diff", 2))]
    compare("backup", backup.exposition(backup.Repository("", True, "1", backups), [0, 0, 0], backup.Memory()))


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        good = self.path == "/health" and self.headers["Host"].startswith("localhost")
        self.send_response(200 if good else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A site with a certificate that nobody signed."""
    directory = tmp_path_factory.mktemp("site")
    pem = directory / "site.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "30", "-keyout", str(pem), "-out", str(directory / "c.pem")]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            *subject,
            "-keyout",
            pem,
            "-out",
            directory / "c.pem",
        ],
        check=True,
        capture_output=True,
    )
    pem.write_text(pem.read_text() + (directory / "c.pem").read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "verify", "success"),
    [("/health", False, 1), ("/health", True, 0), ("/", False, 0)],
    ids=["good", "a certificate that nobody signed", "a password is asked for"],
)
def test_the_probe(tmp_path: Path, site: str, path: str, verify: bool, success: int) -> None:
    """The role's own module: what is true of the public name is a 200 over TLS with a certificate that holds."""
    module = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())["__monitoring_blackbox_config"]
    module["modules"]["https"]["http"]["tls_config"]["insecure_skip_verify"] = not verify
    (tmp_path / "blackbox.yml").write_text(yaml.safe_dump(module))
    with running(tmp_path, "prometheus-blackbox-exporter", f"--config.file={tmp_path / 'blackbox.yml'}") as url:
        answer = fetch(f"{url}/probe?module=https&target={site}{path}")
    assert f"\nprobe_success {success}\n" in answer
    if success:
        compare("blackbox", answer)
        assert 29 < (float(re.findall(r"^probe_ssl_earliest_cert_expiry (\S+)$", answer, flags=re.MULTILINE)[0]) - time.time()) / 86400 <= 30
