"""What the roles put on a host outside of the stack's own directories is declared, so that uninstalling removes it.

The tasks of every role are read. A path, package, unit, group or user that no meta/component.yml declares fails here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _docker_found
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _components
from programs import ROOT

ROLES = ROOT / "roles"
FOOTPRINT = _components.footprint(_components.load(ROLES).values(), "DOMAIN")
# Where a task's paths are, by the module's last name. Modules without an entry here or in HARMLESS fail, so that a new one is looked at.
PATHS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("copy", "template", "get_url", "unarchive"), ("dest",)),
    **dict.fromkeys(("file", "lineinfile", "openssl_privatekey", "x509_certificate", "host_record", "replace"), ("path",)),
}
HARMLESS = {
    # Ask, decide, or are looked at by name below.
    *("assert", "debug", "fail", "set_fact", "meta", "stat", "find", "slurp", "uri", "package_facts", "async_status", "directory_digest"),
    *("import_tasks", "include_tasks", "import_role", "include_role", "command", "shell", "fetch", "x509_certificate_info", "get_certificate"),
    *("openssl_csr_pipe", "gpu_vram_info", "vllm_health", "vllm_plan", "postgresql_query", "apt", "systemd_service", "deb822_repository"),
    # Below the stack's own directories, or on the controller.
    *("vllm_swap", "docker_compose_v2", "docker_network", "postgresql_user", "postgresql_db", "postgresql_membership", "api_key_file", "generated_secrets"),
    *("rotated_secrets", "file_tree", "uninstall", "clean"),
    # Read what is there.
    *("server_check", "wait_for_connection"),
    # Checked by its name below.
    "user",
}


def tasks(found: Any) -> Iterator[dict[str, Any]]:
    for task in found or []:
        if "block" in task:
            inner = [*task["block"], *task.get("rescue", []), *task.get("always", [])]
            yield from tasks([{**each, "vars": {**task.get("vars", {}), **each.get("vars", {})}} for each in inner])
        else:
            yield task


@cache
def variables(role: Path) -> dict[str, Any]:
    values: dict[str, Any] = {"agent_stack_root": "ROOT", "agent_stack_data_dir": "DATA", "agent_stack_domain": "DOMAIN"}
    for name in ("defaults", "vars"):
        file = role / name / "main.yml"
        values |= (yaml.safe_load(file.read_text().replace("!unsafe", "")) or {}) if file.exists() else {}
    # plugins/plugin_utils/_vllm_service.py computes it: a directory below the one of caches.
    return values | {"agent_stack_root": "ROOT", "agent_stack_data_dir": "DATA", "__vllm_service": {"cache": "DATA/vllm-cache/KEY"}}


def rendered(text: str, values: dict[str, Any]) -> str:
    """Fill in what is known; everything else may be anything."""
    for _ in range(6):
        text = re.sub(r"\{\{ *(\w+(?:\.\w+)?) *\}\}", lambda match: known(match[1], values), text)
        text = re.sub(r"\{\{ *(\w+\.\w+) \| dirname *\}\}", lambda match: str(Path(known(match[1], values)).parent), text)
    return re.sub(r"\{\{.*?\}\}", "*", text).strip()


def known(name: str, values: dict[str, Any]) -> str:
    first, _, rest = name.partition(".")
    value = values.get(first)
    value = value.get(rest) if rest and isinstance(value, dict) else value
    return value.strip() if isinstance(value, str) else "*"


def each(task: dict[str, Any], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The loop's items, where they are written down: in the task, or in a variable of the role."""
    loop = task.get("loop")
    if isinstance(loop, str) and (variable := re.match(r"\{\{ *(\w+)", loop)):
        loop = values.get(variable[1])
    items = loop if isinstance(loop, list) and loop else [None]
    for item in items:
        yield {"item": item} if item is not None else {}


def module_of(task: dict[str, Any]) -> str:
    (name,) = (key for key in task if "." in key)
    return name.rpartition(".")[2]


def arguments_of(task: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in task.items() if key.rpartition(".")[2] == module_of(task)) or {}


@cache
def all_tasks() -> list[tuple[Path, Path, dict[str, Any]]]:
    found = []
    for role in sorted(ROLES.iterdir()):
        for file in sorted([*role.glob("tasks/*.yml"), *role.glob("handlers/*.yml")]):
            found += [(role, file, task) for task in tasks(yaml.safe_load(file.read_text()))]
    return found


