"""What the bench runs: Postgres, Redis, the model and the services, as private processes on free loopback ports.

All services are up from the beginning to the end, but only the one that is being measured runs: the others are stopped
by SIGSTOP, so that nobody's idle work costs another one anything.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
# Another tree's service can be measured, too.
AGENT = Path(os.environ.get("BENCH_AGENT_DIR", ROOT / "files" / "agent"))
PEERS = ROOT / ".cache" / "bench-venv" / "bin"
WORKERS = 2
# Two workers import a hundred packages each; on a busy machine that takes its time.
START_SECONDS = 120
SETTLE_SECONDS = 0.3

sys.dont_write_bytecode = True
sys.path.insert(0, str(AGENT / "tests"))
import servers as servers  # noqa: E402  for the tests, too
from load import Target  # noqa: E402
from model import NAME as MODEL_NAME  # noqa: E402
from model import WORDS  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")
# The least that a stream of an answer has, where its tokens come one by one.
STREAM_EVENTS = len(WORDS) // 2
QUESTION = "What do you know about radio alphabets? Answer in one line."


def tree(pid: int) -> list[int]:
    """The process and all its descendants, parents first."""
    pids = [pid]
    for parent in pids:
        try:
            for thread in Path(f"/proc/{parent}/task").iterdir():
                pids += [int(child) for child in (thread / "children").read_text().split()]
        except FileNotFoundError:
            continue
    return pids


def cpu_seconds(pid: int) -> float:
    """The processor time that the process and its descendants have used."""
    ticks = 0
    for one in tree(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def rss_bytes(pid: int) -> int:
    """The memory of the process and its descendants, each shared page counted once for all of them."""
    kib = 0
    for one in tree(pid):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kib += int(line.split()[1])
    return kib * 1024


def get(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def answers(port: int, path: str) -> bool:
    try:
        return get(port, path)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


class Postgres(servers.Postgres):
    """The servers of the tests do not wait for the disk; a bench of durable turns must. The memory is that of the role."""

    def command(self) -> list[str]:
        return [*super().command(), "--fsync=on", "--shared_buffers=256MB"]

    def database(self, name: str) -> str:
        """Make a database and return its address."""
        with servers.psycopg.connect(self.admin(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} OWNER agent")
        return f"postgresql://agent:{quote(servers.ODD_PASSWORD, safe='')}@127.0.0.1:{self.port}/{name}"

    def rows(self, database: str, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with servers.psycopg.connect(self.admin(database), autocommit=True) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []


class Redis(servers.Redis):
    """As the tests have it."""


class Model(servers.Model):
    def command(self) -> list[str]:
        return [sys.executable, str(BENCH / "model.py"), str(self.port)]

    def pace(self, milliseconds: float) -> None:
        get(self.port, f"/_pace/{milliseconds}", "POST")

    def calls(self) -> int:
        return int(get(self.port, "/_calls")[1])


def model_target(port: int, mode: str) -> Target:
    stream = ',"stream":true,"stream_options":{"include_usage":true}' if mode == "stream" else ""
    body = f'{{"model":"{MODEL_NAME}","messages":[{{"role":"user","content":"{QUESTION}"}}]{stream}}}'
    return Target(port, "/v1/chat/completions", body, events=STREAM_EVENTS if stream else 0)


def chat_target(port: int, mode: str, headers: str = "") -> Target:
    path, events = ("/chat/stream", STREAM_EVENTS) if mode == "stream" else ("/chat", 0)
    return Target(port, path, f'{{"message":"{QUESTION}"}}', headers, names_thread=True, events=events)


class Service(servers.Process):
    """A service under test: how it is started, asked and looked into."""

    name = ""
    # What the service keeps in Postgres, or None where it keeps nothing there.
    database: str | None = None
    process: subprocess.Popen[bytes] | None

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} is not running"
        return self.process.pid

    def target(self, mode: str) -> Target:
        raise NotImplementedError

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, **self.options())
        servers.wait_until(self._running, f"{self.name} answers on {self.port}, log {self.log}", START_SECONDS)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is None:
            return
        family = tree(self.process.pid)
        self.thaw()
        self.process.send_signal(how)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        for pid in family[1:]:
            # A supervisor that was killed leaves its workers behind.
            with suppress(ProcessLookupError):
                if os.getpgid(pid) == family[0]:
                    os.kill(pid, signal.SIGKILL)
        self.process = None

    def freeze(self) -> None:
        # Parents first, and last to go on: a supervisor must not miss the sign of life of a worker that is stopped.
        for pid in tree(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in reversed(tree(self.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Ours(Service, servers.Agent):
    """Our service with the settings of a deployment, but with its limits out of the way. AGENT_* variables override them."""

    name = "ours"
    # As the proxy asks. Many users, not one: what is limited is limited for each.
    headers = f"X-Proxy-Secret: {servers.PROXY_SECRET}\r\nX-Forwarded-User: user-%CLIENT%\r\n"

    def __init__(self, postgres: Postgres, redis: Redis, model: Model, database: str = "agent") -> None:
        settings = {"AGENT_POSTGRES_DB": database, "AGENT_TURN_TIMEOUT_SECONDS": "60", "LANGGRAPH_STRICT_MSGPACK": "true"}
        settings |= {"AGENT_WORKERS": str(WORKERS), "PYTHONDONTWRITEBYTECODE": "1"}
        settings |= {name: value for name, value in os.environ.items() if name.startswith("AGENT_")}
        super().__init__(postgres, redis, model, **settings)
        if "AGENT_CONCURRENT_RUNS" not in settings:
            del self.environ["AGENT_CONCURRENT_RUNS"]  # the tests lift this limit, but it is part of what a turn costs
        self.database = database
        # Not from here: this directory has a module that is named like the service's package.
        run = subprocess.run([sys.executable, "-m", "agent.migrate"], **super().options(), capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"the migration failed:\n{run.stderr}")

    def command(self) -> list[str]:
        command: list[str] = super().command()
        return [*command, "--workers", str(WORKERS)] if "uvicorn" in command else command

    def options(self) -> dict[str, Any]:
        return {**super().options(), "start_new_session": True}

    def answers(self) -> bool:
        return answers(self.port, "/ready")

    def target(self, mode: str) -> Target:
        return chat_target(self.port, mode, self.headers)


class Guide(Service):
    """The guide's service, two workers, as its image starts it."""

    def __init__(self, postgres: Postgres, model: Model, durability: str) -> None:
        super().__init__()
        self.name = f"guide-{durability}"
        self.database = f"guide_{durability}"
        self.environ = peer_environment(model) | {"DATABASE_URL": postgres.database(self.database), "GUIDE_DURABILITY": durability}
        subprocess.run([PEERS / "python", BENCH / "guide" / "main.py"], env=self.environ, check=True)

    def command(self) -> list[str]:
        where = ["--app-dir", str(BENCH / "guide"), "--host", "127.0.0.1", "--port", str(self.port)]
        return [str(PEERS / "python"), "-m", "uvicorn", "main:app", *where, "--workers", str(WORKERS)]

    def options(self) -> dict[str, Any]:
        return {"env": self.environ, "cwd": self.directory, "start_new_session": True}

    def answers(self) -> bool:
        return answers(self.port, "/health")

    def target(self, mode: str) -> Target:
        return chat_target(self.port, mode)


