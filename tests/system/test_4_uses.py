"""The other ways to use the collection: installed, for a GPU, and without network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT, Play

TOOLS = Path(sys.executable).parent


def tool(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    result = subprocess.run([str(TOOLS / command[0]), *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty project with the collection installed from its archive."""
    project = tmp_path_factory.mktemp("project")
    tool("ansible-galaxy", "collection", "build", "--output-path", str(project), str(ROOT), cwd=project)
    (archive,) = project.glob("selfhosted-agent_stack-*.tar.gz")
    tool("ansible-galaxy", "collection", "install", "--no-deps", "--collections-path", "collections", str(archive), cwd=project)
    return project


def test_installed_collection_has_what_a_user_needs_and_no_more(installed: Path) -> None:
    collection = installed / "collections" / "ansible_collections" / "selfhosted" / "agent_stack"
    assert {"roles", "plugins", "playbooks", "files", "inventories", "README.md", "LICENSE", "CHANGELOG.md"} <= {path.name for path in collection.iterdir()}
    assert not {"molecule", ".venv", ".git", ".cache"} & {path.name for path in collection.iterdir()}
    # What Automation Hub's sanity reads, and no test.
    assert {path.name for path in (collection / "tests").iterdir()} == {"config.yml", "sanity"}
    assert not list(collection.rglob("secrets.yml")) or all("tasks" in path.parts for path in collection.rglob("secrets.yml"))


@pytest.mark.long
def test_installed_collection_finds_nothing_to_change(installed: Path, play: Callable[..., Play]) -> None:
    result = play(playbook="selfhosted.agent_stack.site", cwd=installed, collections=installed / "collections")
    assert result.returncode == 0, result.output[-3000:]
    assert result.recap["changed"] == 0, result.output[-6000:]


def test_documentation_of_the_installed_collection_renders(installed: Path) -> None:
    for name in ("api_key_file", "directory_digest", "file_tree", "generated_secrets", "gpu_vram_info", "vllm_health", "vllm_plan", "vllm_swap"):
        text = tool("ansible-doc", "--playbook-dir", str(installed), "--type", "module", f"selfhosted.agent_stack.{name}", cwd=installed)
        assert name in text


SERVER = "__vllm_service.definition | to_json"
COMPOSE = f"lookup('ansible.builtin.template', '{ROOT}/roles/vllm/templates/compose.yml.j2')"