@cache
def written() -> list[tuple[str, str]]:
    """Every path that a task may create, and where that is said."""
    return sorted(set(_written()))


def _written() -> Iterator[tuple[str, str]]:
    for role, file, task in all_tasks():
        module, arguments, where = module_of(task), arguments_of(task), f"{file.relative_to(ROOT)}: {task.get('name')}"
        if task.get("delegate_to") == "localhost":
            continue
        values = variables(role) | task.get("vars", {})
        for item in each(task, values):
            if module in PATHS and arguments.get("state") != "absent":
                yield from ((rendered(arguments[key], values | item), where) for key in PATHS[module])
            if module == "file_tree":
                for kind in ("directories", "files"):
                    entries = arguments.get(kind, [])
                    if isinstance(entries, list):
                        yield from ((rendered(entry["path"], values | item), where) for entry in entries)
            if module in ("import_role", "include_role", "import_tasks") and "agent_stack_units" in task.get("vars", {}):
                yield from ((rendered(entry["path"], values), where) for entry in task["vars"]["agent_stack_units"])
            if module == "deb822_repository":
                yield f"/etc/apt/sources.list.d/{arguments['name']}.sources", where
                yield f"/etc/apt/keyrings/{arguments['name']}.asc", where
    for name, component in _components.load(ROLES).items():
        declared = _components.declaration(component, "ROOT", "DATA")
        for entry in [*declared["directories"], *itertools.chain(*declared["optional_directories"].values())]:
            yield entry["path"], f"roles/{name}/meta/component.yml"


def removed(path: str) -> bool:
    if path.startswith(("ROOT", "DATA")):
        return True
    # A directory that is only asked to exist may be the system's own; one that a declared file is in is removed with it or when it is empty.
    declared = [*FOOTPRINT["paths"], *FOOTPRINT["replaces"], *FOOTPRINT["merges"]]
    return any(fnmatchcase(path, pattern.rstrip("/")) or path.startswith(pattern.rstrip("/") + "/") for pattern in declared)


def test_every_module_is_known() -> None:
    assert {module_of(task) for _, _, task in all_tasks()} <= PATHS.keys() | HARMLESS


def test_the_reader_sees_what_is_there() -> None:
    """One of each kind: otherwise a reader that sees nothing would pass everything."""
    paths = {path for path, _ in written()}
    assert paths >= {
        *("/etc/docker/daemon.json", "/etc/logrotate.d/nginx", "/etc/nginx/agent-stack/login.py", "ROOT/vllm/watchdog/watchdog.py"),
        *("/etc/systemd/system/agent-stack-agent-retention.timer", "/etc/systemd/system/agent-stack@.service", "/etc/apt/keyrings/agent-stack-docker.asc"),
        *("/usr/local/share/ca-certificates/agent-stack-*.crt", "/etc/apt/keyrings/nvidia-container-toolkit-*.asc", "DATA/postgres", "DATA/grafana"),
        *("/var/www/agent-stack-acme", "/etc/systemd/system/certbot.service.d/agent-stack.conf", "/etc/cdi/nvidia.yaml"),
    }


# Directories of the system, which a role makes sure of before it writes into them; Debian's packages have them.
SYSTEM = {"/etc/apt/apt.conf.d", "/etc/apt/keyrings", "/etc/sysctl.d", "/etc/letsencrypt/renewal-hooks/deploy"}


@pytest.mark.parametrize(("path", "where"), written())
def test_every_path_is_removed(path: str, where: str) -> None:
    assert removed(path) or path in SYSTEM, f"{where}: no meta/component.yml declares {path}"


def test_a_path_that_nobody_declares_is_found() -> None:
    assert not removed("/etc/cron.d/agent-stack")
    assert not removed("/etc/nginx/other")


def words(value: Any, values: dict[str, Any]) -> set[str]:
    """The package names in an argument or an expression, with what its variables say."""
    if isinstance(value, (list, dict)):
        return set().union(*(words(each, values) for each in (value.values() if isinstance(value, dict) else value)), set())
    text = str(value)
    if "{{" not in text:
        return {text}
    text = re.sub(r"\b(?:if|when) .*?(?= else |\}\}|$)", "", text, flags=re.S)
    found = set(re.findall(r"'([a-z0-9][a-z0-9.+-]{2,})'", text))
    for name in re.findall(r"\b(_?_?\w+)\b", text):
        if name in values and values[name] != value:
            found |= words(values[name], values)
    return found


