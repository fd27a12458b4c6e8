"""What components declare, and that a new one is a role with its declaration: images, secrets, checks and metrics follow without another edit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _components, _vllm_service
from programs import ROOT

ROLES = ROOT / "roles"
EXAMPLE = Path(__file__).parent / "data" / "component" / "vectors"
# The role's own tasks, in check mode: what would be written is in the output.
DRY_PLAYBOOK = """
- hosts: example
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: selfhosted.agent_stack.vectors}
"""
PLAYBOOK = """
- hosts: all
  gather_facts: true
  gather_subset: [min]
  tasks:
    - ansible.builtin.include_role: {name: selfhosted.agent_stack.agent_stack, tasks_from: secrets, public: true}
      vars: {__agent_stack_secrets_state: present}
    - ansible.builtin.include_role: {name: selfhosted.agent_stack.agent_stack, tasks_from: check_all, public: true}
    - ansible.builtin.include_role: {name: selfhosted.agent_stack.monitoring, tasks_from: check, public: true}
    - ansible.builtin.copy:
        dest: "{{ playbook_dir }}/found.yml"
        content: "{{ found | to_nice_yaml }}"
        mode: "0600"
      vars:
        found:
          jobs: "{{ __monitoring_jobs }}"
          own_jobs: "{{ __monitoring_component.metrics | map(attribute='job') }}"
          monitoring_images: "{{ __monitoring_images }}"
          image: "{{ lookup('selfhosted.agent_stack.image', 'vectors') }}"
          saved: "{{ agent_stack_save_images }}"
          directories: "{{ lookup('selfhosted.agent_stack.component', 'vectors').directories }}"
          secrets: "{{ agent_stack_secrets.keys() | sort }}"
"""
VARIABLES: dict[str, Any] = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "agent_stack_domain": "agent.example.com",
    "agent_stack_email": "ops@example.com",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a collection that has the example among its roles."""
    directory = tmp_path_factory.mktemp("example")
    collection = directory / "ansible_collections" / "selfhosted" / "agent_stack"
    for part in ("plugins", "meta", "roles/agent_stack", "roles/monitoring"):
        shutil.copytree(ROOT / part, collection / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(EXAMPLE, collection / "roles" / "vectors")
    hosts = {"example": {}, "collides": {"vectors_port": 9091, "monitoring_prometheus_port": 9091}, "refused": {"vectors_port": 80}}
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": VARIABLES}}))
    # Compose itself is asked on a host only: the engine's program agrees to every project.
    (directory / "bin").mkdir()
    (directory / "bin" / "docker").write_text("#!/bin/sh\n")
    (directory / "bin" / "docker").chmod(0o755)
    return directory


def play(directory: Path, text: str, *arguments: str) -> str:
    """Run a play there, and return what it said, in one line."""
    (directory / "play.yml").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    environment |= {"ANSIBLE_COLLECTIONS_PATH": str(directory), "ANSIBLE_NOCOLOR": "1", "PATH": path}
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml", *arguments]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return " ".join((result.stdout + result.stderr).split())


@pytest.fixture(scope="module")
def played(installed: Path) -> tuple[str, dict[str, Any]]:
    """What a play over the collection's own entry points said, and what it found."""
    output = play(installed, PLAYBOOK)
    assert (installed / "found.yml").exists(), output
    return output, yaml.safe_load((installed / "found.yml").read_text())


def test_a_role_with_its_declaration_is_a_component(played: tuple[str, dict[str, Any]]) -> None:
    _, found = played
    assert found["image"] == "registry.example.com/vectors:1.2"
    assert found["secrets"] == ["monitoring_grafana_password", "vectors_password"]
    assert found["jobs"] == [*found["own_jobs"], "vectors", "probe"]
    assert found["saved"] == ["alertmanager", "blackbox-exporter", "node-exporter", "postgres-exporter", "prometheus", "redis-exporter", "vectors"]
    assert found["directories"] == [
        {"path": "/opt/agent-stack/vectors/config"},
        {"path": "/var/lib/agent-stack/vectors", "owner": "1000", "mode": "0700"},
    ]


def test_another_components_image_is_not_the_monitorings(played: tuple[str, dict[str, Any]]) -> None:
    assert sorted(played[1]["monitoring_images"]) == [
        "alertmanager",
        "blackbox-exporter",
        "grafana",
        "node-exporter",
        "postgres-exporter",
        "prometheus",
        "redis-exporter",
    ]


def test_its_inputs_are_checked_before_the_first_change(played: tuple[str, dict[str, Any]]) -> None:
    assert "vectors_port is 80; allowed is 1024 to 65535." in played[0]


def test_no_two_components_listen_on_one_port(played: tuple[str, dict[str, Any]]) -> None:
    assert "allowed are different ports on the host's loopback address" in played[0]


def test_its_project_and_units_are_written_with_the_shared_templates(installed: Path) -> None:
    """As the role's tasks find them, from another role's: the search path for templates is Ansible's own here."""
    output = play(installed, DRY_PLAYBOOK, "--check", "--diff")
    assert "failed=0" in output, output
    for line in (
        *(
            "image: registry.example.com/vectors:1.2",
            'networks: ["data", "monitor"]',
            "+ read_only: true",
            '+ tmpfs: ["/tmp:size=64m"]',
            "+ cap_drop: [ALL]",
            "+ ulimits: {nofile: 16384}",
            "+ mem_limit: 512m",
        ),
        *("name: agent-stack-monitor", "+ProtectSystem=strict", "+RestrictAddressFamilies=AF_UNIX", "+OnCalendar=daily"),
    ):
        assert line in output, output


def declare(directory: Path, **components: str) -> Path:
    for name, text in components.items():
        (directory / name / "meta").mkdir(parents=True)
        (directory / name / "meta" / "component.yml").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image: {}", r"one/meta/component.yml has image; allowed are images, base_images, secrets,"),
        ("[1]", r"component.yml has \[1\]; allowed are"),
        ("secrets: {a: b}", r"secrets is \{'a': 'b'\}; allowed is a list"),
        ("images: [redis]", r"images is \['redis'\]; allowed is a mapping"),
        ("uid: root", r"uid is 'root'; allowed is a number"),
        ("ports: {one_port: world}", r"the port one_port is reached by 'world'; allowed is one of loopback, peers, all"),
        ("metrics: [{job: one}]", r"metrics has \{'job': 'one'\}; allowed are job and target"),
        ("metrics: [{job: one, target: a, path: b}]", r"allowed are job and target, and per_host if wanted"),
    ],
)
def test_a_bad_declaration_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(_components.ComponentError, match=message):
        _components.load(declare(tmp_path, one=text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uid: 1000", "two and one both have the uid 1000; allowed is one of its own for each."),
        ("uids: {a: 1, b: 1000}", "two/b and one both have the uid 1000"),
        ("uids: {a: 7, b: 7}", "two/b and two/a both have the uid 7"),
        ("uid: 65534", "two has the uid 65534; allowed is a number from 1 to 65533."),
        ("uids: {a: 0}", "two/a has the uid 0; allowed is"),
        ("uids: {a: root}", "two/a has the uid 'root'; allowed is"),
        ("uid: -1", "two has the uid -1; allowed is"),
    ],
)
def test_every_service_has_a_user_of_its_own(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(_components.ComponentError, match=message):
        _components.load(declare(tmp_path, one="uid: 1000", two=text))


def test_the_users_of_the_stack_are_those_that_its_projects_and_images_have() -> None:
    components = _components.load(ROLES)
    owners = _components.users(components.values())
    assert set(owners.values()) >= {"agent", "postgres", "redis", "vllm/gateway", "vllm/server", "monitoring/prometheus", "monitoring/node-exporter"}
    assert components["vllm"].uids["server"] == _vllm_service.UID == yaml.safe_load((ROLES / "vllm" / "vars" / "main.yml").read_text())["__vllm_uid"]
    assert f'user: "{components["vllm"].uids["gateway"]}:' in (ROLES / "vllm" / "templates" / "compose.yml.j2").read_text()
    built = {name: component for name, component in components.items() if component.uid and component.images.get(name, {}).get("context")}
    assert set(built) >= {"agent", "redis", "postgres"}
    for name, component in built.items():
        assert f"USER {component.uid}:{component.uid}\n" in (ROOT / component.images[name]["context"] / "Dockerfile").read_text(), name


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "data" / "rendered").glob("defaults-*.json")), ids=lambda path: path.stem)
def test_no_two_services_of_a_project_run_as_one_user(path: Path) -> None:
    """But for the one-shot steps of a service, which do its work on its own files."""
    services = {name: service for name, service in json.loads(path.read_text()).get("services", {}).items() if not service.get("profiles")}
    users = [service["user"].partition(":")[0] for service in services.values()]
    assert len(set(users)) == len(users)
    assert not {"0", "65534", "root", "nobody"} & set(users)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("images", "images: {redis: {context: x}}"),
        ("secrets", "secrets: [redis]"),
        ("ports", "ports: {redis: loopback}"),
        ("base_images", "base_images: {redis: x}"),
    ],
)
def test_what_two_declare_is_a_sentence(tmp_path: Path, kind: str, text: str) -> None:
    with pytest.raises(_components.ComponentError, match=f"two and one both declare redis among their {kind}"):
        _components.load(declare(tmp_path, one=text, two=text))


