"""Secrets on the host, asked read-only; usable against production (as root)."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import pytest
from testinfra.host import Host

# One of each component that keeps secrets, so that a look at the wrong place does not pass.
KNOWN = {
    "agent/secrets/proxy_secret",
    "monitoring/secrets/postgres-exporter/pgpass",
    "postgres/secrets/pgbackrest.conf",
    "redis/secrets/users.acl",
    "vllm/fetch/secrets/hf_token",
}
ROOT = PurePosixPath("/opt/agent-stack")


@pytest.fixture(scope="module")
def readers(host: Host) -> dict[str, set[str]]:
    """Directories of secrets that containers see, with the uids that these run as."""
    found: dict[str, set[str]] = {}
    for file in host.check_output(f"ls {ROOT}/*/compose.yml").split():
        config = json.loads(host.check_output("docker compose --file %s --profile prepare config --format json", file))
        for service in config["services"].values():
            for mount in service.get("volumes", []):
                if "secrets" in PurePosixPath(mount["source"]).parts:
                    found.setdefault(mount["source"], set()).add(service["user"].partition(":")[0])
    return found


def test_each_secret_is_a_file_that_its_container_alone_may_read(host: Host, readers: dict[str, set[str]]) -> None:
    lines = host.check_output(f"find {ROOT} -path '*/secrets/*' -type f -printf '%m %U %G %p\\n'").splitlines()
    files = {path: (mode, uid, gid) for mode, uid, gid, path in (line.split(" ", 3) for line in lines)}
    assert {str(ROOT / name) for name in KNOWN} <= set(files)
    for path, (mode, uid, gid) in files.items():
        (reader,) = next((uids for directory, uids in readers.items() if PurePosixPath(path).is_relative_to(directory)), {"nobody"})
        assert (mode, uid, gid) == ("400", reader, reader), path


def test_nobody_else_may_enter_their_directories(host: Host) -> None:
    modes = host.check_output(f"find {ROOT} -type d '(' -name secrets -o -path '*/secrets/*' ')' -printf '%m\\n'").split()
    assert set(modes) <= {"700", "500"}
