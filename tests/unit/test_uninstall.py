"""What uninstalling removes, restores and leaves: tables over the rules, and whole hosts in a temporary directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _uninstall
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._uninstall import Host, Package, Removal, UninstallError, Wish
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _components
from programs import ROOT

FOOTPRINT = _components.footprint(_components.load(ROOT / "roles").values(), "agent.example.com")


def package(name: str, *depends: str, recommends: str = "", provides: str = "") -> Package:
    """`depends` are clauses, with `|` between alternatives."""
    clauses = [clause.split("|") for clause in depends]
    return Package(name, True, clauses, [recommends.split("|")] if recommends else [], [name, *provides.split()])


@pytest.mark.parametrize(
    ("packages", "automatic", "before", "goes"),
    [
        pytest.param([package("nginx")], [], [], ["nginx"], id="declared"),
        pytest.param([package("nginx")], [], ["nginx"], [], id="there before"),
        pytest.param([package("curl")], [], [], [], id="not ours"),
        pytest.param(
            [package("nginx", "common"), package("common", "lib"), package("lib")], ["common", "lib"], [], ["common", "lib", "nginx"], id="came with it"
        ),
        pytest.param([package("nginx", "lib"), package("lib")], ["lib"], ["lib"], ["nginx"], id="came with it, and was there before"),
        pytest.param([package("nginx", "lib"), package("lib")], [], [], ["nginx"], id="somebody asked for it"),
        pytest.param([package("nginx", "lib"), package("lib"), package("own", "lib")], ["lib"], [], ["nginx"], id="somebody else's needs it"),
        pytest.param([package("nginx", "lib"), package("lib"), package("own", "nginx")], ["lib"], [], [], id="somebody else's needs ours"),
        pytest.param([package("nginx"), package("own", "nginx|apache")], [], [], [], id="the only alternative that is there"),
        pytest.param([package("nginx"), package("apache"), package("own", "nginx|apache")], [], [], ["nginx"], id="another alternative is there"),
        pytest.param([package("nginx", provides="httpd"), package("own", "httpd")], [], [], [], id="needed by what it provides"),
        pytest.param([package("nginx", "awk"), package("mawk", provides="awk")], ["mawk"], [], ["mawk", "nginx"], id="came with it, by what it provides"),
        pytest.param([package("nginx"), package("own", recommends="nginx")], [], [], [], id="recommended by what came later"),
        pytest.param([package("nginx"), package("old", recommends="nginx")], [], ["old"], ["nginx"], id="recommended by what did without before"),
        pytest.param([package("nginx", recommends="extra"), package("extra")], ["extra"], [], ["extra", "nginx"], id="came as a recommendation"),
        pytest.param([package("nginx", "a"), package("a", "b"), package("b", "a")], ["a", "b"], [], ["a", "b", "nginx"], id="a circle"),
        pytest.param([package("nginx", "a"), package("a", "b"), package("b", "a"), package("own", "b")], ["a", "b"], [], ["nginx"], id="a circle in use"),
        pytest.param([Package("nginx", False, provides=["nginx"])], [], [], [], id="only its configuration is left"),
    ],
)
def test_which_packages_go(packages: list[Package], automatic: list[str], before: list[str], goes: list[str]) -> None:
    assert _uninstall.removable({each.name: each for each in packages}, ["nginx"], automatic, before) == goes


def test_packages_are_read_as_dpkg_names_them() -> None:
    rows = [
        ("ii ", "nginx", "init-system (>= 1)", "libc6 (>= 2.36), nginx-common (= 1), perl:any | python3 (>= 3.9)", "logrotate", "httpd, httpd-cgi (= 2)"),
        ("rc ", "certbot", "", "", "", ""),
    ]
    text = "".join("\x1f".join(row) + "\x1e" for row in rows)
    found = _uninstall.parse_packages(text)
    assert found["nginx"] == Package(
        "nginx", True, [["init-system"], ["libc6"], ["nginx-common"], ["perl", "python3"]], [["logrotate"]], ["nginx", "httpd", "httpd-cgi"]
    )
    assert not found["certbot"].installed


OURS = {"log-driver": "json-file", "log-opts": {"max-size": "50m", "max-file": "3"}, "live-restore": True}
KEYS = ["live-restore", "log-driver", "log-opts.max-file", "log-opts.max-size"]


@pytest.mark.parametrize(
    ("now", "before", "after"),
    [
        pytest.param(OURS, {}, {}, id="all of it is ours"),
        pytest.param({**OURS, "labels": ["x"]}, {}, {"labels": ["x"]}, id="added later"),
        pytest.param(
            {**OURS, "labels": ["x"]}, {"labels": ["x"], "log-opts": {"max-size": "1m"}}, {"labels": ["x"], "log-opts": {"max-size": "1m"}}, id="merged"
        ),
        pytest.param({**OURS, "log-opts": {"max-size": "50m", "env": "a"}}, {}, {"log-opts": {"env": "a"}}, id="added into ours"),
        pytest.param({"labels": ["x"]}, {"log-driver": "local"}, {"labels": ["x"], "log-driver": "local"}, id="removed since"),
        pytest.param({"log-opts": "odd"}, {}, {"log-opts": "odd"}, id="not a mapping any more"),
        pytest.param({**OURS}, {"log-opts": {}}, {"log-opts": {}}, id="empty before"),
    ],
)
def test_keys_become_what_they_were(now: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    copied = json.loads(json.dumps(now))
    assert _uninstall.undo_keys(now, before, KEYS) == after
    assert now == copied


def test_keys_of_options_are_flat() -> None:
    assert _uninstall.flat_keys({"a": 1, "b": {"c": {"d": 2}, "e": {}}, "f": []}) == ["a", "b.c.d", "b.e", "f"]


class Machine:
    """A host in a directory: what its programs answer, and what they were told to change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.containers: list[tuple[str, str, str]] = []  # id, project, name
        self.volumes: list[tuple[str, str]] = []
        self.networks: list[str] = []
        self.images: list[str] = []
        self.units: dict[str, str] = {}
        self.packages: dict[str, Package] = {}
        self.automatic: list[str] = []
        self.engine = True
        self.did: list[str] = []

    def write(self, path: str, text: str = "") -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def add(self, *packages: Package, automatic: bool = False) -> None:
        for each in packages:
            self.packages[each.name] = each
            self.automatic += [each.name] if automatic else []

    def run(self, *command: str, **_environment: str) -> tuple[int, str]:
        answer = self._answer(list(command))
        return (0, answer) if isinstance(answer, str) else (answer, "no")

    def _answer(self, command: list[str]) -> str | int:
        def text(lines: list[str]) -> str:
            return "".join(f"{line}\n" for line in lines)

        match command:
            case ["dpkg-query", "--search", path]:
                return 0 if path in ("/var/lib", "/usr/local", "/etc/docker") else 1
            case ["dpkg-query", *_]:
                join = ", ".join
                rows = [
                    ("ii " if each.installed else "rc ", each.name, "", join("|".join(c) for c in each.depends), "", join(each.provides[1:]))
                    for each in self.packages.values()
                ]
                return "".join("\x1f".join(row) + "\x1e" for row in rows)
            case ["apt-mark", "showauto"]:
                return text(self.automatic)
            case ["apt-get", *rest]:
                word = "purge" if "purge" in rest else "remove"
                names = rest[rest.index(word) + 1 :]
                # As apt does it: what needs one of them goes, too.
                needing = [each.name for each in self.packages.values() if each.installed and any(clause[0] in names for clause in each.depends)]
                if "--simulate" in rest:
                    return text([f"{'Purg' if word == 'purge' else 'Remv'} {name} [1]" for name in dict.fromkeys([*names, *needing])])
                assert set(needing) <= set(names)
                self.did.append(f"{word} {' '.join(names)}")
                for name in names:
                    left = self.packages.pop(name)
                    if word == "remove":
                        self.packages[name] = Package(name, False, provides=left.provides)
                return ""
            case ["systemctl", "list-units", *_]:
                return text([f"{name} loaded active running" for name in self.units])
            case ["systemctl", "list-unit-files", *_]:
                return text([f"{name} {state} -" for name, state in self.units.items()])
            case ["docker", *_] if not self.engine or "docker.io" not in self.packages:
                return 127
            case ["docker", "ps", *_, layout]:
                return text(
                    [layout.replace("{{.ID}}", i).replace('{{.Label "com.docker.compose.project"}}', p).replace("{{.Names}}", n) for i, p, n in self.containers]
                )
            case ["docker", "volume", "ls", *_]:
                return text([f"{project} {name}" for project, name in self.volumes])
            case ["docker", "network", "ls", *_]:
                return text([f"{name} " for name in self.networks])
            case ["docker", "image", "ls", "--no-trunc", "--quiet"]:
                return text([f"id-{name}" for name in self.images])
            case ["docker", "image", "ls", *_]:
                return text([f"{name.replace(':', ' ')} sha256:1 id-{name}" for name in self.images])
            case ["docker", "version", *_]:
                return "27"
            case ["ip", *_]:
                return 1
        self.did.append(" ".join(command))
        match command:
            case ["systemctl", "stop" | "disable", *_, name]:
                self.units.pop(name, None)
            case ["docker", "rm", *_, identity]:
                self.containers = [each for each in self.containers if each[0] != identity]
            case ["docker", "network", "rm", name]:
                self.networks.remove(name)
            case ["docker", "image", "rm", name]:
                self.images.remove(name)
            case ["userdel", name]:
                lines = (self.root / "etc/passwd").read_text().splitlines()
                self.write("/etc/passwd", text([line for line in lines if not line.startswith(f"{name}:")]))
            case ["groupdel", name]:
                lines = (self.root / "etc/group").read_text().splitlines()
                self.write("/etc/group", text([line for line in lines if not line.startswith(f"{name}:")]))
        return ""

    def tree(self) -> dict[str, str]:
        return {str(path.relative_to(self.root)): path.read_text() if path.is_file() else "" for path in sorted(self.root.rglob("*"))}

    def remove(self, *, dry: bool = False, **wish: Any) -> Removal:
        removal = Removal(Host(self.root, self.run), Wish("/opt/agent-stack", "/var/lib/agent-stack", FOOTPRINT, **wish), dry=dry)
        removal.everything()
        return removal


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A host with a life of its own, and no stack."""
    machine = Machine(tmp_path)
    machine.write("/etc/group", "root:x:0:\nusers:x:100:ada\n")
    machine.write("/etc/passwd", "root:x:0:0::/root:/bin/bash\n")
    machine.write("/etc/hostname", "here")
    (tmp_path / "usr/local/sbin").mkdir(parents=True)
    (tmp_path / "opt").mkdir()
    (tmp_path / "var/lib").mkdir(parents=True)
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    machine.add(package("bash"), package("libc6"))
    return machine


def install(machine: Machine, *, only: int = 99) -> None:
    """What the roles do, in their order; `only` cuts it off."""
    host = Host(machine.root, machine.run)
    # As /etc/nginx and what Docker's package brings.
    steps: list[Any] = [
        lambda: machine.write(
            "/opt/agent-stack/before.json", json.dumps(_uninstall.take_record(host, FOOTPRINT["replaces"], FOOTPRINT["merges"], "/opt/agent-stack"))
        ),
        lambda: machine.write("/etc/systemd/system/agent-stack.target"),
        lambda: machine.units.update({"agent-stack.target": "enabled", "agent-stack@redis.service": "enabled", "agent-stack-agent-retention.timer": "enabled"}),
        lambda: machine.add(package("docker.io", "containerd", "libc6")),
        lambda: machine.add(package("containerd"), automatic=True),
        lambda: machine.write("/etc/group", (machine.root / "etc/group").read_text() + "docker:x:998:\n"),
        lambda: machine.write("/etc/passwd", (machine.root / "etc/passwd").read_text() + "agent-stack-login:x:997:997::/nonexistent:/usr/sbin/nologin\n"),
        lambda: machine.write("/etc/docker/daemon.json", json.dumps(merged(machine))),
        lambda: machine.networks.extend(["agent-stack-data", "agent-stack-egress"]),
        lambda: machine.images.extend(["agent-stack/redis:1f", "redis:8.0.3-bookworm"]),
        lambda: machine.write("/opt/agent-stack/redis/compose.yml", "name: agent-stack-redis"),
        lambda: machine.containers.append(("c1", "agent-stack-redis", "agent-stack-redis-redis-1")),
        lambda: machine.write("/var/lib/agent-stack/postgres/base", "conversations"),
        lambda: machine.add(package("nginx"), package("certbot", "python3-requests"), package("curl"), package("python3-requests")),
        lambda: machine.write("/etc/nginx/agent-stack/htpasswd"),
        lambda: machine.write("/etc/letsencrypt/live/agent.example.com/fullchain.pem"),
        lambda: machine.write("/etc/letsencrypt/renewal/agent.example.com.conf"),
        lambda: machine.write("/etc/systemd/system/logrotate.timer.d/agent-stack.conf"),
        lambda: machine.write("/etc/logrotate.d/agent-stack"),
    ]
    for step in steps[:only]:
        step()


def merged(machine: Machine) -> dict[str, Any]:
    file = machine.root / "etc/docker/daemon.json"
    return {**(json.loads(file.read_text()) if file.exists() else {}), **OURS}


def files(machine: Machine) -> set[str]:
    return {path for path in machine.tree() if not (machine.root / path).is_dir()}


def test_a_host_becomes_what_it_was(machine: Machine) -> None:
    before, packages = files(machine), set(machine.packages)
    install(machine)
    removal = machine.remove(with_data=True)
    assert files(machine) == before
    assert (machine.root / "etc/group").read_text() == "root:x:0:\nusers:x:100:ada\n"
    assert set(machine.packages) == packages
    assert (machine.units, machine.containers, machine.networks) == ({}, [], [])
    assert not (machine.root / "etc/systemd/system/logrotate.timer.d").exists()
    assert removal.removed["packages"] == ["certbot", "containerd", "curl", "docker.io", "nginx", "python3-requests"]
    assert removal.removed["groups"] == ["docker"]
    assert (machine.root / "etc/passwd").read_text() == "root:x:0:0::/root:/bin/bash\n"
    assert removal.removed["users"] == ["agent-stack-login"]
    assert removal.kept == []


def test_a_second_time_changes_nothing(machine: Machine) -> None:
    install(machine)
    machine.remove(with_data=True)
    machine.did = []
    removal = machine.remove(with_data=True)
    assert (removal.removed, removal.kept, machine.did) == ({}, [], [])


@pytest.mark.parametrize("steps", range(19))
def test_half_a_stack_goes_too(machine: Machine, steps: int) -> None:
    before, packages = files(machine), set(machine.packages)
    install(machine, only=steps)
    machine.remove(with_data=True)
    assert (files(machine), set(machine.packages)) == (before, packages)
    assert machine.remove(with_data=True).removed == {}


def test_the_data_stays_and_goes_later_by_name(machine: Machine) -> None:
    install(machine)
    removal = machine.remove()
    assert (machine.root / "var/lib/agent-stack/postgres/base").read_text() == "conversations"
    assert (machine.root / "etc/letsencrypt/live/agent.example.com/fullchain.pem").exists()
    # Purging it would delete certificates.
    assert "remove certbot" in machine.did
    assert removal.kept == ["the data in /var/lib/agent-stack"]
    assert machine.remove().removed == {}
    later = machine.remove(with_data=True)
    assert later.removed == {
        "paths": [
            "/etc/letsencrypt/live/agent.example.com",
            "/etc/letsencrypt/renewal/agent.example.com.conf",
            "/etc/letsencrypt",
            "/var/lib/agent-stack",
        ],
        "packages": ["certbot"],
    }
    assert machine.remove(with_data=True).removed == {}


def test_a_dry_run_says_what_the_real_one_does(machine: Machine) -> None:
    install(machine)
    before = machine.tree()
    dry = machine.remove(dry=True, with_data=True)
    assert (machine.tree(), machine.did) == (before, [])
    real = machine.remove(with_data=True)
    assert (dry.removed, dry.kept) == (real.removed, real.kept)


def test_what_others_have_stays(machine: Machine) -> None:
    """An engine, images, files and packages from before, and a container, a site and a certificate that came later."""
    machine.add(package("docker.io"), package("logrotate"))
    machine.images.append("redis:8.0.3-bookworm")
    machine.write("/etc/docker/daemon.json", '{"labels": ["theirs"]}')
    machine.write("/etc/logrotate.d/nginx", "theirs")
    install(machine)
    machine.images.pop()
    machine.write("/etc/logrotate.d/nginx", "ours")
    machine.write("/etc/nginx/sites-enabled/own", "theirs")
    machine.write("/etc/letsencrypt/renewal/own.example.com.conf", "theirs")
    machine.containers.append(("c2", "", "theirs"))
    machine.images.append("theirs:1")
    removal = machine.remove(with_data=True)
    assert (machine.root / "etc/docker/daemon.json").read_text() == '{"labels": ["theirs"]}'
    assert (machine.root / "etc/logrotate.d/nginx").read_text() == "theirs"
    assert (machine.root / "etc/letsencrypt/renewal/own.example.com.conf").exists()
    assert not (machine.root / "etc/letsencrypt/renewal/agent.example.com.conf").exists()
    assert set(machine.packages) == {"bash", "libc6", "docker.io", "containerd", "logrotate", "nginx", "certbot", "python3-requests"}
    assert machine.images == ["redis:8.0.3-bookworm", "theirs:1"]
    assert removal.removed["images"] == ["agent-stack/redis:1f"]
    assert [each[2] for each in machine.containers] == ["theirs"]
    assert "systemctl try-restart docker.service" not in machine.did
    assert set(removal.kept) == {
        "the package nginx, because of /etc/nginx/sites-enabled/own",
        "the package certbot, because of /etc/letsencrypt/renewal/own.example.com.conf",
        "the running engine's options, until it starts again, because it has containers of others",
    }


def test_an_engine_that_others_use_stays(machine: Machine) -> None:
    install(machine)
    machine.volumes.append(("", "theirs"))
    removal = machine.remove()
    assert "docker.io" in machine.packages
    assert "the package docker.io, because of theirs" in removal.kept
    assert removal.removed["images"] == ["agent-stack/redis:1f", "redis:8.0.3-bookworm"]


def test_a_record_that_came_after_the_stack_claims_no_package(machine: Machine) -> None:
    """A host that an older version installed: its packages are in the record, and so is daemon.json as that version wrote it."""
    machine.write("/opt/agent-stack/redis/compose.yml")
    machine.add(package("nginx"))
    install(machine)
    removal = machine.remove()
    assert {"nginx", "docker.io"} <= set(machine.packages)
    assert removal.kept[0].startswith("all packages: an older version installed the stack")
    assert not (machine.root / "etc/docker/daemon.json").exists()


def test_packages_stay_if_asked(machine: Machine) -> None:
    install(machine)
    assert machine.remove(with_packages=False).kept[0] == "all packages, as asked"
    assert {"nginx", "docker.io"} <= set(machine.packages)


def test_without_an_engine_the_rest_goes(machine: Machine) -> None:
    install(machine, only=4)
    machine.engine = False
    assert "/opt/agent-stack" in machine.remove().removed["paths"]


@pytest.mark.parametrize(("root", "data"), [("/opt", "/var/lib/agent-stack"), ("/opt/agent-stack", "/var/lib"), ("/usr/local", "/var/lib/agent-stack")])
def test_a_directory_of_the_system_is_refused(machine: Machine, root: str, data: str) -> None:
    removal = Removal(Host(machine.root, machine.run), Wish(root, data, FOOTPRINT, with_data=True))
    with pytest.raises(UninstallError, match="belongs to the system; allowed is a directory of the stack alone"):
        removal.everything()
    assert machine.did == []


def test_a_record_that_is_broken_is_a_sentence(machine: Machine) -> None:
    install(machine)
    machine.write("/opt/agent-stack/before.json", "{")
    with pytest.raises(UninstallError, match=r"before\.json on the host is not JSON"):
        machine.remove()
    assert machine.did == []


def test_apt_that_would_take_more_is_stopped(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine)
    plain = machine.run

    def greedy(*command: str, **environment: str) -> tuple[int, str]:
        status, said = plain(*command, **environment)
        return status, said + "Remv theirs [1]\n" if "--simulate" in command else said

    monkeypatch.setattr(machine, "run", greedy)
    with pytest.raises(UninstallError, match="apt would also remove theirs, so no package was removed"):
        machine.remove()
    assert "nginx" in machine.packages
    # What was there before is still known, so that a repetition goes on.
    assert (machine.root / "opt/agent-stack/before.json").exists()