def test_an_empty_declaration_is_one(tmp_path: Path) -> None:
    assert _components.load(declare(tmp_path, one="---\n", two="{}")) == {name: _components.Component(name) for name in ("one", "two")}


@pytest.mark.parametrize(
    ("serving", "targets"),
    [(["front"], ["gateway:8001"]), (["a", "front", "b"], ["gateway:8001", "a", "b"]), (["a", "b"], ["a", "b"]), ([], [])],
)
def test_every_host_that_serves_is_scraped_through_the_own_gateway(serving: list[str], targets: list[str]) -> None:
    component = _components.Component("vllm", metrics=[{"job": "vllm", "target": "gateway:8001", "per_host": True}])
    (config,) = _components.scrape_configs([component], "front", serving)
    assert config["static_configs"] == [{"targets": targets}]
    assert {rule["replacement"] for rule in config["relabel_configs"] if "replacement" in rule} == {"front", "/hosts/$1/metrics", "gateway:8001"}


def test_what_the_roles_declare_is_there() -> None:
    """Every network is one that the role docker makes, every port a variable of its role, and every context a directory."""
    networks = {network["name"] for network in yaml.safe_load((ROLES / "docker" / "vars" / "main.yml").read_text())["__docker_networks"]}
    for name, component in _components.load(ROLES).items():
        file = ROLES / name / "defaults" / "main.yml"
        variables = yaml.safe_load(file.read_text()) if file.exists() else {}
        assert set(component.networks) <= networks, name
        assert {port for port in component.ports if isinstance(port, str)} <= set(variables), name
        assert {secret for secret in component.secrets if f"agent_stack_secrets.{secret} " not in str(variables)} == set(), name
        for image in component.images.values():
            assert image.keys() <= {"reference", "context", "base", "wheels"}
            assert "context" not in image or (
                (ROOT / image["context"] / "Dockerfile").exists() and image["base"] in _components.load(ROLES)["agent_stack"].base_images
            )
