"""Asking a host: programs, HTTP on the loopback address, files. What gives no answer in time is Unknown, with the reason, and never a crash."""

import http.client
import json
import os
import socket
import ssl
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What one question may take, in seconds, and all of them, which are asked at the same time.
PROGRAM_SECONDS = 4.0
HTTP_SECONDS = 3.0
# The host's own loopback address is not asked through a proxy for the world outside.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ALL_SECONDS = 8.0


class Unknown(Exception):
    """There is no answer; the message says why."""


@dataclass(frozen=True)
class Config:
    """What the role wrote down of this host. `ports` are those of the loopback address, `parts` the roles that it has."""

    version: str
    domain: str
    root: Path
    data: Path
    ports: Mapping[str, int]
    gpu: bool
    front: bool

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Raises Unknown for a file that cannot be read."""
        try:
            found = json.loads(path.read_text())
            ports = {name: int(port) for name, port in found["ports"].items() if port}
            return cls(found["version"], found["domain"], Path(found["root"]), Path(found["data"]), ports, bool(found["gpu"]), bool(found["front"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unknown(f"{path} cannot be read ({error}); run the play again") from error


@dataclass
class Host:
    """The host. Tests put others in the place of the three ways to ask."""

    config: Config
    slash: Path = field(default_factory=lambda: Path("/"))

    def program(self, *command: str, stdin: str = "", seconds: float = PROGRAM_SECONDS) -> str:
        """Return what a program says on its standard output. Raises Unknown if it is not there, fails, or takes too long."""
        try:
            result = subprocess.run(
                command, input=stdin, capture_output=True, text=True, errors="replace", timeout=seconds, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"}
            )
        except subprocess.TimeoutExpired as error:
            raise Unknown(f"{command[0]} gave no answer in {seconds:g} s") from error
        except OSError as error:
            raise Unknown(f"{command[0]} cannot be run: {error.strerror}") from error
        if result.returncode != 0:
            words = (result.stderr or result.stdout).strip().splitlines()
            raise Unknown(f"{command[0]} ended with {result.returncode}: {words[-1] if words else 'it said nothing'}")
        return result.stdout

    def http(self, port: str, path: str) -> tuple[int, Any]:
        """Return status and JSON of a service on the loopback address; None if the body is something else. Raises Unknown."""
        if port not in self.config.ports:
            raise Unknown(f"this host has no {port}")
        request = urllib.request.Request(f"http://127.0.0.1:{self.config.ports[port]}{path}", headers={"Accept": "application/json"})
        try:
            with OPENER.open(request, timeout=HTTP_SECONDS) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unknown(f"{port} does not answer: {getattr(reason, 'strerror', None) or reason}") from error
        try:
            return status, json.loads(body)
        except ValueError:
            return status, None

    def front_door(self) -> tuple[int, str]:
        """Return the status of /health through nginx and the certificate that it shows, as PEM. Raises Unknown."""
        context = ssl.create_default_context()
        # Whoever issued it: it is looked at afterwards.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(self.config.domain, timeout=HTTP_SECONDS, context=context)
        try:
            plain = socket.create_connection(("127.0.0.1", 443), timeout=HTTP_SECONDS)
            connection.sock = context.wrap_socket(plain, server_hostname=self.config.domain)
            certificate = connection.sock.getpeercert(binary_form=True) or b""
            connection.request("GET", "/health")
            return connection.getresponse().status, ssl.DER_cert_to_PEM_cert(certificate)
        except (OSError, http.client.HTTPException) as error:
            raise Unknown(f"nginx does not answer on 127.0.0.1:443: {error}") from error
        finally:
            connection.close()

    def read(self, path: Path) -> str:
        """Return a file's text. Raises Unknown."""
        try:
            return path.read_text(errors="replace")
        except OSError as error:
            raise Unknown(f"{path} cannot be read: {error.strerror}") from error

    def prometheus(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each sample of an expression. Raises Unknown."""
        status, found = self.http("prometheus", f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        if status != 200 or not isinstance(found, dict):
            raise Unknown(f"Prometheus answers {status}")
        return [(sample["metric"], float(sample["value"][1])) for sample in found["data"]["result"]]


def ask_all(questions: Mapping[str, Callable[[], Any]], seconds: float = ALL_SECONDS) -> dict[str, Any]:
    """Ask everything at the same time. Return each answer, or the Unknown that stands for it."""
    # Not as a context manager: that would wait for those that hang.
    pool = ThreadPoolExecutor(max_workers=max(1, len(questions)))
    futures = {name: pool.submit(question) for name, question in questions.items()}
    wait(futures.values(), timeout=seconds)
    answers: dict[str, Any] = {}
    for name, future in futures.items():
        if not future.done():
            answers[name] = Unknown(f"no answer in {seconds:g} s")
        elif isinstance(error := future.exception(), (Unknown, LookupError, TypeError, ValueError)):
            answers[name] = error if isinstance(error, Unknown) else Unknown(f"the answer cannot be read: {error!r}")
        else:
            answers[name] = future.result()
    pool.shutdown(wait=False, cancel_futures=True)
    return answers