def render_vllm(tmp_path: Path, expression: str, **variables: object) -> str:
    """Evaluate an expression of the vllm role on the controller."""
    playbook = tmp_path / "render.yml"
    target = tmp_path / "rendered.yml"
    role = ROOT / "roles" / "vllm"
    tasks: list[dict[str, Any]] = [{"ansible.builtin.copy": {"content": f"{{{{ {expression} }}}}", "dest": str(target), "mode": "0600"}}]
    files = [ROOT / "roles" / name / kind / "main.yml" for name in ("agent_stack", "vllm") for kind in ("defaults", "vars")]
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars_files": [str(file) for file in files], "tasks": tasks}
    playbook.write_text(yaml.safe_dump([play]))
    given = {"__vllm_plan": {}, "agent_stack_component_revision": "0", "role_path": str(role), "ansible_python_interpreter": sys.executable, **variables}
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    command = [str(TOOLS / "ansible-playbook"), "-i", "localhost,", str(playbook), "-e", json.dumps(given)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return target.read_text()


def server_of(text: str, on_host: Callable[..., str]) -> dict[str, Any]:
    """The service as the host's own Compose understands it, in a project such as the swap writes."""
    config = json.loads(
        on_host(
            "docker",
            "compose",
            "--file",
            "-",
            "config",
            "--format",
            "json",
            stdin=json.dumps({"name": "rendered", "services": {"server": yaml.safe_load(text)}}),
        )
    )
    service: dict[str, Any] = config["services"]["server"]
    return service


def test_cuda_reserves_the_gpus(tmp_path: Path, on_host: Callable[..., str]) -> None:
    values = {"vllm_device": "cuda", "vllm_model": "Qwen/Qwen2.5-7B-Instruct", "vllm_tensor_parallel_size": 2, "agent_stack_image_source": "registry"}
    server = server_of(render_vllm(tmp_path, SERVER, **values), on_host)
    assert server["deploy"]["resources"]["reservations"]["devices"] == [{"driver": "cdi", "device_ids": ["nvidia.com/gpu=all"], "capabilities": ["gpu"]}]
    assert server["image"].startswith("docker.io/vllm/vllm-openai:v")
    command = server["command"]
    assert command[0] == "/models/Qwen--Qwen2.5-7B-Instruct--main"
    assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert "--enforce-eager" not in command
    # On a GPU two models share it by taking turns asleep, unless that is switched off.
    assert "--enable-sleep-mode" in command
    assert server["environment"]["VLLM_SERVER_DEV_MODE"] == "1"
    awake = server_of(render_vllm(tmp_path, SERVER, **values, vllm_sleep_mode=False), on_host)
    assert "--enable-sleep-mode" not in awake["command"]
    assert "VLLM_SERVER_DEV_MODE" not in awake["environment"]
    text = render_vllm(tmp_path, COMPOSE, **values)
    config = json.loads(on_host("docker", "compose", "--file", "-", "--profile", "prepare", "config", "--format", "json", stdin=text))
    assert config["services"]["fetch"]["entrypoint"][-2:] == ["--hub", "Qwen/Qwen2.5-7B-Instruct"]


def test_a_plan_makes_one_client_faster_where_that_is_wanted(tmp_path: Path, on_host: Callable[..., str]) -> None:
    values = {"vllm_device": "cuda", "vllm_model": "Qwen/Qwen2.5-7B-Instruct", "agent_stack_image_source": "registry"}
    plan = {"model_arguments": [], "faster": {"arguments": ["--linear-backend", "humming"], "environment": {"HUMMING_CACHE_DIR": "/cache/humming"}}}
    asked = server_of(render_vllm(tmp_path, SERVER, **values, __vllm_plan=plan, vllm_optimize_for="latency"), on_host)
    assert asked["environment"]["HUMMING_CACHE_DIR"] == "/cache/humming"
    place = asked["command"].index("--linear-backend")
    assert asked["command"][place + 1] == "humming"
    as_it_comes = server_of(render_vllm(tmp_path, SERVER, **values, __vllm_plan=plan), on_host)
    assert "HUMMING_CACHE_DIR" not in as_it_comes["environment"]
    assert "--linear-backend" not in as_it_comes["command"]


def test_cpu_reserves_none(tmp_path: Path, on_host: Callable[..., str]) -> None:
    server = server_of(render_vllm(tmp_path, SERVER, vllm_device="cpu", vllm_model="/srv/model", agent_stack_image_source="build"), on_host)
    assert "deploy" not in server
    assert "--enable-sleep-mode" not in server["command"]


def test_images_from_archives(play: Callable[..., Play], on_host: Callable[..., str], tmp_path: Path) -> None:
    """From a file, and back to the one that is built: made again as it was, from cached layers and within seconds, although it was gone."""
    container = "agent-stack-redis-redis-1"
    built, name = on_host("docker", "inspect", "--format", "{{.Image}} {{.Config.Image}}", container).split()
    archive = ("-e", json.dumps({"agent_stack_image_archive_dir": str(tmp_path)}))
    saved = play("-e", json.dumps({"agent_stack_save_images": ["redis"]}), *archive, playbook="playbooks/save_images.yml")
    assert saved.returncode == 0, saved.output[-3000:]
    assert (tmp_path / "SHA256SUMS").read_text().endswith("  redis.tar\n")
    try:
        loaded = play("--tags", "redis", "-e", "agent_stack_image_source=archive", *archive)
        assert loaded.returncode == 0, loaded.output[-3000:]
        image = on_host("docker", "inspect", "--format", "{{.Config.Image}}", container)
        assert image == f"agent-stack/redis:{(tmp_path / 'SHA256SUMS').read_text()[:12]}"
        assert play("--tags", "redis", "-e", "agent_stack_image_source=archive", *archive).recap["changed"] == 0
        on_host("docker", "image", "rm", name)
    finally:
        back = play("--tags", "redis")
    assert back.returncode == 0, back.output[-3000:]
    assert f"Build {name}" in back.output
    assert on_host("docker", "inspect", "--format", "{{.Image}}", container) == built
    print(f"redis's image built again from cached layers: {back.seconds:.0f} s with the rest of the play")
    assert back.seconds < 60


def test_archive_with_a_wrong_checksum_is_refused(play: Callable[..., Play], tmp_path: Path) -> None:
    (tmp_path / "redis.tar").write_text("not an image")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  redis.tar\n")
    values = {"agent_stack_image_source": "archive", "agent_stack_image_archive_dir": str(tmp_path)}
    result = play("--tags", "redis", "-e", json.dumps(values))
    assert result.returncode != 0
    assert "Compare its checksum with SHA256SUMS" in result.output
    assert play("--tags", "redis").recap["changed"] == 0
