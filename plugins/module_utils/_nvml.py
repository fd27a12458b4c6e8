# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What NVIDIA's driver says about the GPUs. PRIVATE to the collection: it may change at any time.

NVML's Python bindings (`nvidia-ml-py`) are asked where the host has them, else `nvidia-smi`. Both give the same structure. A driver that hangs
hangs in the kernel, where no signal reaches it, so each is asked in a child process that can be left behind.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from xml.etree import ElementTree

MIB = 1024 * 1024
# nvmlMemory_v2: the size of the structure and its version. Only this version tells what the driver keeps for itself.
MEMORY_V2 = 0x02000028
UNIT = re.compile(r"(\d+) MiB")


class GpuError(Exception):
    """Nobody could say what GPUs there are; the message says why. `absent` is true if there is no driver at all."""

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


def gpu_report(executable: str | None, timeout: float) -> dict[str, Any]:
    """Ask NVML, then nvidia-smi. Never raises: no GPU, and a broken driver, are answers."""
    errors = []
    for source in ("nvml", "nvidia-smi"):
        try:
            report = in_child(from_nvml, timeout) if source == "nvml" else from_nvidia_smi(executable, timeout)
        except GpuError as error:
            errors.append(error)
            continue
        state = "present" if report["gpus"] else "absent"
        reason = "" if report["gpus"] else "the driver is loaded, and sees no GPU"
        return {"state": state, "reason": reason, "source": source, **report}
    # A driver that is there but does not work says more than a tool that is not there.
    broken = [str(error) for error in errors if not error.absent]
    reason = "; ".join(broken or [str(error) for error in errors])
    return {
        "state": "broken" if broken else "absent",
        "reason": reason,
        "source": "none",
        "driver_version": "",
        "cuda_version": "",
        "gpus": [],
    }


def in_child(ask: Callable[[], dict[str, Any]], timeout: float) -> dict[str, Any]:
    """Return what `ask` returns in a child process. Raises GpuError, also if the child hangs or crashes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            try:
                answer: dict[str, Any] = {"report": ask()}
            except GpuError as error:
                answer = {"error": str(error), "absent": error.absent}
            except Exception as error:
                answer = {"error": f"NVML: {type(error).__name__}: {error}", "absent": False}
            with os.fdopen(writer, "w") as stream:
                json.dump(answer, stream)
        finally:
            os._exit(0)
    os.close(writer)
    output = read_until(reader, time.monotonic() + timeout)
    os.close(reader)
    if output is None:
        os.kill(child, signal.SIGKILL)
        # Not waited for: a process that hangs in the driver does not die, and init inherits it.
        os.waitpid(child, os.WNOHANG)
        raise GpuError(f"NVML did not answer within {timeout:g} seconds")
    status = os.waitpid(child, 0)[1]
    try:
        answer = json.loads(output)
    except ValueError:
        raise GpuError(f"NVML's library crashed (wait status {status})") from None
    if "error" in answer:
        raise GpuError(answer["error"], absent=answer["absent"])
    report: dict[str, Any] = answer["report"]
    return report


def read_until(reader: int, deadline: float) -> bytes | None:
    """Return all that comes before the pipe's end, or None if that does not come in time."""
    output = b""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, 65536)
        if not chunk:
            return output
        output += chunk
    return None


def from_nvml() -> dict[str, Any]:
    """Return the report of NVML's Python bindings. Raises GpuError."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        raise GpuError("the Python package nvidia-ml-py is not installed", absent=True) from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        gone = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        raise GpuError(f"NVML: {error}", absent=error.value in gone[:1]) from None
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "driver_version": nvml.nvmlSystemGetDriverVersion(),
            "cuda_version": f"{cuda // 1000}.{cuda % 1000 // 10}",
            "gpus": [nvml_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())],
        }
    except nvml.NVMLError as error:
        raise GpuError(f"NVML: {error}") from None


def nvml_gpu(nvml: Any, index: int) -> dict[str, Any]:
    """Return one GPU. Raises GpuError naming the GPU: one that fell off the bus must not be taken for one that never was."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        mode = optional(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
        return {
            "index": index,
            "name": nvml.nvmlDeviceGetName(handle),
            "uuid": nvml.nvmlDeviceGetUUID(handle),
            "compute_capability": f"{major}.{minor}",
            **nvml_memory(nvml, handle),
            "processes": nvml_processes(nvml, handle),
            "mig_mode": {None: "unsupported", 0: "disabled"}.get(mode, "enabled"),
            "mig_devices": nvml_mig_devices(nvml, handle) if mode else [],
        }
    except nvml.NVMLError as error:
        raise GpuError(f"NVML: GPU {index}: {error}") from None


