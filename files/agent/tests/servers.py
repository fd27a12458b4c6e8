"""The real things a test needs, as private processes on free loopback ports."""

import contextlib
import getpass
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

AGENT = Path(__file__).resolve().parents[1]
MODEL_SERVER = AGENT.parents[1] / "tests" / "model_server" / "server.py"
ODD_PASSWORD = r"""$a'b"c\d#e%f@g:h/i j${k}{{l}}&m=n;o"""
REDIS_COMMANDS = "+ping +evalsha +script|load +pexpire +zadd +zcard +zrange +zrem +zremrangebyscore +hset +hdel +hgetall +xadd +xread +expire"
PROXY_SECRET = "the-secret-that-nginx-sends"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(true: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process runs: one that ended may still wait for somebody to read its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def find_program(name: str, package: str, where: str = "") -> str:
    found = sorted(Path("/").glob(where), reverse=True) if where else []
    program = str(found[0]) if found else shutil.which(name)
    if not program:
        pytest.exit(f"{name} is missing: these tests need Debian's package {package} (apt-get install {package})", 3)
    return program


def unprivileged_user() -> str:
    """initdb refuses to run as root."""
    return "postgres" if os.geteuid() == 0 else getpass.getuser()


class Process:
    """A server that can be stopped in several ways and started again on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="agent-test-"))
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        return {}

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, **self.options())
        wait_until(self._running, f"{type(self).__name__} answers on {self.port}, log {self.log}")

    def _running(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            pytest.fail(f"{type(self).__name__} ended:\n{self.log.read_text()[-3000:]}")
        return self.answers()

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.send_signal(signal.SIGCONT)
            self.process.wait(20)
            self.process = None

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


class Postgres(Process):
    def __init__(self) -> None:
        super().__init__()
        self.user = unprivileged_user()
        shutil.chown(self.directory, self.user)
        initdb = find_program("initdb", "postgresql", "usr/lib/postgresql/*/bin/initdb")
        self.program = str(Path(initdb).with_name("postgres"))
        subprocess.run(
            [
                initdb,
                "-D",
                self.directory / "data",
                "-U",
                "postgres",
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            **self.options(),
        )
        self.start()
        with psycopg.connect(self.admin(), autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("CREATE ROLE agent LOGIN PASSWORD {}").format(psycopg.sql.Literal(ODD_PASSWORD)))
            connection.execute("CREATE DATABASE agent OWNER agent")

    def options(self) -> dict[str, Any]:
        return {"user": self.user, "cwd": self.directory} if os.geteuid() == 0 else {"cwd": self.directory}

    def command(self) -> list[str]:
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "fsync": "off"}
        settings["unix_socket_directories"] = self.directory
        return [self.program, "-D", str(self.directory / "data"), *(f"--{name}={settings[name]}" for name in settings)]

    def admin(self, database: str = "postgres") -> str:
        return psycopg.conninfo.make_conninfo(host=str(self.directory), port=self.port, user="postgres", dbname=database, connect_timeout=2)

    def answers(self) -> bool:
        try:
            psycopg.connect(self.admin()).close()
        except psycopg.OperationalError:
            return False
        return True

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.admin("agent"), autocommit=True) as connection:
            return connection.execute(statement, parameters).fetchall()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        super().stop(how)  # SIGINT is a fast shutdown; the others would leave its children behind

    def crash(self) -> None:
        """Kill every process of it at once, as a lost machine would. Returns when none is left, or the next start finds its memory in use."""
        self.process.send_signal(signal.SIGSTOP)  # no child is born after they were counted
        children = self._children()
        self.process.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.wait(20)
        self.process = None
        wait_until(lambda: not any(map(lives, children)), "the processes of Postgres are gone")

    def freeze(self) -> None:
        """Stop the processes that serve connections, as a hung disk would."""
        for child in self._children():
            os.kill(child, signal.SIGSTOP)
        super().freeze()

    def thaw(self) -> None:
        for child in self._children():
            os.kill(child, signal.SIGCONT)
        super().thaw()

    def _children(self) -> list[int]:
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listing.split()]


class Redis(Process):
    def __init__(self) -> None:
        super().__init__()
        self.program = find_program("redis-server", "redis-server")
        digest = hashlib.sha256(ODD_PASSWORD.encode()).hexdigest()
        self.acl = self.directory / "users.acl"
        self.acl.write_text(f"user default off\nuser agent on #{digest} ~agent:* resetchannels -@all {REDIS_COMMANDS}\n")
        self.start()

    def command(self) -> list[str]:
        options = {"port": self.port, "bind": "127.0.0.1", "aclfile": self.acl, "dir": self.directory, "save": ""}
        return [self.program, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Model(Process):
    def __init__(self, api_key: str = "", name: str = "some/model") -> None:
        super().__init__()
        self.api_key = api_key
        self.name = name
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def command(self) -> list[str]:
        arguments = ["serve", self.name, "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        key = ["--api-key", self.api_key] if self.api_key else []
        return [sys.executable, str(MODEL_SERVER), *arguments, "--served-model-name", "agent-model", *key]

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def control(self, **wish: object) -> dict[str, Any]:
        return httpx.post(f"{self.url}/_control", json=wish).json()

    def requests(self) -> list[dict[str, Any]]:
        return httpx.get(f"{self.url}/_control").json()["requests"]


class McpServer(Process):
    def __init__(self) -> None:
        super().__init__()
        self.more: list[str] = []
        self.url = f"http://127.0.0.1:{self.port}/mcp"

    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("mcp_server.py")), str(self.port), *self.more]

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Agent(Process):
    """The service as its image starts it."""

    def __init__(self, postgres: Postgres, redis: Redis, model: Model, workers: int = 1, **settings: str) -> None:
        super().__init__()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environ = environment(postgres, redis, model, self.directory) | {
            "AGENT_WORKERS": str(workers),
            "PROMETHEUS_MULTIPROC_DIR": str(self.directory / "metrics"),
            **settings,
        }
        # As nginx asks after it has checked the password of the user `tester`.
        self.client = httpx.Client(
            base_url=self.url,
            timeout=60,
            limits=httpx.Limits(max_connections=200),
            headers={"X-Forwarded-User": "tester", "X-Proxy-Secret": PROXY_SECRET},
        )

    def command(self) -> list[str]:
        return [sys.executable, "-m", "agent.serve", "--port", str(self.port)]

    def options(self) -> dict[str, Any]:
        return {"env": self.environ, "cwd": self.directory}

    def workers(self) -> list[int]:
        """The processes that serve, apart from the one that watches over them."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def answers(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def chat(self, message: str, thread_id: str | None = None, **headers: str | bytes) -> httpx.Response:
        body = {"message": message} | ({"thread_id": thread_id} if thread_id else {})
        return self.client.post("/chat", json=body, headers=headers)

    def chats(self, requests: list[tuple[Any, ...]]) -> list[httpx.Response]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda arguments: self.chat(*arguments), requests))

    def metric(self, name: str) -> float:
        """The value of one line of /metrics, labels included in the name; 0 where it is not there."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def log_lines(self) -> Iterator[dict[str, Any]]:
        for line in self.log.read_text().splitlines():
            yield json.loads(line)


def environment(postgres: Postgres, redis: Redis, model: Model, directory: Path) -> dict[str, str]:
    password = directory / "password"
    password.write_text(ODD_PASSWORD + "\n")
    proxy_secret = directory / "proxy_secret"
    proxy_secret.write_text(PROXY_SECRET + "\n")
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(AGENT / "src"),
        "AGENT_POSTGRES_HOST": "127.0.0.1",
        "AGENT_POSTGRES_PORT": str(postgres.port),
        "AGENT_POSTGRES_PASSWORD_FILE": str(password),
        "AGENT_REDIS_HOST": "127.0.0.1",
        "AGENT_REDIS_PORT": str(redis.port),
        "AGENT_REDIS_PASSWORD_FILE": str(password),
        "AGENT_MODEL_BASE_URL": f"{model.url}/v1",
        "AGENT_PROXY_SECRET_FILE": str(proxy_secret),
        "AGENT_RATE_LIMIT": "100000/minute",
        "AGENT_CONCURRENT_RUNS": "0",
        "AGENT_WRONG_KEYS": "1000000",
        "AGENT_TURN_TIMEOUT_SECONDS": "5",
    }


def migrate(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "agent.migrate"], env=environ, capture_output=True, text=True, timeout=90)
