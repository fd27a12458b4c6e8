"""The catalogue names only parsers that the pinned vLLM has, finds the right family, and its profiles fit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import record_vllm
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_plan as plan_of

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parent / "data" / "models"
CATALOGUE: dict[str, Any] = yaml.safe_load((ROOT / "roles" / "vllm" / "vars" / "catalogue.yml").read_text())["__vllm_catalogue"]
REGISTRY: dict[str, Any] = json.loads(record_vllm.REGISTRY.read_text())


def shape(name: str) -> plan_of.Shape:
    return plan_of.read_shape(json.loads((MODELS / f"{name}.json").read_text()))


def test_the_recorded_vllm_is_the_pinned_one() -> None:
    """If this fails, run `make record-vllm`."""
    assert {device: entry["distribution"] for device, entry in REGISTRY.items()} == record_vllm.pinned()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("family", CATALOGUE["families"], ids=lambda family: family["name"])
def test_parsers_are_vllms_own(family: dict[str, Any], device: str) -> None:
    assert family["tool_call_parser"] in ["", *REGISTRY[device]["tool_parsers"]]
    assert family["reasoning_parser"] in ["", *REGISTRY[device]["reasoning_parsers"]]


def test_parsers_in_documents_are_vllms_own() -> None:
    """What the inventory and the argument specification suggest."""
    texts = [(ROOT / path).read_text() for path in ("inventories/prod/group_vars/all/main.yml", "roles/vllm/meta/argument_specs.yml", "README.md")]
    named = {name for text in texts for name in re.findall(r"\b(hermes|[a-z0-9]+_json|[a-z0-9]+_xml|pythonic)\b", text)} - {"no_json"}
    assert named
    assert named <= set(REGISTRY["cuda"]["tool_parsers"])


def test_families_are_complete() -> None:
    assert len({family["name"] for family in CATALOGUE["families"]}) == len(CATALOGUE["families"])
    for family in CATALOGUE["families"]:
        assert set(family) == {"name", "model_types", "name_pattern", "tool_call_parser", "reasoning_parser", "chat_template", "notes"}
        re.compile(family["name_pattern"])


@pytest.mark.parametrize(
    ("model", "config", "family", "tool_call_parser"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b", "Llama 3.1 to 3.3", "llama3_json"),
        ("hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4", "llama-3.1-70b-awq", "Llama 3.1 to 3.3", "llama3_json"),
        ("meta-llama--Llama-3.2-3B-Instruct--main", "llama-3.2-3b", "Llama 3.1 to 3.3", "llama3_json"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama-3.1-8b", "DeepSeek R1 distills", ""),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "qwq-32b", "DeepSeek R1 distills", ""),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b", "Qwen2.5", "hermes"),
        ("Qwen/QwQ-32B", "qwq-32b", "QwQ", "hermes"),
        ("Qwen/Qwen3-8B", "qwen3-8b", "Qwen3", "hermes"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b", "Qwen3 Instruct 2507", "hermes"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3-coder-30b-a3b", "Qwen3-Coder", "qwen3_xml"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3", "Mistral", "mistral"),
        ("google/gemma-3-27b-it", "gemma-3-27b", "Gemma 3", "pythonic"),
        ("google/gemma-2-9b-it", "gemma-2-9b", "Gemma 2", ""),
        ("openai/gpt-oss-20b", "gpt-oss-20b", "gpt-oss", "openai"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3", "DeepSeek V3", "deepseek_v3"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-v3", "DeepSeek V3.1", "deepseek_v31"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3", "DeepSeek R1", "deepseek_v3"),
        ("moonshotai/Kimi-K2-Instruct", "deepseek-v3", "Kimi K2", "kimi_k2"),
        ("microsoft/phi-4", "phi-4", "Phi-3 and Phi-4", ""),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini", "Phi-4-mini", "phi4_mini_json"),
        ("ibm-granite/granite-3.3-8b-instruct", "granite-3.3-8b", "Granite 3", "granite"),
    ],
)
def test_family_of(model: str, config: str, family: str, tool_call_parser: str) -> None:
    found = plan_of.match_family(CATALOGUE["families"], model, shape(config))
    assert found is not None
    assert (found["name"], found["tool_call_parser"]) == (family, tool_call_parser)


def test_a_model_of_no_family_gets_no_parser() -> None:
    """A Llama that is none of Meta's may speak any dialect of tool calls."""
    assert plan_of.match_family(CATALOGUE["families"], "someone/my-llama", shape("llama-3.1-8b")) is None


@pytest.mark.parametrize("model", CATALOGUE["models"], ids=lambda model: model["id"])
def test_models(model: dict[str, Any]) -> None:
    known = shape(model["shape"])
    assert known.weight_bytes() / plan_of.GIB == pytest.approx(model["weights_gib"], abs=0.06)
    assert known.architecture in REGISTRY["cuda"]["architectures"]
    assert plan_of.match_family(CATALOGUE["families"], model["id"], known) is not None
    # Nobody has tried a commit here, so none may be named.
    assert model["revision"] == ""


@pytest.mark.parametrize("profile", CATALOGUE["profiles"], ids=lambda profile: profile["name"])
def test_profiles_carry_several_contexts(profile: dict[str, Any]) -> None:
    entry = next(model for model in CATALOGUE["models"] if model["id"] == profile["model"])
    gpus = [plan_of.Gpu("GPU", profile["total_mib"], profile["total_mib"], 9.0)] * profile["gpus"]
    wish = plan_of.Wish(profile["gpu_memory_utilization"], profile["max_model_len"], profile["gpus"])
    plan = plan_of.make_plan(shape(entry["shape"]), None, gpus, wish)
    assert plan.fits, plan.reason
    assert plan.memory.contexts >= 3


def test_keys_are_read_without_importing() -> None:
    source = "A = {'x': 1, 'y': 2}\nB: dict[str, int] = {'z': 3, **A}\nraise SystemExit"
    assert record_vllm.keys(source, ["A", "B"]) == ["x", "y", "z"]
    with pytest.raises(KeyError):
        record_vllm.keys(source, ["C"])
    assert "vllm" not in sys.modules
