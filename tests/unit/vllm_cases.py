"""Hosts of two inventories, as unlike as their model servers can be. What each must come to is in data/vllm_services.json."""

from __future__ import annotations

from typing import Any

Hosts = dict[str, dict[str, Any]]

TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
FASTER = {"arguments": ["--linear-backend", "humming"], "environment": {"HUMMING_CACHE_DIR": "/cache/humming"}}


def plan(strategy: str, **more: Any) -> dict[str, Any]:
    """As the module vllm_plan returns it, as far as the role reads it."""
    swap = {"strategy": strategy, "gpu_memory_utilization": more.pop("utilization", 0.9)}
    return {"model_arguments": TOOLS, "faster": {"arguments": [], "environment": {}}, "weights_mib": 7000, "swap": swap, **more}


# Each a stack of its own. `__vllm_plan` is what the play has registered by then.
ALONE: Hosts = {
    "cpu-path": {"vllm_device": "cpu", "vllm_model": "/srv/models/first", "vllm_tool_call_parser": "hermes", "vllm_sleep_mode": True},
    "cpu-package": {
        "vllm_device": "cpu",
        "vllm_model": "SmolLM2-135M",
        "vllm_model_package": "smollm2-135m==1.0",
        "vllm_model_package_sha256": "a" * 64,
        "vllm_tool_call_parser": "",
        "vllm_cpu_kv_cache_gib": 2,
        "vllm_memory_limit_gib": 6,
        "vllm_max_model_len": 2048,
    },
    "cpu-hub": {
        "vllm_device": "cpu",
        "vllm_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "vllm_model_revision": "main",
        "vllm_hf_token": "hf_secret",
        "vllm_tool_call_parser": "hermes",
        "vllm_reasoning_parser": "qwen3",
        "vllm_swap_strategy": "side_by_side",
        "vllm_extra_arguments": ["--seed", "7"],
    },
    "cuda-planned": {"vllm_model": "Qwen/Qwen3-8B", "__vllm_plan": plan("sleep")},
    "cuda-first": {"vllm_model": "Qwen/Qwen3-8B", "vllm_hf_token": "hf_secret", "__vllm_plan": plan("start")},
    "cuda-beside": {
        "vllm_model": "/srv/models/Qwen3-4B",
        "vllm_gpu_memory_utilization": 0.85,
        "vllm_sleep_mode": False,
        "vllm_shm_size_gib": 16,
        "__vllm_plan": plan("side_by_side", utilization=0.41),
    },
    "cuda-several": {
        "vllm_model": "meta-llama/Llama-3.3-70B-Instruct",
        "vllm_tensor_parallel_size": 4,
        "vllm_max_model_len": 32768,
        "vllm_memory_limit_gib": 256,
        "vllm_served_name": "large",
        "vllm_optimize_for": "latency",
        "__vllm_plan": plan("sleep", faster=FASTER, weights_mib=35000),
    },
    "cuda-throughput": {"vllm_model": "Qwen/Qwen3-8B-AWQ", "__vllm_plan": plan("hold_and_recreate", faster=FASTER)},
    "cuda-told-how": {"vllm_model": "Qwen/Qwen3-8B", "vllm_swap_strategy": "hold_and_recreate", "__vllm_plan": plan("side_by_side", utilization=0.4)},
    "cuda-package": {
        "vllm_model": "a-model",
        "vllm_model_package": "a_model==2.0.1",
        "vllm_tool_call_parser": "llama3_json",
        "vllm_reasoning_parser": "deepseek_r1",
    },
    "cuda-odd-arguments": {
        "vllm_model": "Qwen/Qwen3-8B",
        "vllm_model_revision": "refs/pr/1",
        "vllm_extra_arguments": ["--chat-template", "/models/it's $odd.jinja", "--override-generation-config", '{"top_k": 20}'],
        "__vllm_plan": plan("sleep", model_arguments=[]),
    },
    # As with the tag of another role: Ansible reads what the role vllm gives to others, and no task of it has made a plan.
    "cuda-not-planned": {"vllm_model": "Qwen/Qwen3-8B"},
    "elsewhere": {
        "vllm_device": "cpu",
        "vllm_model": "org/model",
        "vllm_tool_call_parser": "hermes",
        "agent_stack_root": "/srv/stack",
        "agent_stack_data_dir": "/srv/data",
    },
}

_LARGE = {"vllm_model": "Qwen/Qwen3-32B", "vllm_tensor_parallel_size": 2, "__vllm_plan": plan("side_by_side", utilization=0.4)}
_SMALL = {"vllm_device": "cpu", "vllm_model": "/srv/models/first", "vllm_tool_call_parser": "hermes"}

# A front and those that serve for it, of which two share their models with others.
TOGETHER: dict[str, Hosts] = {
    "": {"front": {}},
    "inference": {
        "head": {"vllm_peer_address": "10.0.0.1", **_LARGE},
        "alone": {"vllm_peer_address": "10.0.0.9", **_LARGE},
        "cpu-head": {"vllm_peer_address": "10.0.1.1", "vllm_node_port": 40000, **_SMALL},
    },
    "followers": {
        "second": {"vllm_peer_address": "10.0.0.2", "vllm_head": "head", **_LARGE},
        "third": {"vllm_peer_address": "fd00::3", "vllm_head": "head", **_LARGE},
        "cpu-second": {"vllm_peer_address": "10.0.1.2", "vllm_head": "cpu-head", "vllm_node_port": 40000, **_SMALL},
    },
}


def inventories() -> dict[str, dict[str, Any]]:
    """Both, in the form that Ansible reads."""
    children = {group: {"hosts": hosts} for group, hosts in TOGETHER.items() if group}
    return {"alone": {"all": {"hosts": ALONE}}, "together": {"all": {"hosts": TOGETHER[""], "children": children}}}


def cases() -> Hosts:
    """The hosts that run a model server."""
    return {**ALONE, **TOGETHER["inference"], **TOGETHER["followers"]}
