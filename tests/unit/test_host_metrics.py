"""What the host's own metrics say of containers, units, GPUs and swaps: over recorded answers of the programs that are asked."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import promql
import pytest
from programs import load

host_metrics = load("roles/monitoring/files/host_metrics.py")
GPU = Path(__file__).parent / "data" / "nvidia_smi_full.xml"
GPU_LABELS = {"gpu": "GPU-00000000-0000-0000-0000-000000000000", "model": "NVIDIA L4"}


def answers(**texts: str) -> Any:
    """A stand-in for the programs, by their first words."""

    def ask(*command: str) -> str:
        for words, text in texts.items():
            if " ".join(command).startswith(words.replace("_", " ")):
                return text
        raise FileNotFoundError(command[0])

    return ask


def samples(families: list[Any]) -> dict[str, list[Any]]:
    return {family.name: family.samples for family in families}


def test_containers() -> None:
    found = samples(
        host_metrics.containers(
            answers(docker_ps="aa\nbb\n", docker_inspect="/agent-stack-redis-redis-1 0 true\n/agent-stack-agent-agent-1 3 false\n"),
        )
    )
    agent, redis = {"container": "agent-stack-agent-agent-1"}, {"container": "agent-stack-redis-redis-1"}
    assert found["agent_stack_container_restarts_total"] == [(agent, 3), (redis, 0)]
    assert found["agent_stack_container_running"] == [(agent, 0), (redis, 1)]


def test_no_container_is_nothing_to_inspect() -> None:
    assert samples(host_metrics.containers(answers(docker_ps=""))) == {"agent_stack_container_restarts_total": [], "agent_stack_container_running": []}


def test_units() -> None:
    lines = ["nginx.service loaded failed failed A server", "agent-stack@agent.service loaded active exited Agent", "certbot.timer not-found inactive dead x"]
    assert samples(host_metrics.units(answers(systemctl_list="\n".join(lines) + "\n"))) == {
        "agent_stack_unit_failed": [({"unit": "nginx.service"}, 1), ({"unit": "agent-stack@agent.service"}, 0), ({"unit": "certbot.timer"}, 0)]
    }


def gpu(old: str = "", new: str = "") -> dict[str, list[Any]]:
    text = GPU.read_text()
    assert old in text
    return samples(host_metrics.gpus(lambda *command: text.replace(old, new) if old else text))


def test_gpus() -> None:
    found = gpu()
    assert {name.removeprefix("agent_stack_gpu_"): values for name, values in found.items() if name != "agent_stack_gpu_slowdown"} == {
        "temperature_celsius": [(GPU_LABELS, 45)],
        "utilization_ratio": [(GPU_LABELS, 0.02)],
        "memory_used_bytes": [(GPU_LABELS, 1 << 20)],
        "memory_total_bytes": [(GPU_LABELS, 23034 << 20)],
        "power_watts": [(GPU_LABELS, 27.22)],
        "uncorrected_errors": [(GPU_LABELS, 0)],
        "remapping_failed": [(GPU_LABELS, 0)],
    }
    assert found["agent_stack_gpu_slowdown"] == [({**GPU_LABELS, "reason": reason}, 0) for reason in host_metrics.SLOWDOWNS]


@pytest.mark.parametrize(
    ("old", "new", "metric", "value"),
    [
        ("<dram_uncorrectable>0<", "<dram_uncorrectable>2<", "uncorrected_errors", 2),
        ("<remapped_row_failure>No<", "<remapped_row_failure>Yes<", "remapping_failed", 1),
        ("<gpu_temp>45 C<", "<gpu_temp>91 C<", "temperature_celsius", 91),
        ("<power_draw>27.22 W<", "<power_draw>N/A<", "power_watts", None),
        ("<gpu_util>2 %<", "<gpu_util>N/A<", "utilization_ratio", None),
    ],
)
def test_what_a_gpu_says_otherwise(old: str, new: str, metric: str, value: float | None) -> None:
    assert [number for _, number in gpu(old, new)[f"agent_stack_gpu_{metric}"]] == ([] if value is None else [value])


@pytest.mark.parametrize("word", ["event", "throttle"])
def test_a_gpu_that_is_slowed_down(word: str) -> None:
    """Drivers before 535 call the same thing otherwise."""
    text = GPU.read_text().replace("hw_thermal_slowdown>Not Active<", "hw_thermal_slowdown>Active<").replace("_event_reason", f"_{word}_reason")
    found = samples(host_metrics.gpus(lambda *command: text))["agent_stack_gpu_slowdown"]
    assert {labels["reason"]: value for labels, value in found} == {name: float(name == "hw_thermal_slowdown") for name in host_metrics.SLOWDOWNS}


def test_errors_in_the_kernels_log(tmp_path: Path) -> None:
    pipe = tmp_path / "kmsg"
    os.mkfifo(pipe)
    kernel = host_metrics.Kernel(str(pipe))
    assert samples(kernel.families())["agent_stack_gpu_errors_total"] == [({}, 0)]
    with pipe.open("w") as log:
        log.write("6,1,1,-;NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n6,2,2,-;eth0: link\n4,3,3,-;NVRM: Xid (PCI:0000:01:00): 13, x\n")
        log.flush()
        found = samples(kernel.families())
    assert found["agent_stack_gpu_errors_total"] == [({}, 2)]
    assert found["agent_stack_gpu_xid_errors_total"] == [({"xid": "13"}, 1), ({"xid": "79"}, 1)]


def record(path: Path, active: str, target: str) -> None:
    path.write_text(json.dumps({"active": active, "target": target, "slots": {}}))


@pytest.mark.parametrize(
    ("steps", "ended", "under_way"),
    [
        ([("", "blue"), ("blue", "")], {"done": 1, "failed": 0}, 0),
        ([("blue", ""), ("blue", "green"), ("green", "")], {"done": 1, "failed": 0}, 0),
        ([("blue", ""), ("blue", "green"), ("blue", "")], {"done": 0, "failed": 1}, 0),
        ([("blue", ""), ("blue", "green")], {"done": 0, "failed": 0}, 1),
        ([("blue", "green"), ("green", "green"), ("green", "")], {"done": 1, "failed": 0}, 0),
    ],
)
def test_swaps(tmp_path: Path, steps: list[tuple[str, str]], ended: dict[str, int], under_way: int) -> None:
    path = tmp_path / "swap.json"
    swaps = host_metrics.Swaps(path)
    for active, target in steps:
        record(path, active, target)
        swaps.look()
    found = samples(swaps.families())
    assert found["agent_stack_swap_under_way"] == [({}, under_way)]
    assert {labels["result"]: value for labels, value in found["agent_stack_swaps_total"]} == ended


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_record_that_cannot_be_read_changes_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "swap.json"
    record(path, "blue", "green")
    swaps = host_metrics.Swaps(path)
    swaps.look()
    path.write_text(text)
    assert samples(swaps.families())["agent_stack_swap_under_way"] == [({}, 1)]


def broken(error: Exception) -> Any:
    def source() -> list[Any]:
        raise error

    return source


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("docker"),
        subprocess.TimeoutExpired("docker", 10),
        subprocess.CalledProcessError(1, "docker"),
        ElementTree.ParseError("no XML"),
        ValueError("not enough values"),
    ],
)
def test_a_source_that_fails_leaves_the_others(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    units = [host_metrics.Family("agent_stack_unit_failed", "gauge", "x", [({"unit": 'a"b\\c'}, 1.0)])]
    text = host_metrics.collected({"docker": broken(error), "systemd": lambda: units})
    assert 'agent_stack_host_source_up{source="docker"} 0\nagent_stack_host_source_up{source="systemd"} 1\n' in text
    assert 'agent_stack_unit_failed{unit="a\\"b\\\\c"} 1\n' in text
    assert capsys.readouterr().err.startswith("docker: ")


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "host.prom"
    host_metrics.replace(path, "old\n")
    before = path.stat().st_ino
    host_metrics.replace(path, "new\n")
    assert (path.read_text(), path.stat().st_ino != before, oct(path.stat().st_mode & 0o777)) == ("new\n", True, "0o644")
    assert list(tmp_path.iterdir()) == [path]


def test_what_it_writes_is_the_contracts(tmp_path: Path) -> None:
    """RECORD_SCRAPES=1 writes it down for the tests of the dashboards."""
    record(tmp_path / "swap.json", "blue", "")
    kernel = host_metrics.Kernel(str(tmp_path / "kmsg"))
    (tmp_path / "kmsg").write_text("4,3,3,-;NVRM: Xid (PCI:0000:01:00): 13, x\n")
    text = host_metrics.collected(
        {
            "docker": lambda: host_metrics.containers(answers(docker_ps="aa\n", docker_inspect="/agent-stack-agent-agent-1 1 true\n")),
            "systemd": lambda: host_metrics.units(answers(systemctl_list="nginx.service loaded active running A server\n")),
            "swap": host_metrics.Swaps(tmp_path / "swap.json").families,
            "gpu": lambda: host_metrics.gpus(lambda *command: GPU.read_text()),
            "kernel": kernel.families,
        }
    )
    recorded = Path(__file__).parent / "data" / "scrapes" / "host.txt"
    if os.environ.get("RECORD_SCRAPES"):
        recorded.parent.mkdir(exist_ok=True)
        recorded.write_text(text)
    assert text == recorded.read_text()
    written = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    assert written == {name for name, entry in promql.contract().items() if entry["exporter"] == "host"}
