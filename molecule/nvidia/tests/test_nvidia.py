"""The GPU path on a real host, with real apt, Docker, Compose and systemd. The driver and the toolkit are stand-ins; see molecule/nvidia.

They run in this order: each begins with what the one before left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
NAME = "agent-stack-nvidia"
GPUS = [f"GPU-00000000-0000-0000-0000-00000000000{index}" for index in range(2)]
DRIVER = {"FAKE_DRIVER": "580.159.04", "FAKE_CUDA": 13000, "FAKE_GPUS": 1}
PACKAGES = ["libnvidia-container-tools", "libnvidia-container1", "nvidia-container-toolkit", "nvidia-container-toolkit-base"]
PROBE = "docker run --rm --device nvidia.com/gpu=all --entrypoint nvidia-smi $(docker image ls --quiet agent-stack/haproxy) -L"
SERVER = "agent-stack-vllm-blue-server-1"
# `make test` runs these, `make test-all` the others.
QUICK = pytest.mark.quick
WATCHDOG_MEMORY = "/var/lib/agent-stack/vllm/watchdog.json"


def on_host(*command: str, stdin: str = "", check: bool = True) -> str:
    """Run a command on the host, return its output."""
    result = subprocess.run(["docker", "exec", "--interactive", NAME, *command], capture_output=True, text=True, input=stdin, check=False)
    if check and result.returncode != 0:
        raise AssertionError(f"`{' '.join(command)}` ended with {result.returncode}: {result.stderr or result.stdout}")
    return result.stdout.strip()


@dataclass(frozen=True)
class Play:
    returncode: int
    output: str

    @property
    def changed(self) -> int:
        return int(re.findall(r"changed=(\d+)", self.output)[-1])

    @property
    def words(self) -> str:
        return " ".join(self.output.split())


def play(*arguments: str, tags: str = "nvidia_toolkit", **variables: object) -> Play:
    """Apply the scenario's playbook, as a user does with a tag."""
    tools = Path(sys.executable).parent
    inventory = ROOT / "molecule" / "nvidia" / "inventory" / "hosts.yml"
    command = [str(tools / "ansible-playbook"), "molecule/nvidia/converge.yml", "-i", str(inventory), "-e", f"@{ROOT / '.cache' / 'machine.json'}"]
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0", "AGENT_STACK_CHECKOUT": str(ROOT)}
    environment["ANSIBLE_CONFIG"] = str(ROOT / "ansible.cfg")
    command += ["--tags", tags, "-e", json.dumps(variables), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return Play(result.returncode, result.stdout)


def driver(**changes: object) -> None:
    """Have the driver pretend something else."""
    on_host("sh", "-c", "cat > /var/lib/fake-nvidia/driver", stdin="".join(f"{name}={value}\n" for name, value in (DRIVER | changes).items()))


@pytest.fixture(scope="module", autouse=True)
def _watchdog_sleeps() -> Iterator[None]:
    """It would see what the tests do to the driver. The one about it wakes it."""
    on_host("systemctl", "stop", "agent-stack-vllm-watchdog.timer", "agent-stack-vllm-watchdog.service")
    yield
    on_host("systemctl", "start", "agent-stack-vllm-watchdog.timer")


@pytest.fixture
def _driver_again() -> Iterator[None]:
    yield
    on_host("sh", "-c", "for file in /usr/bin/nvidia-smi.away /usr/lib/*/libnvidia-ml.so.1.away; do [ ! -e $file ] || mv $file ${file%.away}; done")
    driver()


def seen_in_a_container() -> list[str]:
    """The GPUs that a container sees which is given all of them."""
    return re.findall(r"UUID: (GPU-\S+)\)", on_host("sh", "-c", PROBE))


def seen_in_the_server() -> list[str]:
    return re.findall(r"UUID: (GPU-\S+)\)", on_host("docker", "exec", SERVER, "nvidia-smi", "-L"))


def versions() -> set[str]:
    return set(on_host("dpkg-query", "--show", "--showformat", "${Version}\n", *PACKAGES).splitlines())


def processes() -> dict[str, str]:
    """The process of the engine and of each container."""
    containers = on_host("docker", "ps", "--quiet").split()
    found = dict(line.split() for line in on_host("docker", "inspect", "--format", "{{.Name}} {{.State.Pid}}", *containers).splitlines())
    return found | {"dockerd": on_host("systemctl", "show", "--property", "MainPID", "docker.service")}


def daemon_settings() -> dict[str, Any]:
    return dict(json.loads(on_host("cat", "/etc/docker/daemon.json")))


def server_id() -> str:
    return on_host("docker", "inspect", "--format", "{{.Id}}", SERVER)


def lose_the_gpu() -> None:
    """Refuse the driver's device to the processes of the running container, and to them alone, as happens to it after a reload."""
    on_host("docker", "exec", "--user", "0", SERVER, "chmod", "000", "/dev/nvidiactl")
    said = on_host("docker", "exec", SERVER, "nvidia-smi", "-L", check=False)
    assert said == "Failed to initialize NVML: Unknown Error"


def restarts_for_a_lost_gpu() -> int:
    text = on_host("cat", "/var/lib/agent-stack/textfile/vllm_watchdog.prom")
    return int(re.findall(r'restarts_total{reason="gpu_lost"} (\d+)', text)[0])


@QUICK
@pytest.mark.parametrize(("source", "python"), [("nvml", "/usr/local/bin/python3-with-nvml"), ("nvidia-smi", "/usr/bin/python3")])
def test_the_module_says_what_the_driver_says(host: Host, source: str, python: str) -> None:
    """NVML's real bindings load the library; without them nvidia-smi is asked."""
    answer = host.ansible("selfhosted.agent_stack.gpu_vram_info", check=False, extra_vars={"ansible_python_interpreter": python})
    assert (answer["state"], answer["source"], answer["reason"]) == ("present", source, "")
    assert (answer["driver_version"], answer["cuda_version"]) == ("580.159.04", "13.0")
    (gpu,) = answer["gpus"]
    assert (gpu["uuid"], gpu["name"], gpu["compute_capability"]) == (GPUS[0], "NVIDIA H100 80GB HBM3", "9.0")
    assert (gpu["total_mib"], gpu["free_mib"]) == (81559, 79190)


@QUICK
def test_a_container_sees_the_gpu() -> None:
    assert seen_in_a_container() == GPUS[:1]


@QUICK
def test_the_model_server_sees_the_gpu_through_compose() -> None:
    (request,) = json.loads(on_host("docker", "inspect", "--format", "{{json .HostConfig.DeviceRequests}}", SERVER))
    assert (request["Driver"], request["DeviceIDs"]) == ("cdi", ["nvidia.com/gpu=all"])
    assert seen_in_the_server() == GPUS[:1]


@QUICK
def test_the_packages_are_held_at_the_default_version() -> None:
    assert versions() == {"1.20.1-1"}
    assert "1.21.0-1" in on_host("apt-cache", "madison", "nvidia-container-toolkit")
    assert "nvidia" not in on_host("apt-get", "--simulate", "dist-upgrade")


@QUICK
def test_the_old_lists_are_gone() -> None:
    assert [name for name in on_host("ls", "/etc/apt/sources.list.d").split() if "nvidia" in name] == ["nvidia-container-toolkit.sources"]
    assert not re.search("^[EW]:", on_host("sh", "-c", "apt-get update 2>&1"), re.M)


@QUICK
def test_what_others_set_for_docker_is_kept() -> None:
    settings = daemon_settings()
    assert (settings["max-concurrent-downloads"], settings["default-runtime"]) == (7, "within-limits")
    assert settings["features"] == {"buildkit": True, "cdi": True}
    assert settings["live-restore"] is True
    assert {"nvidia", "within-limits"} <= set(json.loads(on_host("docker", "info", "--format", "{{json .Runtimes}}")))


@pytest.mark.usefixtures("_driver_again")
@pytest.mark.parametrize(
    ("changes", "away", "sentence"),
    [
        pytest.param(
            {"FAKE_DRIVER": "570.133.20", "FAKE_CUDA": 12080},
            [],
            "The host's NVIDIA driver 570.133.20 supports CUDA 12.8; vLLM's image needs CUDA 13.0.",
            id="too old",
        ),
        pytest.param(
            {},
            ["/usr/bin/nvidia-smi", "/usr/lib/*/libnvidia-ml.so.1"],
            "vllm_device is cuda, and the host has no GPU that works: the Python package nvidia-ml-py is not installed; there is no nvidia-smi on the PATH.",
            id="none",
        ),
        pytest.param({"FAKE_INIT": 18}, [], "no GPU that works: /usr/bin/nvidia-smi exited with 18: Failed to initialize NVML: Driver/library", id="broken"),
    ],
)
def test_a_driver_that_will_not_do_stops_the_play_before_its_first_change(changes: dict[str, object], away: list[str], sentence: str) -> None:
    driver(**changes)
    for pattern in away:
        on_host("sh", "-c", f"for file in {pattern}; do mv $file $file.away; done")
    done = play(tags="all")
    assert done.returncode == 2
    assert sentence in done.words, done.output
    assert done.changed == 0


@pytest.mark.usefixtures("_driver_again")
def test_a_driver_that_is_away_keeps_nobody_from_mending_the_rest() -> None:
    driver(FAKE_INIT=999)
    done = play(tags="docker")
    assert done.returncode == 0, done.output


def test_another_version_and_settings_that_were_lost() -> None:
    """An older version comes, Docker gets its settings back with one restart, and no container notices."""
    settings = daemon_settings()
    del settings["runtimes"]["nvidia"], settings["features"]["cdi"]
    on_host("sh", "-c", "cat > /etc/docker/daemon.json", stdin=json.dumps(settings))
    on_host("systemctl", "restart", "docker.service")
    time.sleep(1)
    before, started = processes(), on_host("date", "+%s")
    done = play(nvidia_toolkit_version="1.19.0-1")
    assert done.returncode == 0, done.output
    assert versions() == {"1.19.0-1"}
    settings["runtimes"]["nvidia"] = {"args": [], "path": "nvidia-container-runtime"}
    settings["features"]["cdi"] = True
    assert daemon_settings() == settings
    journal = on_host("journalctl", "--unit", "docker.service", "--since", f"@{started}", "--output", "cat")
    assert journal.count("Starting docker.service") == 1, journal
    after = processes()
    assert before.pop("dockerd") != after.pop("dockerd")
    assert before == after


def test_no_version_keeps_what_is_installed() -> None:
    done = play(nvidia_toolkit_version="")
    assert done.returncode == 0, done.output
    assert versions() == {"1.19.0-1"}
    assert "1.21.0-1" in on_host("apt-get", "--simulate", "dist-upgrade")


def test_another_gpu_is_described() -> None:
    """Also where the toolkit's own service has described the GPUs of before, in the place that has precedence."""
    on_host("sh", "-c", "mkdir -p /var/run/cdi && cp /etc/cdi/nvidia.yaml /var/run/cdi/nvidia.yaml")
    driver(FAKE_GPUS=2)
    assert seen_in_a_container() == GPUS[:1]
    done = play()
    assert done.returncode == 0, done.output
    assert seen_in_a_container() == GPUS
    assert versions() == {"1.20.1-1"}


def test_a_second_run_changes_nothing_and_restarts_nothing() -> None:
    before = processes()
    done = play()
    assert (done.returncode, done.changed) == (0, 0), done.output
    assert processes() == before


def test_another_driver_is_described() -> None:
    """What the description named is gone, and no container with a GPU would start."""
    library, new = "libnvidia-ml.so", "libnvidia-ml.so.590.44.01"
    on_host("sh", "-c", f"cd $(dirname /usr/lib/*/{library}.1) && mv {library}.580.159.04 {new} && ln -sf {new} {library}.1")
    driver(FAKE_DRIVER="590.44.01", FAKE_CUDA=13010, FAKE_GPUS=2)
    with pytest.raises(AssertionError, match=r"libnvidia-ml\.so\.580\.159\.04"):
        seen_in_a_container()
    done = play()
    assert done.returncode == 0, done.output
    assert seen_in_a_container() == GPUS


def test_the_watchdog_gives_a_lost_gpu_back() -> None:
    """Nobody starts it but its timer."""
    lost = server_id()
    count = restarts_for_a_lost_gpu()
    lose_the_gpu()
    on_host("systemctl", "start", "agent-stack-vllm-watchdog.timer")
    deadline = time.monotonic() + 60
    while restarts_for_a_lost_gpu() == count:
        assert time.monotonic() < deadline, on_host("journalctl", "--unit", "agent-stack-vllm-watchdog.service", "--lines", "20")
        time.sleep(0.5)
    on_host("systemctl", "stop", "agent-stack-vllm-watchdog.timer")
    # Ends when a look that is under way does.
    on_host("systemctl", "start", "agent-stack-vllm-watchdog.service")
    assert server_id() != lost
    assert seen_in_the_server() == seen_in_a_container()
    assert restarts_for_a_lost_gpu() == count + 1


def test_a_play_gives_a_lost_gpu_back_at_once() -> None:
    lost = server_id()
    lose_the_gpu()
    done = play()
    assert (done.returncode, done.changed) == (0, 1), done.output
    assert server_id() != lost
    assert seen_in_the_server() == seen_in_a_container()


def test_a_gpu_that_does_not_come_back_is_told() -> None:
    """The watchdog has made the server again so often within an hour that it does so no more."""
    kept = json.loads(on_host("cat", WATCHDOG_MEMORY))
    on_host("sh", "-c", f"cat > {WATCHDOG_MEMORY}", stdin=json.dumps(kept | {"restarts": [time.time()] * 3}))
    lose_the_gpu()
    done = play()
    assert done.returncode == 2
    assert f"The container {SERVER} lost its GPU, and the watchdog did not give it back: Failed to initialize NVML" in done.words, done.output
    on_host("sh", "-c", f"cat > {WATCHDOG_MEMORY}", stdin=json.dumps(kept | {"restarts": []}))
    on_host("systemctl", "start", "agent-stack-vllm-watchdog.service")
    assert seen_in_the_server() == seen_in_a_container()
