"""A host for backup.py without containers: the real pgBackRest and a real Postgres, as processes of this machine."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from programs import load

backup = load("roles/postgres/files/backup.py")

PASS = "a passphrase of the repository"
# initdb refuses to run as root.
USER = "postgres" if os.geteuid() == 0 else getpass.getuser()


def run(*command: str, stdin: bytes | None = None, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=False,
        user=USER if os.geteuid() == 0 else None,
        cwd="/",
        env=environment,
    )
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


class Server:
    """The program's way to Postgres and pgBackRest, without containers. As with them, the server is started again when it ends."""

    def __init__(self, directory: Path, config: Any, listens: str = "", archive_timeout: int = 60) -> None:
        self.config = config
        self.listens = listens
        self.archive_timeout = archive_timeout
        self.data = config.data
        self.scratch = config.scratch
        self.socket = str(directory)
        self.scratch_socket = config.scratch
        self.log = directory / "log"
        self.first_backups = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._programs = str(max(Path("/usr/lib/postgresql").glob("*/bin/initdb")).parent)
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0

    @property
    def environment(self) -> dict[str, str]:
        secret = f"{self.config.secrets}/pgbackrest.conf"
        return {"PATH": f"{self._programs}:{os.environ['PATH']}", "PGBACKREST_CONFIG": secret, "PGBACKREST_STANZA": self.config.stanza}

    def beside(self, *command: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
        if self._process is None or self._process.poll() is not None:
            return subprocess.CompletedProcess(command, 1, "", "the container does not run")
        return run(*command, stdin=stdin, environment=self.environment)

    def apart(self, *command: str, cluster: str = "", scratch: bool = False) -> subprocess.CompletedProcess[str]:
        return run(*command, environment=self.environment | ({"PGBACKREST_PG1_PATH": cluster} if cluster else {}))

    def initialise(self) -> None:
        where = str(self.config.cluster)
        how = ("--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "--auth-local=trust", "--auth-host=scram-sha-256", "--data-checksums")
        assert run("initdb", "-D", where, *how, environment=self.environment).returncode == 0

    def start(self) -> None:
        settings = {"port": self.port, "listen_addresses": self.listens, "unix_socket_directories": self.socket, "archive_mode": "on", "fsync": "off"}
        settings |= {"archive_command": "pgbackrest archive-push %p", "archive_timeout": self.archive_timeout}
        words = [f"--{name}={value}" for name, value in settings.items()]
        with self.log.open("ab") as log:
            user = USER if os.geteuid() == 0 else None
            command = ["postgres", "-D", str(self.config.cluster), *words]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, user=user, cwd="/")
        self._restarts = 0

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(30)
            self._process = None

    def crash(self) -> None:
        """As a lost disk ends it: no checkpoint, and nothing is written any more."""
        if self._process is not None:
            self._process.send_signal(3)  # an immediate shutdown: it takes its children with it
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
            self._process = None

    def restarts(self) -> int:
        if self._process is not None and self._process.poll() is not None:
            self.start_again()
        return self._restarts

    def start_again(self) -> None:
        count = self._restarts + 1
        self.start()
        self._restarts = count

    def words(self, since: float) -> str:
        return self.log.read_text()

    def begin_first_backup(self) -> None:
        self.first_backups += 1

    def sql(self, statement: str, database: str = "postgres") -> str:
        done = self.beside("psql", "-h", self.socket, "-p", str(self.port), "-U", "postgres", "-d", database, "-Atqc", statement)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self) -> None:
        deadline = time.monotonic() + 30
        command = ("psql", "-h", self.socket, "-p", str(self.port), "-U", "postgres", "-Atc", "SELECT 1")
        while self.beside(*command).returncode != 0:
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.1)


def write_configuration(config: Any, password: str = PASS) -> None:
    text = f"""[global]
repo1-path={Path(config.data).parent}/repository
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass={password}
repo1-retention-full=2
repo1-bundle=y
compress-type=zst
log-level-file=off
log-level-console=warn
lock-path={config.state}/locks
archive-timeout=10
[{config.stanza}]
pg1-path={config.cluster}
pg1-socket-path={Path(config.data).parent}
pg1-port=PORT
"""
    (Path(config.secrets) / "pgbackrest.conf").write_text(text)


class Stack:
    """A host: directories, a server, and the program."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        shutil.chown(directory, USER)
        names = ("data", "secrets", "repository", "state", "scratch", "textfile", "etc")
        for name in names:
            (directory / name).mkdir()
            shutil.chown(directory / name, USER)
        (directory / "etc" / "account.json").write_text("the account")
        self.config = backup.Config(
            image="none",
            uid=0,
            container="none",
            compose="none",
            major="17",
            stanza="agent",
            repository=f"the directory {directory}/repository",
            mounts=[],
            network="none",
            data=f"{directory}/data",
            secrets=f"{directory}/secrets",
            marker=f"{directory}/marker",
            state=f"{directory}/state",
            scratch=f"{directory}/scratch",
            textfile=f"{directory}/textfile",
            full_days=7,
            saved=[f"{directory}/etc", f"{directory}/absent"],
            put_back=[f"{directory}/etc"],
            annotations={"domain": "agent.example.com"},
        )
        self.server = Server(directory, self.config, **options)
        self.configure()
        self.server.initialise()
        self.server.start()
        self.server.wait()
        self.server.sql("CREATE DATABASE agent")

    def configure(self, password: str = PASS) -> None:
        write_configuration(self.config, password)
        path = Path(self.config.secrets) / "pgbackrest.conf"
        path.write_text(path.read_text().replace("PORT", str(self.server.port)))

    @property
    def program(self) -> Any:
        return backup.Backup(self.config, self.server)

    def metric(self, name: str) -> float:
        lines = (self.directory / "textfile" / "backup.prom").read_text().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"agent_stack_backup_{name} "))

    def turns(self) -> list[str]:
        return self.server.sql("SELECT turn FROM runs ORDER BY turn", "agent").split()

    def turn(self, name: str) -> None:
        self.server.sql(f"INSERT INTO runs VALUES ('{name}', 'success', now() - interval '1 minute')", "agent")  # noqa: S608
