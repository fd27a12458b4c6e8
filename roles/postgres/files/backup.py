"""Back Postgres up with pgBackRest, say how that goes, prove that a restore works, and restore. systemd timers and the playbooks run this.

    backup.py CONFIG.json prepare                       make the repository ready for this cluster; `changed` is its last word if it did something
    backup.py CONFIG.json backup [auto|full|diff] [--fast]
    backup.py CONFIG.json metrics
    backup.py CONFIG.json drill                         restore into a scratch server, and count
    backup.py CONFIG.json restore [--check] [--to TIME] [--replace] [--other-cluster]

What can be wrong is said in one sentence, with exit status 1. pgBackRest itself is in the image of Postgres and runs there: beside the server in its
container, or in a container of its own where none runs or none must be touched.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

# datetime.UTC came with Python 3.11, and Ubuntu 22.04 has 3.10.
UTC = timezone(timedelta(0))
JOBS = ("backup", "drill")
# pgBackRest's errors about a file that is not what the password makes of it.
UNREADABLE = r"\[?(FormatError|CryptoError)"
DAY = 86400
# A weekly full backup must not move to the next day because the last one took a while.
EARLY = DAY / 2
KEPT_IN_CLUSTER = "agent-stack/host.tar"
# Where the directories of the host are in a container; the image's own places.
DATA = "/var/lib/postgresql/data"
SCRATCH = "/scratch"

# Finished turns: rows that nothing but the retention job touches. A database without the agent has none.
TURNS = """SELECT CASE WHEN to_regclass('public.runs') IS NULL THEN 0 ELSE (xpath('/row/n/text()', query_to_xml(
    $$SELECT count(*) AS n FROM public.runs WHERE status = 'success' AND updated_at < to_timestamp({before})$$, false, true, '')))[1]::text::bigint END"""

RESTORE = """
rm -rf "$PGBACKREST_PG1_PATH"
mkdir -m 0700 "$PGBACKREST_PG1_PATH"
exec pgbackrest restore "$@"
"""
# Without hot_standby the scratch server need not have the settings of the first one, and answers when recovery has ended.
SCRATCH_SERVER = """
socket=$1 name=$2 query=$3 port=$4
trap 'pg_ctl --pgdata="$PGBACKREST_PG1_PATH" --mode=immediate --silent stop || :; rm -rf "$PGBACKREST_PG1_PATH"' EXIT
rm -rf "$PGBACKREST_PG1_PATH"
mkdir -m 0700 "$PGBACKREST_PG1_PATH"
nice -n 19 pgbackrest restore --type=name --target="$name" --target-action=promote >&2
: > "$PGBACKREST_PG1_PATH/postgresql.conf"
echo 'local all postgres peer' > "$PGBACKREST_PG1_PATH/pg_hba.conf"
nice -n 19 pg_ctl --pgdata="$PGBACKREST_PG1_PATH" --wait --silent --log="$PGBACKREST_PG1_PATH/log" --options="-c listen_addresses= \
  -c unix_socket_directories=$socket -c port=$port -c archive_mode=off -c hot_standby=off -c shared_buffers=64MB -c fsync=off" start >&2 || :
ask() { psql --host="$socket" --port="$port" --username=postgres --no-align --tuples-only --dbname="$@"; }
until ask postgres --command='SELECT 1' > /dev/null 2>&1; do
  pg_ctl --pgdata="$PGBACKREST_PG1_PATH" status > /dev/null || { grep FATAL "$PGBACKREST_PG1_PATH/log" >&2; exit 1; }
  sleep 0.2
done
ask agent --command="$query"
"""


class BackupError(Exception):
    """Why something was not done; the message is a sentence for the operator."""


@dataclass(frozen=True)
class Config:
    """What the role writes down. Paths are the host's; `mounts` and `network` are what a container needs to reach the repository."""

    image: str
    uid: int
    container: str
    compose: str
    major: str
    stanza: str
    repository: str
    mounts: list[str]
    network: str
    data: str
    secrets: str
    marker: str
    state: str
    scratch: str
    textfile: str
    full_days: float
    saved: list[str] = field(default_factory=list)
    put_back: list[str] = field(default_factory=list)
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def cluster(self) -> Path:
        return Path(self.data) / self.major