def test_every_package_is_declared() -> None:
    asked: set[str] = set()
    for role, _, task in all_tasks():
        if module_of(task) == "apt" and "__docker_found" not in str(arguments_of(task).get("name", "__docker_found")):
            asked |= words(arguments_of(task)["name"], variables(role))
    # Words of the expressions that are no packages.
    asked -= {"acme", "distribution", "regex_replace"}
    # What is missing of Docker is chosen when the host was looked at.
    for catalogue in (*_docker_found.DISTRIBUTION_PACKAGES.values(), _docker_found.VENDOR_PACKAGES):
        asked |= set(itertools.chain(*catalogue.values()))
    asked.add("python3-requests")
    assert asked >= {"nginx", "certbot", "docker.io", "docker-ce", "nvidia-container-toolkit", "python3-psycopg2", "mmdebstrap"}
    # What apt is asked for by Ansible itself and not by a task, and what an earlier version asked for.
    assert asked == FOOTPRINT["packages"].keys() - {"apache2-utils", "python3-apt", "python3-debian"}


def test_users_that_roles_make_are_declared() -> None:
    made = {arguments_of(task)["name"] for _, _, task in all_tasks() if module_of(task) == "user"}
    assert made == set(FOOTPRINT["users"])
    assert all(name.startswith("agent-stack-") for name in made)


def test_no_role_makes_groups_or_writes_into_files_of_others_by_itself() -> None:
    assert {module_of(task) for _, _, task in all_tasks()} & {"group", "cron", "sysctl", "blockinfile", "mount"} == set()


def test_units_have_the_name_that_is_looked_for() -> None:
    for path, where in written():
        if path.startswith("/etc/systemd/system/") and not path.split("/")[4].endswith(".d"):
            assert path.split("/")[4].startswith("agent-stack"), where


def test_what_is_declared_is_written_by_something() -> None:
    """A declaration that outlives its task could remove what is not ours."""
    paths = {path for path, _ in written()}
    made = {
        # By systemd, apt's plug-in for keys, Docker's merge with a backup, certbot, and the agent's log rotation.
        *("/etc/systemd/system/*.wants/agent-stack*", "/etc/systemd/system/agent-stack.target.wants/", "/var/lib/systemd/timers/stamp-agent-stack*"),
        *("/etc/docker/daemon.json.*~", "/var/log/agent-stack"),
        # By an earlier version.
        "/etc/nginx/nginx.conf.before-agent-stack",
    }
    for pattern in FOOTPRINT["paths"]:
        plain = pattern.rstrip("/")
        assert pattern in made or any(fnmatchcase(path, plain) or path.startswith(plain + "/") for path in paths), pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("packages: [nginx]", r"packages is \['nginx'\]; allowed is a mapping"),
        ("packages: {nginx: {purge: true}}", r"packages has nginx: \{'purge': True\}; allowed is a mapping of any of leaves, data, in_use"),
        ("packages: {nginx: yes}", "packages has nginx: True; allowed is a mapping of any of"),
        ("paths: /etc/x", "paths is '/etc/x'; allowed is a list"),
        ("replaces: [/etc/x]", r"replaces is \['/etc/x'\]; allowed is a mapping"),
    ],
)
def test_a_bad_declaration_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "one" / "meta").mkdir(parents=True)
    (tmp_path / "one" / "meta" / "component.yml").write_text(text)
    with pytest.raises(_components.ComponentError, match=message):
        _components.load(tmp_path)


def test_what_two_roles_need_is_one_declaration() -> None:
    one = _components.Component("one", packages={"a": {"in_use": "containers"}}, merges={"/f": ["x"]}, networks=["data"])
    two = _components.Component("two", packages={"a": {"data": ["/d"]}}, merges={"/f": ["y.z"]}, networks=["data", "edge"], data_paths=["/e/{domain}"])
    found = _components.footprint([one, two], "agent.example.com")
    assert found["packages"] == {"a": {"in_use": "containers", "data": ["/d"]}}
    assert (found["merges"], found["networks"], found["data_paths"]) == ({"/f": ["x", "y.z"]}, ["data", "edge"], ["/e/agent.example.com"])
