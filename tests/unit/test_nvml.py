"""What is said about GPUs: NVML's real Python bindings over a library built here, and a scripted nvidia-smi."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _nvml

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).resolve().parents[2]
REPORT = """
import json
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _nvml
print(json.dumps(_nvml.gpu_report({executable!r}, {timeout})))
"""
H100 = {
    "index": 0,
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-00000000-0000-0000-0000-000000000000",
    "compute_capability": "9.0",
    "total_mib": 81559,
    "used_mib": 1889,
    "free_mib": 79190,
    "reserved_mib": 480,
    "processes": [{"pid": 4242, "name": "/opt/vllm/bin/python", "used_mib": 1889}],
    "mig_mode": "unsupported",
    "mig_devices": [],
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a libnvidia-ml.so.1."""
    directory = tmp_path_factory.mktemp("nvml")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", directory / "libnvidia-ml.so.1", DATA / "fake_nvml.c"], check=True)
    return directory


@pytest.fixture
def smi(tmp_path: Path) -> Path:
    """An nvidia-smi that answers for one H100."""
    return script(tmp_path, f'case "$1" in -q) cat {DATA}/nvidia_smi.xml ;; *) echo "{H100["uuid"]}, 9.0" ;; esac')


def script(directory: Path, body: str) -> Path:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program


def ask(library: Path | None, executable: Path | None = None, timeout: float = 10, **environment: str) -> dict[str, Any]:
    """The report of a fresh process: which library NVML is, is decided once in a process."""
    variables = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"} | environment
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / ".collections"), os.environ.get("PYTHONPATH", "")])
    if library:
        variables["LD_LIBRARY_PATH"] = str(library)
    code = REPORT.format(executable=str(executable) if executable else None, timeout=timeout)
    output = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True, timeout=60).stdout
    answer: dict[str, Any] = json.loads(output)
    return answer


def test_the_real_bindings_are_there() -> None:
    import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]

    assert pynvml.nvmlMemory_v2 == _nvml.MEMORY_V2


@pytest.mark.parametrize("count", [1, 2])
def test_nvml_gpus(library: Path, count: int) -> None:
    report = ask(library, FAKE_GPUS=str(count))
    assert (report["state"], report["source"], report["reason"]) == ("present", "nvml", "")
    assert (report["driver_version"], report["cuda_version"]) == ("580.159.04", "13.0")
    assert [gpu["index"] for gpu in report["gpus"]] == list(range(count))
    assert report["gpus"][0] == H100


def test_nvml_without_a_gpu(library: Path) -> None:
    report = ask(library, FAKE_GPUS="0")
    assert (report["state"], report["gpus"], report["reason"]) == ("absent", [], "the driver is loaded, and sees no GPU")


def test_nvml_mig(library: Path) -> None:
    first, second = ask(library, FAKE_GPUS="2", FAKE_MIG="1")["gpus"]
    assert (first["mig_mode"], second["mig_mode"], second["mig_devices"]) == ("enabled", "disabled", [])
    assert [device["uuid"][:4] for device in first["mig_devices"]] == ["MIG-", "MIG-"]
    assert {device["total_mib"] for device in first["mig_devices"]} == {40448}


def test_older_nvml_counts_the_reserve_as_used(library: Path) -> None:
    gpu = ask(library, FAKE_GPUS="1", FAKE_MEMORY_V2="3")["gpus"][0]
    assert (gpu["used_mib"], gpu["free_mib"], gpu["reserved_mib"]) == (2369, 79190, 0)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FAKE_INIT": "18"}, "NVML: RM has detected an NVML/RM version mismatch"),
        ({"FAKE_INIT": "9"}, "NVML: Driver Not Loaded"),
        ({"FAKE_INIT": "999"}, "NVML: Unknown Error"),
        ({"FAKE_GPUS": "1", "FAKE_HANDLE": "15"}, "NVML: GPU 0: GPU is lost"),
        ({"FAKE_CRASH": "1"}, "NVML's library crashed (wait status"),
    ],
)
def test_a_broken_driver_is_an_answer(library: Path, environment: dict[str, str], said: str) -> None:
    report = ask(library, None, 10, **environment)
    assert (report["state"], report["gpus"], report["source"]) == ("broken", [], "none")
    assert report["reason"].startswith(said)


def test_a_driver_that_hangs_is_left_behind(library: Path) -> None:
    started = time.monotonic()
    report = ask(library, timeout=0.5, FAKE_HANG="1")
    assert report["state"] == "broken"
    assert report["reason"] == "NVML did not answer within 0.5 seconds"
    assert time.monotonic() - started < 10


def test_no_driver_at_all() -> None:
    report = ask(None)
    assert report["state"] == "absent"
    assert report["reason"].endswith("there is no nvidia-smi on the PATH")


def test_nvidia_smi_says_the_same_as_nvml(smi: Path) -> None:
    report = ask(None, smi)
    assert (report["state"], report["source"], report["driver_version"], report["cuda_version"]) == ("present", "nvidia-smi", "580.159.04", "13.0")
    assert report["gpus"] == [H100 | {"mig_mode": "disabled"}]


def test_nvidia_smi_is_asked_when_the_bindings_fail(library: Path, smi: Path) -> None:
    assert ask(library, smi, FAKE_INIT="999")["source"] == "nvidia-smi"


@pytest.mark.parametrize(
    ("body", "state", "said"),
    [
        ("echo 'No devices were found'; exit 6", "absent", "the driver is loaded, and sees no GPU"),
        ('echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9', "broken", "exited with 9: NVIDIA-SMI has failed"),
        ("echo '<nvidia_smi_log>'", "broken", "the answer of nvidia-smi cannot be read"),
        ("exec sleep 30", "broken", "did not answer within 1 seconds"),
    ],
)
def test_nvidia_smi_that_fails(tmp_path: Path, body: str, state: str, said: str) -> None:
    report = ask(None, script(tmp_path, body), timeout=1)
    assert report["state"] == state
    assert said in report["reason"]


def test_a_driver_too_old_for_compute_capability(tmp_path: Path) -> None:
    report = ask(None, script(tmp_path, f'[ "$1" = -q ] && exec cat {DATA}/nvidia_smi.xml; echo "Field \\"compute_cap\\" is not a valid field"; exit 2'))
    assert report["gpus"][0]["compute_capability"] == ""


def test_module_runs_on_a_host_without_a_gpu(tmp_path: Path) -> None:
    ansible = shutil.which("ansible", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert ansible
    command = [ansible, "localhost", "--check", "-m", "selfhosted.agent_stack.gpu_vram_info", "-a", f"executable={tmp_path}/nvidia-smi"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "state: absent" in result.stdout