class LangGraphDev(Service):
    """`langgraph dev` with the guide's graph. It keeps everything in memory; a run without a thread has one of its own.

    As it comes it works on one run at a time, whatever its help says; with `jobs` on as many.
    """

    def __init__(self, model: Model, jobs: str = "") -> None:
        super().__init__()
        self.name = f"langgraph-dev{'-' * bool(jobs)}{jobs}"
        self._jobs = ["--n-jobs-per-worker", jobs] if jobs else []
        for file in ("graph.py", "langgraph.json"):
            shutil.copy(BENCH / "guide" / file, self.directory)
        self.environ = peer_environment(model) | {"LANGSMITH_TRACING": "false", "LANGGRAPH_CLI_NO_ANALYTICS": "1"}

    def command(self) -> list[str]:
        # Without the reloader, which would only cost it time.
        return [str(PEERS / "langgraph"), "dev", "--no-browser", "--no-reload", "--host", "127.0.0.1", "--port", str(self.port), *self._jobs]

    def options(self) -> dict[str, Any]:
        return {"env": self.environ, "cwd": self.directory, "start_new_session": True}

    def answers(self) -> bool:
        return answers(self.port, "/ok")

    def target(self, mode: str) -> Target:
        path, more, events = ("/runs/stream", ',"stream_mode":["messages-tuple"]', STREAM_EVENTS) if mode == "stream" else ("/runs/wait", "", 0)
        body = f'{{"assistant_id":"agent","input":{{"messages":[{{"role":"user","content":"{QUESTION}"}}]}}{more}}}'
        return Target(self.port, path, body, events=events)


def peer_environment(model: Model) -> dict[str, str]:
    return {
        "PATH": f"{PEERS}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_BASE_URL": f"{model.url}/v1",
        "VLLM_MODEL": MODEL_NAME,
    }


@contextmanager
def running(service: Service) -> Iterator[Service]:
    """Let a stopped service run, and stop it again."""
    service.thaw()
    # Timers that came due meanwhile go off now, and what is left to do after the last answer is done at the end.
    time.sleep(SETTLE_SECONDS)
    try:
        yield service
    finally:
        time.sleep(SETTLE_SECONDS)
        service.freeze()
