"""Backup and restore with the real pgBackRest and a real Postgres, as processes of this machine where the program has containers."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from backup_host import Stack, backup

NOW = 1_800_000_000.0


@pytest.fixture(scope="class")
def stack() -> Iterator[Stack]:
    """A host whose Postgres runs and has no turns and no backup yet."""
    # In memory where there is enough of it: what is written is synced file by file.
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and shutil.disk_usage(memory).free > 2**30 else None
    directory = Path(tempfile.mkdtemp(prefix="backup-test-", dir=parent))
    stack = Stack(directory)
    try:
        stack.server.sql("CREATE TABLE runs (turn text, status text, updated_at timestamptz)", "agent")
        yield stack
    finally:
        stack.server.stop()
        shutil.rmtree(directory)


def refusal(job: Any, *arguments: Any) -> str:
    with pytest.raises(backup.BackupError) as refused:
        job(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestADeletedVolume:
    """What `make test` has of it; the rest takes minutes."""

    def test_what_was_backed_up_and_archived_comes_back(self, stack: Stack) -> None:
        assert refusal(stack.program.check_restore, "", True, False) == f"the directory {stack.directory}/repository has no backup of the stanza agent."
        assert stack.program.prepare() is True
        stack.turn("a")
        assert stack.program.backup("auto", True) == "full"
        stack.turn("b")
        # The last segment is archived before a server that is told to stop has stopped.
        stack.server.stop()
        shutil.rmtree(stack.config.cluster)
        shutil.rmtree(stack.directory / "etc")
        report = stack.program.restore("", False, False)
        assert (report["reached"], report["to"], report["put_back"]) == ("end", "newest", [f"{stack.directory}/etc"])
        assert stack.turns() == ["a", "b"]


@pytest.mark.slow
class TestOneHostsLife:
    """In the order of the file: each test goes on where the last one stopped."""

    first: float
    between: float

    def test_nothing_is_restored_before_there_is_a_backup(self, stack: Stack) -> None:
        assert refusal(stack.program.check_restore, "", True, False) == f"the directory {stack.directory}/repository has no backup of the stanza agent."

    def test_the_repository_is_made_ready_once(self, stack: Stack) -> None:
        assert stack.program.prepare() is True
        assert stack.server.first_backups == 1
        assert stack.program.prepare() is False

    def test_a_full_backup_then_differential_ones(self, stack: Stack) -> None:
        stack.turn("a")
        assert stack.program.backup("auto", True) == "full"
        type(self).first = time.time()
        assert stack.program.backup("auto", True) == "diff"
        info = json.loads(stack.server.beside("pgbackrest", "info", "--output=json").stdout)[0]["backup"]
        assert [(each["type"], each["annotation"]) for each in info] == [(kind, {"domain": "agent.example.com"}) for kind in ("full", "diff")]
        assert stack.metric("repository_up") == 1
        assert stack.metric('last_timestamp_seconds{type="full"}') == info[0]["timestamp"]["stop"]
        assert stack.metric('last_size_bytes{type="diff"}') < stack.metric('last_size_bytes{type="full"}')
        assert stack.metric("wal_waiting_seconds") < 60
        # There was none yet when it was asked the second time.
        assert (stack.program.prepare(), stack.server.first_backups) == (False, 2)

    def test_nothing_in_the_repository_can_be_read_without_the_password(self, stack: Stack) -> None:
        stack.server.sql("CREATE TABLE words AS SELECT 'a canary of a word' AS word FROM generate_series(1, 1000)", "agent")
        stack.program.backup("diff", True)
        for path in (stack.directory / "repository").rglob("*"):
            assert not path.is_file() or b"canary" not in path.read_bytes()

    def test_the_drill_finds_all_turns_and_leaves_nothing(self, stack: Stack) -> None:
        stack.turn("b")
        assert stack.program.drill() == 2
        assert (stack.metric("drill_success"), stack.metric("drill_turns"), stack.metric("drill_lost")) == (1, 2, 0)
        assert list(Path(stack.config.scratch).iterdir()) == []
        assert stack.turns() == ["a", "b"]

    def test_the_drill_sees_what_is_not_there(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backup, "TURNS", "SELECT count(*) + (CASE WHEN current_setting('archive_mode') = 'on' THEN 1 ELSE 0 END) FROM runs")
        assert refusal(stack.program.drill) == "The restore into a scratch server has 2 turns, and Postgres has 3."
        assert (stack.metric("drill_success"), stack.metric("drill_lost"), stack.metric('failures_total{task="drill"}')) == (0, 1, 1)

    def test_to_a_second_over_a_living_cluster(self, stack: Stack) -> None:
        time.sleep(1.1)
        type(self).between = time.time()
        time.sleep(1.1)
        stack.turn("c")
        target = backup.as_utc(self.between)
        assert refusal(stack.program.restore, target, False, False) == (
            f"{stack.config.cluster} holds a cluster; a restore over it needs restore_replace=true, which keeps what is there in {stack.config.data}/replaced."
        )
        assert stack.turns() == ["a", "b", "c"]
        report = stack.program.restore(target, True, False)
        assert (report["reached"], report["to"], report["put_back"]) == ("target", target, [])
        assert stack.turns() == ["a", "b"]
        assert (Path(stack.config.data) / "replaced" / "PG_VERSION").exists()
        # It goes on archiving, on its new timeline.
        stack.turn("d")
        assert stack.program.prepare() is False

    def test_a_deleted_volume_to_the_newest_with_the_files_of_the_host(self, stack: Stack) -> None:
        stack.server.beside("psql", "-h", stack.server.socket, "-p", str(stack.server.port), "-U", "postgres", "-c", "SELECT pg_switch_wal()")
        time.sleep(2)
        stack.server.stop()
        Path(stack.config.marker).write_text(stack.program._info(apart=True).system_id)
        shutil.rmtree(stack.config.cluster)
        shutil.rmtree(stack.directory / "etc")
        report = stack.program.restore("", False, False)
        assert (report["reached"], report["to"], report["put_back"]) == ("end", "newest", [f"{stack.directory}/etc"])
        assert stack.turns() == ["a", "b", "d"]
        assert (stack.directory / "etc" / "account.json").read_text() == "the account"

    def test_to_a_second_after_the_last_change(self, stack: Stack) -> None:
        """Recovery cannot see that a time has passed without a later commit: the end of the archive is the state of that time."""
        stack.server.sql("SELECT pg_switch_wal()")
        time.sleep(3)
        stack.server.stop()
        shutil.rmtree(stack.config.cluster)
        assert stack.program.restore(backup.as_utc(time.time() - 1), False, False)["reached"] == "end"
        assert stack.turns() == ["a", "b", "d"]

    def test_a_restored_server_that_does_not_start_gives_way_to_what_was_there(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        before = stack.turns()
        monkeypatch.setattr(backup, "RESTORE", 'mkdir -m 0700 "$PGBACKREST_PG1_PATH"; echo 17 > "$PGBACKREST_PG1_PATH/PG_VERSION"')
        stack.server.log.write_text("")
        assert "does not start, and what was there before is back: " in refusal(stack.program.restore, "", True, False)
        stack.server.wait()
        assert stack.turns() == before

    @pytest.mark.parametrize(
        ("to", "words"),
        [
            ("yesterday", "restore_to is 'yesterday'; allowed is a time in the past such as"),
            ("2999-01-01 00:00:00", "restore_to is '2999-01-01 00:00:00'; allowed is a time in the past such as"),
            ("2020-01-01 00:00:00", "; the first backup in the directory "),
        ],
    )
    def test_times_that_cannot_be_restored(self, stack: Stack, to: str, words: str) -> None:
        assert words in refusal(stack.program.check_restore, to, True, False)

    def test_a_wrong_password(self, stack: Stack) -> None:
        stack.configure("another passphrase of it")
        try:
            words = (
                f"the directory {stack.directory}/repository cannot be read with postgres_backup_cipher_pass: it was written with another one, or is damaged."
            )
            assert refusal(stack.program.check_restore, "", True, False) == words
            assert refusal(stack.program.backup, "full", True) == words
            assert stack.metric("repository_up") == 0
            assert stack.metric('failures_total{task="backup"}') == 1
        finally:
            stack.configure()

    def test_a_backup_of_another_cluster(self, stack: Stack) -> None:
        before = stack.turns()
        stack.server.stop()
        cluster = Path(stack.config.cluster)
        cluster.rename(cluster.with_name("kept"))
        try:
            stack.server.initialise()
            stack.server.start()
            stack.server.wait()
            assert " holds the backups of another cluster (" in refusal(stack.program.prepare)
            assert "; allowed is the same one, or restore_other_cluster=true." in refusal(stack.program.check_restore, "", True, False)
            stack.program.check_restore("", True, True)
            stack.server.stop()
            shutil.rmtree(cluster)
            Path(stack.config.marker).write_text("1")
            assert "and this host's is 1; allowed is the same one" in refusal(stack.program.check_restore, "", False, False)
        finally:
            Path(stack.config.marker).unlink(missing_ok=True)
            shutil.rmtree(cluster, ignore_errors=True)
            cluster.with_name("kept").rename(cluster)
            stack.server.start()
            stack.server.wait()
        assert stack.turns() == before

    def test_no_room(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backup.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))
        assert refusal(stack.program.check_restore, "", True, False).startswith(f"{stack.config.data} has 1 MiB free, and the restored cluster needs ")

    def test_a_damaged_file_is_found(self, stack: Stack) -> None:
        files = sorted((stack.directory / "repository").glob("backup/agent/*F/bundle/*"), key=lambda path: path.stat().st_size)
        whole = files[-1].read_bytes()
        files[-1].write_bytes(whole[:64] + b"damaged" + whole[71:])
        try:
            assert " has files that are missing or damaged: " in refusal(stack.program.drill)
        finally:
            files[-1].write_bytes(whole)

    def test_a_repository_that_is_gone(self, stack: Stack) -> None:
        directory = stack.directory / "repository"
        directory.rename(directory.with_name("gone"))
        try:
            assert refusal(stack.program.backup, "full", True).endswith(" has no stanza agent; site.yml makes it ready.")
            stack.turn("e")
            stack.server.sql("SELECT pg_switch_wal()")
            time.sleep(3)
            stack.program.metrics()
            assert stack.metric("repository_up") == 0
            assert stack.metric("wal_failures_total") > 0
            assert stack.metric("wal_waiting_seconds") > 1
        finally:
            directory.with_name("gone").rename(directory)
        assert stack.program.backup("full", True) == "full"
        assert stack.metric("wal_waiting_seconds") < 60


@pytest.mark.slow
class TestAKilledRestore:
    def test_the_next_one_goes_through_and_keeps_what_the_first_replaced(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        stack.program.prepare()
        stack.turn("a")
        stack.program.backup("auto", True)
        own = Path(stack.config.cluster) / "of the host itself"
        own.touch()
        with monkeypatch.context() as patched:
            patched.setattr(backup.Backup, "_recover", killed)
            with pytest.raises(KeyboardInterrupt):
                stack.program.restore("", True, False)
        assert (stack.server.beside("true").returncode, own.exists()) == (1, False)
        # The same command again, or the one for a host without a cluster: what is there is no cluster of this host.
        assert stack.program.restore("", False, False)["reached"] == "end"
        assert (Path(stack.config.data) / "replaced" / own.name).exists()
        assert stack.turns() == ["a"]
        # That one has ended, and counts as the host's own from now on.
        assert "holds a cluster; a restore over it needs restore_replace=true" in refusal(stack.program.restore, "", False, False)


def killed(*_arguments: Any) -> None:
    raise KeyboardInterrupt


def repository(*backups: tuple[str, float]) -> Any:
    return backup.Repository("", True, "1", [{"type": kind, "timestamp": {"stop": stop}} for kind, stop in backups])


@pytest.mark.parametrize(
    ("wanted", "backups", "kind"),
    [
        ("auto", [], "full"),
        ("diff", [], "diff"),
        ("auto", [("full", NOW - 86400)], "diff"),
        ("auto", [("full", NOW - 6.4 * 86400), ("diff", NOW - 86400)], "diff"),
        ("auto", [("full", NOW - 6.6 * 86400), ("diff", NOW - 86400)], "full"),
        ("full", [("full", NOW)], "full"),
    ],
)
def test_the_kind_of_backup(wanted: str, backups: Sequence[tuple[str, float]], kind: str) -> None:
    assert backup.kind_of_backup(wanted, repository(*backups), NOW, 7) == kind


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-05-31 14:05:00", 1780236300),
        ("2026-05-31T14:05:00Z", 1780236300),
        ("2026-05-31 16:05:00+02:00", 1780236300),
        (" 2026-05-31 14:05:00.250000 ", 1780236300.25),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert backup.parse_time(text, NOW) == seconds
    assert backup.parse_time(backup.as_utc(seconds), NOW) == seconds


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"code": 99, "message": "[CryptoError] cipher header invalid"}, "cannot be read with postgres_backup_cipher_pass"),
        ({"code": 99, "message": "[HostConnectError] unable to\nconnect to 's3.example.com:443'"}, "cannot be used: [HostConnectError] unable to connect to"),
    ],
)
def test_a_repository_that_cannot_be_used(status: dict[str, Any], words: str) -> None:
    said = backup.read_info(json.dumps([{"name": "agent", "repo": [{"status": status}]}]), Named())
    assert words in said.problem
    assert not said.exists


class Named:
    """What reading the answer needs of a configuration."""

    stanza = "agent"
    repository = "the bucket"


def test_an_answer_that_is_none() -> None:
    assert backup.read_info("Error: No such container: x\n", Named()).problem == "the bucket cannot be asked: Error: No such container: x"