@dataclass
class Memory:
    """What is kept from one run to the next. Times are seconds since 1970."""

    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JOBS, 0))
    drill_at: float = 0.0
    drill_seconds: float = 0.0
    drill_ok: bool = False
    drill_turns: int = 0
    drill_lost: int = 0


class Host:
    """The way to pgBackRest and Postgres: with Docker. Results are those of subprocess, never an exception for an exit status."""

    data = DATA
    scratch = SCRATCH
    socket = "/var/run/postgresql"
    scratch_socket = "/tmp"  # noqa: S108  # of a container of its own
    port = 5432

    def __init__(self, config: Config) -> None:
        self._config = config

    def beside(self, *command: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command beside the server."""
        return self._run("docker", "exec", "--interactive", self._config.container, *command, stdin=stdin)

    def apart(self, *command: str, cluster: str = "", scratch: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of its own. `cluster` is the data directory that pgBackRest takes for the server's."""
        config = self._config
        mounts = [f"{config.secrets}:/run/secrets:ro"]
        mounts += [f"{config.scratch}:{SCRATCH}"] if scratch else [f"{config.data}:{DATA}"]
        mounts += config.mounts
        environment = {"PGBACKREST_CONFIG": "/run/secrets/pgbackrest.conf", "PGBACKREST_STANZA": config.stanza}
        environment |= {"PGBACKREST_PG1_PATH": cluster} if cluster else {}
        return self._run(
            *("docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp:size=64m", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),  # noqa: S108
            *("--user", f"{config.uid}:{config.uid}", "--network", config.network, "--pull", "never"),
            *("--memory", "1g", "--pids-limit", "256", "--shm-size", "256m"),
            *(word for mount in mounts for word in ("--volume", mount)),
            *(word for name, value in environment.items() for word in ("--env", f"{name}={value}")),
            *("--entrypoint", command[0], config.image, *command[1:]),
        )

    def stop(self) -> None:
        self._compose("stop")

    def start(self) -> None:
        """Start the server, without waiting for it. Raises BackupError."""
        done = self._compose("up", "--detach", "--no-build", "--pull", "never")
        if done.returncode != 0:
            raise BackupError(f"Postgres does not start: {last_line(done)}")

    def words(self, since: float) -> str:
        """What the server has logged since a time."""
        done = self._run("docker", "logs", "--since", f"{since:.0f}", self._config.container)
        return done.stdout + done.stderr

    def restarts(self) -> int:
        """How often the server has ended and was started again since `start`."""
        done = self._run("docker", "inspect", "--format", "{{.RestartCount}}", self._config.container)
        return int(done.stdout) if done.returncode == 0 else 0

    def begin_first_backup(self) -> None:
        self._run("systemctl", "start", "--no-block", "agent-stack-backup.service")

    def _compose(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self._run("docker", "compose", "--file", self._config.compose, *command)

    @staticmethod
    def _run(*command: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, input=stdin, stdin=subprocess.DEVNULL if stdin is None else None, capture_output=True, check=False)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command says about its failure, in one line: pgBackRest's error if there is one."""
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    errors = [line.partition("ERROR: ")[2] for line in lines if "ERROR: " in line]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]


@dataclass(frozen=True)
class Repository:
    """What pgBackRest says of the repository. `problem` is a sentence if it cannot be read; `system_id` is empty before the first backup is prepared."""

    problem: str
    exists: bool
    system_id: str
    backups: list[Mapping[str, Any]]

    def last(self, *kinds: str) -> Mapping[str, Any] | None:
        return next((backup for backup in reversed(self.backups) if backup["type"] in kinds), None)


def read_info(text: str, config: Config) -> Repository:
    """Return what `pgbackrest info --output=json` says."""
    wrong_password = f"{config.repository} cannot be read with postgres_backup_cipher_pass: it was written with another one, or is damaged."
    try:
        # Of what cannot be decrypted, pgBackRest shows the bytes.
        stanza: dict[str, Any] = next((each for each in json.loads(text, strict=False) if each["name"] == config.stanza), {})
    except ValueError:
        if re.search(UNREADABLE, text):
            return Repository(wrong_password, False, "", [])
        return Repository(f"{config.repository} cannot be asked: {(text.strip().splitlines() or ['no answer'])[-1]}", False, "", [])
    status = stanza.get("repo", [{}])[0].get("status", {"code": 1, "message": "missing stanza path"})
    problem = ""
    if status["code"] not in (0, 1, 2):
        message = " ".join(status["message"].split())
        problem = wrong_password if re.search(UNREADABLE, message) else f"{config.repository} cannot be used: {message[:300]}"
    backups = [backup for backup in stanza.get("backup", []) if not backup.get("error")]
    ids = [str(each["system-id"]) for each in stanza.get("db", [])]
    return Repository(problem, status["code"] in (0, 2), ids[-1] if ids else "", backups)


def kind_of_backup(wanted: str, repository: Repository, now: float, full_days: float) -> str:
    """Return full or diff."""
    last = repository.last("full")
    if wanted != "auto":
        return wanted
    return "full" if last is None or now - last["timestamp"]["stop"] > full_days * DAY - EARLY else "diff"


def pack(paths: Sequence[str]) -> bytes:
    """Return the tar file of those paths of the host that exist."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in paths:
            if os.path.lexists(path):
                tar.add(path, arcname=path.lstrip("/"))
    return buffer.getvalue()


def unpack(archive: Path, put_back: Sequence[str], root: Path = Path("/")) -> list[str]:
    """Put those directories back that the host does not have, and return them. What is there is newer, and stays."""
    back = [path for path in put_back if not (root / path.lstrip("/")).exists()]
    if not archive.exists():
        return []
    with tarfile.open(archive) as tar:
        # With owners, modes and links: it is our own, and its names were checked by nobody but us. Older Pythons know no filters.
        tar.extraction_filter = lambda member, _path: member
        for path in back:
            inside = path.lstrip("/")
            tar.extractall(root, [member for member in tar.getmembers() if member.name == inside or member.name.startswith(f"{inside}/")])  # noqa: S202
    return [path for path in back if (root / path.lstrip("/")).exists()]


def parse_time(text: str, now: float) -> float:
    """Return restore_to as seconds. Raises BackupError."""
    allowed = 'allowed is a time in the past such as "2026-05-31 14:05:00", in UTC unless it ends with an offset such as +02:00'
    try:
        parsed = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise BackupError(f"restore_to is {text!r}; {allowed}.") from None
    seconds = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    if seconds > now:
        raise BackupError(f"restore_to is {text!r}; {allowed}.")
    return seconds


def as_utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ")


class Backup:
    """The jobs. Each raises BackupError."""

    def __init__(self, config: Config, host: Host, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._host = host
        self._clock = clock
        self._memory_file = Path(config.state) / "memory.json"
        self.memory = self._read_memory()

    def prepare(self) -> bool:
        """Make the repository this cluster's, and see a segment of WAL arrive in it. Return whether there was anything to do."""
        repository = self._usable(self._info())
        system_id = self._sql("SELECT system_identifier FROM pg_control_system()")
        changed = not repository.exists
        if changed:
            self._pgbackrest("stanza-create")
        elif repository.system_id != system_id:
            raise BackupError(
                f"{self._config.repository} holds the backups of another cluster ({repository.system_id}; this one is {system_id}). Restore them with "
                "playbooks/restore.yml, or choose another postgres_backup_stanza or another repository."
            )
        digest = hashlib.sha256((Path(self._config.secrets) / "pgbackrest.conf").read_bytes() + system_id.encode()).hexdigest()
        checked = Path(self._config.state) / "checked"
        if not checked.exists() or checked.read_text() != digest:
            self._pgbackrest("check")
            write(checked, digest, 0o600)
            changed = True
        if not repository.backups:
            self._host.begin_first_backup()
        return changed

    def backup(self, wanted: str, fast: bool) -> str:
        """Make a backup. Return its kind."""
        with self._counting("backup"):
            repository = self._usable(self._info())
            if not repository.exists:
                raise BackupError(f"{self._config.repository} has no stanza {self._config.stanza}; site.yml makes it ready.")
            kind = kind_of_backup(wanted, repository, self._clock(), self._config.full_days)
            self._keep_host_files()
            annotations = [f"--annotation={name}={value}" for name, value in self._config.annotations.items()]
            self._pgbackrest("backup", f"--type={kind}", *annotations, *(["--start-fast"] if fast else []))
        return kind

    def metrics(self) -> None:
        """Write what Prometheus reads."""
        repository = self._info()
        answers = self._host.beside(
            *self._psql("postgres"),
            "SELECT failed_count, coalesce(extract(epoch FROM last_archived_time), 0), coalesce((SELECT extract(epoch FROM now() - min(modification))"
            " FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'), 0) FROM pg_stat_archiver",
        )
        archiver = [float(value) for value in answers.stdout.strip().split("|")] if answers.returncode == 0 else []
        text = exposition(repository, archiver, self.memory)
        path = Path(self._config.textfile) / "backup.prom"
        write(path, text, 0o644)

    def drill(self) -> int:
        """Check every file of the repository, restore to a point of now into a scratch server, and count. Return how many turns it found."""
        started = self._clock()
        with self._counting("drill"):
            self.memory.drill_ok = False
            try:
                self._drill(started)
                self.memory.drill_ok = True
            finally:
                self.memory.drill_at, self.memory.drill_seconds = self._clock(), self._clock() - started
        return self.memory.drill_turns

    def _drill(self, now: float) -> None:
        config = self._config
        self._usable(self._info())
        # Turns that ended a moment ago may not be written yet on one side or the other.
        query = TURNS.format(before=f"{now - 5:.0f}")
        live = int(self._sql(query, "agent"))
        point = f"drill-{now:.0f}"
        self._sql(f"SELECT pg_create_restore_point('{point}'), pg_switch_wal()")
        # The restore needs that segment of WAL; check waits for the one after it.
        self._pgbackrest("check")
        verified = self._host.apart("nice", "-n", "19", "pgbackrest", "verify", "--output=text")
        if verified.returncode != 0 or "status: error" in verified.stdout:
            raise BackupError(f"{config.repository} has files that are missing or damaged: {last_line(verified)}")
        arguments = (self._host.scratch_socket, point, query, str(self._host.port))
        done = self._host.apart("sh", "-euc", SCRATCH_SERVER, "sh", *arguments, cluster=f"{self._host.scratch}/cluster", scratch=True)
        if done.returncode != 0 or not done.stdout.strip():
            raise BackupError(f"The restore into a scratch server failed: {last_line(done)}")
        restored = int(done.stdout.split()[-1])
        self.memory.drill_turns, self.memory.drill_lost = restored, max(0, live - restored)
        if self.memory.drill_lost:
            raise BackupError(f"The restore into a scratch server has {restored} turns, and Postgres has {live}.")

    def check_restore(self, to: str, replace: bool, other_cluster: bool) -> Repository:
        """Refuse a restore that would not end well. Nothing is changed."""
        config = self._config
        target = parse_time(to, self._clock()) if to else None
        # From a container of its own: the server may be gone, and its configuration another one.
        repository = self._usable(self._info(apart=True))
        if not repository.backups:
            raise BackupError(f"{config.repository} has no backup of the stanza {config.stanza}.")
        first = min(backup["timestamp"]["stop"] for backup in repository.backups)
        if target is not None and target < first:
            raise BackupError(f"restore_to is {to!r}; the first backup in {config.repository} ended at {as_utc(first)}, and allowed is a time from then on.")
        here = self._system_id()
        if here and here != repository.system_id and not other_cluster:
            raise BackupError(
                f"{config.repository} holds the backups of the cluster {repository.system_id}, and this host's is {here}; allowed is the same one, or "
                "restore_other_cluster=true."
            )
        if self._occupied() and (config.cluster / "PG_VERSION").exists() and not replace:
            raise BackupError(
                f"{config.cluster} holds a cluster; a restore over it needs restore_replace=true, which keeps what is there in {self._replaced()}."
            )
        size = max(backup["info"]["size"] for backup in repository.backups)
        free = shutil.disk_usage(next(path for path in (Path(config.data), *Path(config.data).parents) if path.exists())).free
        if free < size * 1.1:
            raise BackupError(f"{config.data} has {free >> 20} MiB free, and the restored cluster needs {int(size * 1.1) >> 20} MiB.")
        return repository

    def restore(self, to: str, replace: bool, other_cluster: bool) -> dict[str, Any]:
        """Restore beside what is there, change places, and wait for the end of recovery. What was there comes back if that fails."""
        started = self._clock()
        self.check_restore(to, replace, other_cluster)
        target = parse_time(to, started) if to else None
        config = self._config
        occupied = self._occupied()
        if occupied:
            self._archive_the_end()
        restored = Path(config.data) / "restored"
        options = ["--type=time", f"--target={as_utc(target)}", "--target-action=promote"] if target is not None else []
        done = self._host.apart("sh", "-euc", RESTORE, "sh", *options, cluster=f"{self._host.data}/{restored.name}")
        if done.returncode != 0:
            shutil.rmtree(restored, ignore_errors=True)
            raise BackupError(f"pgBackRest could not restore, and nothing was changed: {last_line(done)}")
        back = unpack(restored / KEPT_IN_CLUSTER, config.put_back)
        self._host.stop()
        if occupied:
            shutil.rmtree(self._replaced(), ignore_errors=True)
            config.cluster.rename(self._replaced())
        elif config.cluster.exists():
            shutil.rmtree(config.cluster)
        restored.rename(config.cluster)
        try:
            reached = self._recover(target, "what was there before is back" if occupied else "was removed again")
        except BackupError:
            self._host.stop()
            shutil.rmtree(config.cluster)
            if occupied:
                self._replaced().rename(config.cluster)
                self._host.start()
            raise
        return {"put_back": back, "reached": reached, "seconds": round(self._clock() - started, 1), "to": as_utc(target) if target is not None else "newest"}

    def _recover(self, target: float | None, otherwise: str) -> str:
        """Start the restored server and wait until it takes writes. Return to where it recovered: target, or end (of what was archived).

        Raises BackupError if it does not start; `otherwise` is what the caller does then.
        """
        reached = "end" if target is None else "target"
        began = self._clock()
        self._host.start()
        while True:
            done = self._host.beside(*self._psql("postgres"), "SELECT pg_is_in_recovery()")
            if done.stdout.strip() == "f":
                return reached
            said = self._host.words(began)
            if reached == "target" and "recovery ended before configured recovery target was reached" in said:
                # Nothing was written after that time, so the end of the archive is the state of that time.
                self._host.stop()
                settings = self._config.cluster / "postgresql.auto.conf"
                kept = [line for line in settings.read_text().splitlines(keepends=True) if not line.startswith("recovery_target")]
                settings.write_text("".join(kept))
                reached, began = "end", self._clock()
                self._host.start()
            elif self._host.restarts() > 1:
                fatal = [line for line in said.splitlines() if "FATAL" in line or "PANIC" in line] or said.splitlines() or ["it said nothing"]
                raise BackupError(f"The restored server does not start, and {otherwise}: {fatal[-1]}")
            time.sleep(0.5)

    def _archive_the_end(self) -> None:
        """Have the last changes in the repository, and a commit after them, which tells recovery that a time has passed. A server that is down cannot."""
        with contextlib.suppress(BackupError):
            self._sql("SELECT pg_logical_emit_message(true, 'backup', 'before a restore')")
            self._sql("SELECT pg_switch_wal()")
            self._pgbackrest("check")

    def _system_id(self) -> str:
        """The cluster that is here, or was: its control file, or what the server wrote down beside its directory."""
        if (self._config.cluster / "PG_VERSION").exists():
            done = self._host.apart("pg_controldata", f"{self._host.data}/{self._config.major}")
            found = re.search(r"system identifier: +(\d+)", done.stdout)
            if found:
                return found[1]
        try:
            return Path(self._config.marker).read_text().strip()
        except OSError:
            return ""

    def _occupied(self) -> bool:
        """Whether the host has a cluster of its own. Until recovery ends Postgres keeps recovery.signal: that one is of a restore that was killed."""
        return self._config.cluster.exists() and not (self._config.cluster / "recovery.signal").exists()

    def _replaced(self) -> Path:
        return Path(self._config.data) / "replaced"

    def _keep_host_files(self) -> None:
        """Put what else the host needs into the cluster's directory: pgBackRest encrypts, keeps and expires it with the rest."""
        path = f"{self._host.data}/{self._config.major}/{KEPT_IN_CLUSTER}"
        script = 'umask 077; mkdir -p "$(dirname "$1")"; cat > "$1.new"; mv "$1.new" "$1"'
        done = self._host.beside("sh", "-euc", script, "sh", path, stdin=pack(self._config.saved))
        if done.returncode != 0:
            raise BackupError(f"The host's own files were not saved: {last_line(done)}")

    def _info(self, apart: bool = False) -> Repository:
        command = ("pgbackrest", "info", "--output=json")
        done = self._host.apart(*command) if apart else self._host.beside(*command)
        if done.returncode == 127 or "executable file not found" in done.stderr:
            raise BackupError(f"The image {self._config.image} has no pgbackrest; allowed with it is postgres_backup_repository=none, or an image that has it.")
        return read_info(done.stdout or done.stderr, self._config)

    def _usable(self, repository: Repository) -> Repository:
        if repository.problem:
            raise BackupError(repository.problem)
        return repository

    def _pgbackrest(self, *arguments: str) -> None:
        done = self._host.beside("nice", "-n", "19", "pgbackrest", *arguments)
        if done.returncode != 0:
            raise BackupError(f"pgbackrest {arguments[0]} failed: {last_line(done)}")

    def _psql(self, database: str) -> tuple[str, ...]:
        return (
            *("psql", f"--host={self._host.socket}", f"--port={self._host.port}", "--username=postgres", f"--dbname={database}"),
            *("--no-align", "--tuples-only", "--command"),
        )

    def _sql(self, statement: str, database: str = "postgres") -> str:
        done = self._host.beside(*self._psql(database), statement)
        if done.returncode != 0:
            raise BackupError(f"Postgres cannot be asked: {last_line(done)}")
        return done.stdout.strip()

    @contextlib.contextmanager
    def _counting(self, job: str) -> Iterator[None]:
        """Have the metrics tell how a job ended. One at a time: both write down what they remember."""
        with (Path(self._config.state) / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.memory = self._read_memory()
            try:
                yield
            except (BackupError, OSError):
                self.memory.failures[job] = self.memory.failures.get(job, 0) + 1
                raise
            finally:
                write(self._memory_file, json.dumps(asdict(self.memory)), 0o600)
                self.metrics()

    def _read_memory(self) -> Memory:
        try:
            return Memory(**json.loads(self._memory_file.read_text()))
        except (OSError, ValueError, TypeError):
            return Memory()


def exposition(repository: Repository, archiver: Sequence[float], memory: Memory) -> str:
    """Return the metrics. `archiver`, empty if unknown: attempts that failed, when one last worked, and how long the oldest segment waits, in seconds."""
    samples: list[tuple[str, str, str, list[tuple[str, float]]]] = [
        ("repository_up", "gauge", "Whether the repository can be read.", [("", float(not repository.problem and repository.exists))]),
        ("failures_total", "counter", "Jobs that failed.", [(f'{{task="{job}"}}', memory.failures.get(job, 0)) for job in JOBS]),
        ("drill_timestamp_seconds", "gauge", "When the last restore into a scratch server ended.", [("", memory.drill_at)]),
        ("drill_success", "gauge", "Whether it restored all.", [("", float(memory.drill_ok))]),
        ("drill_duration_seconds", "gauge", "How long it took.", [("", memory.drill_seconds)]),
        ("drill_turns", "gauge", "Turns that it found.", [("", memory.drill_turns)]),
        ("drill_lost", "gauge", "Turns that it did not find.", [("", memory.drill_lost)]),
    ]
    last = {kind: repository.last(kind) for kind in ("full", "diff")}
    kinds = [(f'{{type="{kind}"}}', backup) for kind, backup in last.items() if backup is not None]
    if kinds:
        samples += [
            ("last_timestamp_seconds", "gauge", "When the last backup of a type ended.", [(label, each["timestamp"]["stop"]) for label, each in kinds]),
            ("last_size_bytes", "gauge", "What it takes in the repository.", [(label, each["info"]["repository"]["delta"]) for label, each in kinds]),
            ("last_database_bytes", "gauge", "How much was backed up.", [(label, each["info"]["size"]) for label, each in kinds]),
        ]
    if archiver:
        samples += [
            ("wal_failures_total", "counter", "Attempts to archive a segment of WAL that failed.", [("", archiver[0])]),
            ("wal_last_timestamp_seconds", "gauge", "When a segment was last archived.", [("", archiver[1])]),
            ("wal_waiting_seconds", "gauge", "How long the oldest segment that is not archived has waited.", [("", archiver[2])]),
        ]
    lines: list[str] = []
    for name, kind, words, values in samples:
        full = f"agent_stack_backup_{name}"
        lines += [f"# HELP {full} {words}", f"# TYPE {full} {kind}", *(f"{full}{label} {value:.10g}" for label, value in values)]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str, mode: int) -> None:
    """Replace a file as one step."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)


def run(backup: Backup, wanted: argparse.Namespace) -> str:
    """Do a job. Return what there is to say."""
    match wanted.job:
        case "prepare":
            return "changed" if backup.prepare() else "unchanged"
        case "backup":
            return f"The {backup.backup(wanted.kind, wanted.fast)} backup is made."
        case "metrics":
            backup.metrics()
            return ""
        case "drill":
            return f"The restore into a scratch server found {backup.drill()} turns, and none is lost."
        case _:
            if wanted.check:
                backup.check_restore(wanted.to, wanted.replace, wanted.other_cluster)
                return ""
            return json.dumps(backup.restore(wanted.to, wanted.replace, wanted.other_cluster))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name in ("prepare", "metrics", "drill"):
        jobs.add_parser(name)
    make = jobs.add_parser("backup")
    make.add_argument("kind", choices=("auto", "full", "diff"), nargs="?", default="auto")
    make.add_argument("--fast", action="store_true", help="begin with a checkpoint at once, which live turns may notice")
    restore = jobs.add_parser("restore")
    restore.add_argument("--check", action="store_true", help="say only what speaks against it")
    restore.add_argument("--to", default="", help="a time; without it, to the newest")
    restore.add_argument("--replace", action="store_true", help="over a cluster that is there, which is kept aside")
    restore.add_argument("--other-cluster", action="store_true", help="though it is the backup of another cluster")
    wanted = parser.parse_args(arguments)
    config = Config(**json.loads(wanted.config.read_text()))
    try:
        said = run(Backup(config, Host(config)), wanted)
    except (BackupError, OSError) as error:
        print(error, flush=True)
        return 1
    if said:
        print(said, flush=True)
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