def nvml_memory(nvml: Any, handle: Any) -> dict[str, Any]:
    """Return the memory in MiB. The older call counts what the driver reserves as used; there `reserved_mib` is 0."""
    memory = optional(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=MEMORY_V2)) or optional(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    if memory is None:  # a GPU that shares the host's memory has none to report
        return {"total_mib": 0, "used_mib": 0, "free_mib": 0, "reserved_mib": 0}
    return {
        "total_mib": int(memory.total) // MIB,
        "used_mib": int(memory.used) // MIB,
        "free_mib": int(memory.free) // MIB,
        "reserved_mib": int(getattr(memory, "reserved", 0)) // MIB,
    }


def nvml_processes(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    found = optional(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return [
        {
            "pid": int(process.pid),
            "name": optional(nvml, partial(nvml.nvmlSystemGetProcessName, process.pid)) or "",
            "used_mib": int(process.usedGpuMemory or 0) // MIB,
        }
        for process in found
    ]


def nvml_mig_devices(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    devices = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        instance = optional(nvml, partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index))
        if instance is not None:
            devices.append({"uuid": nvml.nvmlDeviceGetUUID(instance), "name": nvml.nvmlDeviceGetName(instance), **nvml_memory(nvml, instance)})
    return devices


def optional(nvml: Any, ask: Callable[[], Any]) -> Any:
    """Return None for what this GPU or driver does not have. Every other error is one."""
    missing = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_NO_PERMISSION)
    try:
        return ask()
    except nvml.NVMLError as error:
        if error.value in missing or error.value == nvml.NVML_ERROR_INVALID_ARGUMENT:
            return None
        raise


def from_nvidia_smi(executable: str | None, timeout: float) -> dict[str, Any]:
    """Return the report of nvidia-smi. Raises GpuError."""
    if executable is None:
        raise GpuError("there is no nvidia-smi on the PATH", absent=True)
    answer = run_nvidia_smi([executable, "-q", "-x"], timeout)
    if answer is None:
        return {"driver_version": "", "cuda_version": "", "gpus": []}
    report = parse_nvidia_smi(answer)
    # The XML does not tell the compute capability, and drivers before 510 do not tell it at all.
    try:
        lines = run_nvidia_smi([executable, "--query-gpu=uuid,compute_cap", "--format=csv,noheader"], timeout) or ""
    except GpuError:
        lines = ""
    capabilities = dict(line.split(", ", 1) for line in lines.splitlines() if ", " in line)
    for gpu in report["gpus"]:
        gpu["compute_capability"] = capabilities.get(gpu["uuid"], "").strip()
    return report


def run_nvidia_smi(command: list[str], timeout: float) -> str | None:
    """Return what nvidia-smi prints, or None if it finds no GPU. Raises GpuError."""
    try:
        # A driver that hangs is left behind after a time, which run_command cannot do.
        # pylint: disable-next=ansible-bad-function
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise GpuError(f"{command[0]} did not answer within {timeout:g} seconds") from None
    except OSError as error:
        raise GpuError(f"{command[0]} cannot be run: {error.strerror}", absent=True) from None
    said = " ".join((result.stdout.strip() or result.stderr.strip()).split())
    if "No devices were found" in said:
        return None
    if result.returncode != 0:
        raise GpuError(f"{command[0]} exited with {result.returncode}: {said[:300]}")
    return result.stdout


def parse_nvidia_smi(text: str) -> dict[str, Any]:
    """Return the report that an XML answer of nvidia-smi holds. Raises GpuError."""
    try:
        root = ElementTree.fromstring(text)
        gpus = [smi_gpu(index, gpu) for index, gpu in enumerate(root.findall("gpu"))]
    except (ElementTree.ParseError, ValueError) as error:
        raise GpuError(f"the answer of nvidia-smi cannot be read: {error}") from None
    return {"driver_version": root.findtext("driver_version", ""), "cuda_version": root.findtext("cuda_version", ""), "gpus": gpus}


def smi_gpu(index: int, gpu: ElementTree.Element) -> dict[str, Any]:
    mode = (gpu.findtext("mig_mode/current_mig") or "N/A").strip().lower()
    return {
        "index": index,
        "name": gpu.findtext("product_name", ""),
        "uuid": gpu.findtext("uuid", ""),
        "compute_capability": "",
        **smi_memory(gpu),
        "processes": [smi_process(process) for process in gpu.findall("processes/process_info")],
        "mig_mode": mode if mode in ("enabled", "disabled") else "unsupported",
        "mig_devices": [
            {"uuid": device.findtext("uuid", ""), "name": device.findtext("product_name", "") or "MIG device", **smi_memory(device)}
            for device in gpu.findall("mig_devices/mig_device")
        ],
    }


def smi_memory(element: ElementTree.Element) -> dict[str, int]:
    return {f"{name}_mib": smi_mib(element.findtext(f"fb_memory_usage/{name}")) for name in ("total", "used", "free", "reserved")}


def smi_process(process: ElementTree.Element) -> dict[str, Any]:
    return {"pid": int(process.findtext("pid", "0")), "name": process.findtext("process_name", ""), "used_mib": smi_mib(process.findtext("used_memory"))}


def smi_mib(text: str | None) -> int:
    found = UNIT.search(text or "")
    return int(found.group(1)) if found else 0
