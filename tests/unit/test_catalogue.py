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
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_catalogue import (
    NOTHING,
    check_answers_with_text,
    check_parser,
    match_family,
    plain_name,
)
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_survey import KINDS

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parent / "data" / "models"
CATALOGUE: dict[str, Any] = yaml.safe_load((ROOT / "roles" / "vllm" / "vars" / "catalogue.yml").read_text())["__vllm_catalogue"]
REGISTRY: dict[str, Any] = json.loads(record_vllm.REGISTRY.read_text())


def shape(name: str) -> plan_of.Shape:
    return plan_of.read_shape(json.loads((MODELS / f"{name}.json").read_text()))


def test_the_recorded_vllm_is_the_pinned_one() -> None:
    """If this fails, run `make record-vllm`."""
    assert {device: entry["distribution"] for device, entry in REGISTRY.items()} == record_vllm.pinned()


FAMILIES = [NOTHING | family for family in CATALOGUE["families"]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["name"])
def test_parsers_are_vllms_own(family: dict[str, Any]) -> None:
    assert family["tool_call_parser"] in ["", *REGISTRY["cuda"]["tool_parsers"]]
    assert family["reasoning_parser"] in ["", *REGISTRY["cuda"]["reasoning_parsers"]]
    assert family["tokenizer_mode"] in ["", *REGISTRY["cuda"]["tokenizer_modes"]]
    assert set(family["architectures"]) <= set(REGISTRY["cuda"]["architectures"])


def test_every_parser_and_architecture_of_vllm_has_a_family_or_a_reason() -> None:
    for kind in ("tool_parsers", "reasoning_parsers"):
        used = {family["tool_call_parser" if kind == "tool_parsers" else "reasoning_parser"] for family in FAMILIES}
        excused = {entry["parser"] for entry in CATALOGUE["unused_parsers"]}
        assert set(REGISTRY["cuda"][kind]) - used - excused == set()
    with_family = {name for family in FAMILIES for name in family["architectures"]}
    without = [name for entry in CATALOGUE["without_family"] for name in entry["architectures"]]
    assert sorted(with_family | set(without)) == sorted(REGISTRY["cuda"]["architectures"])
    assert not with_family & set(without)
    assert len(without) == len(set(without))
    assert all(entry["reason"] for entry in [*CATALOGUE["unused_parsers"], *CATALOGUE["without_family"]])


def test_parsers_in_documents_are_vllms_own() -> None:
    """What the inventory and the argument specification suggest."""
    texts = [(ROOT / path).read_text() for path in ("inventories/prod/group_vars/all/main.yml", "roles/vllm/meta/argument_specs.yml", "README.md")]
    named = {name for text in texts for name in re.findall(r"\b(hermes|[a-z0-9]+_json|[a-z0-9]+_xml|pythonic)\b", text)} - {"no_json"}
    assert named
    assert named <= set(REGISTRY["cuda"]["tool_parsers"])


def test_families_are_complete() -> None:
    assert len({family["name"] for family in FAMILIES}) == len(FAMILIES)
    for family in CATALOGUE["families"]:
        assert {"name", "architectures"} <= set(family) <= {"name", "architectures", *NOTHING}
        for pattern in family.get("names", []):
            re.compile(pattern)


def test_the_most_specific_family_comes_first() -> None:
    """A family that takes any name of an architecture ends the search for it, so none after it may name the same architecture."""
    taken: dict[str, str] = {}
    for family in FAMILIES:
        for architecture in family["architectures"]:
            assert architecture not in taken, f"{family['name']} is never reached for {architecture}, which {taken[architecture]} takes"
            if not family["names"]:
                taken[architecture] = family["name"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4", "meta-llama-3.1-70b-instruct"),
        ("meta-llama--Llama-3.2-3B-Instruct--main", "llama-3.2-3b-instruct"),
        ("/srv/models/Qwen--Qwen3-8B--main/", "qwen3-8b"),
        ("RedHatAI/Qwen3-32B-quantized.w4a16", "qwen3-32b"),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1_5", "llama-3-3-nemotron-super-49b-v1-5"),
        ("unsloth/gpt-oss-20b-bnb-4bit", "gpt-oss-20b"),
    ],
)
def test_plain_name(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("model", "architecture", "family", "tool_call_parser"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", "LlamaForCausalLM", "Llama 3.1 to 3.3", "llama3_json"),
        ("hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4", "LlamaForCausalLM", "Llama 3.1 to 3.3", "llama3_json"),
        ("meta-llama--Llama-3.2-3B-Instruct--main", "LlamaForCausalLM", "Llama 3.1 to 3.3", "llama3_json"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "LlamaForCausalLM", "DeepSeek R1 distills", ""),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "Qwen2ForCausalLM", "DeepSeek R1 distills", ""),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2ForCausalLM", "Qwen2.5", "hermes"),
        ("Qwen/QwQ-32B", "Qwen2ForCausalLM", "QwQ", "hermes"),
        ("Qwen/Qwen3-8B", "Qwen3ForCausalLM", "Qwen3", "hermes"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3MoeForCausalLM", "Qwen3 Instruct 2507", "hermes"),
        # vLLM's recipe names qwen3_coder; qwen3_xml is the same class.
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen3MoeForCausalLM", "Qwen3-Coder", "qwen3_coder"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "MistralForCausalLM", "Mistral", "mistral"),
        ("google/gemma-3-27b-it", "Gemma3ForConditionalGeneration", "Gemma 3", "pythonic"),
        ("google/gemma-2-9b-it", "Gemma2ForCausalLM", "Gemma 2", ""),
        ("openai/gpt-oss-20b", "GptOssForCausalLM", "gpt-oss", "openai"),
        ("deepseek-ai/DeepSeek-V3-0324", "DeepseekV3ForCausalLM", "DeepSeek V3", "deepseek_v3"),
        ("deepseek-ai/DeepSeek-V3.1", "DeepseekV3ForCausalLM", "DeepSeek V3.1", "deepseek_v31"),
        ("deepseek-ai/DeepSeek-R1-0528", "DeepseekV3ForCausalLM", "DeepSeek R1", "deepseek_v3"),
        ("moonshotai/Kimi-K2-Instruct", "DeepseekV3ForCausalLM", "Kimi K2", "kimi_k2"),
        ("microsoft/phi-4", "Phi3ForCausalLM", "Phi-3 and Phi-4", ""),
        ("microsoft/Phi-4-mini-instruct", "Phi3ForCausalLM", "Phi-4-mini", "phi4_mini_json"),
        ("ibm-granite/granite-3.3-8b-instruct", "GraniteForCausalLM", "Granite 3", "granite"),
    ],
)
def test_family_of(model: str, architecture: str, family: str, tool_call_parser: str) -> None:
    found = match_family(CATALOGUE["families"], model, architecture)
    assert found is not None
    assert (found["name"], found["tool_call_parser"]) == (family, tool_call_parser)


# What vLLM's own recipes (vllm-project/recipes) and its documentation say: parser of tool calls, of thoughts, template of the image, tokenizer's mode.
RECIPES = [
    ("Qwen/Qwen3.8-27B", "Qwen3_5ForConditionalGeneration", "qwen3_coder", "qwen3", "", ""),
    ("Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8", "Qwen3MoeForCausalLM", "qwen3_coder", "", "", ""),
    ("nvidia/Qwen3-Next-80B-A3B-Instruct-NVFP4", "Qwen3NextForCausalLM", "hermes", "", "", ""),
    ("deepseek-ai/DeepSeek-V4-Flash", "DeepseekV4ForCausalLM", "deepseek_v4", "deepseek_v4", "", "deepseek_v4"),
    ("deepseek-ai/DeepSeek-V3.2", "DeepseekV32ForCausalLM", "deepseek_v32", "deepseek_v3", "", "deepseek_v32"),
    ("deepseek-ai/DeepSeek-R1-0528", "DeepseekV3ForCausalLM", "deepseek_v3", "deepseek_r1", "tool_chat_template_deepseekr1", ""),
    ("google/gemma-4-31B-it", "Gemma4ForConditionalGeneration", "gemma4", "gemma4", "tool_chat_template_gemma4", ""),
    ("google/functiongemma-270m-it", "Gemma3ForCausalLM", "functiongemma", "", "tool_chat_template_functiongemma", ""),
    ("mistralai/Mistral-Small-4-119B-2603-NVFP4", "Mistral3ForConditionalGeneration", "mistral", "mistral", "", ""),
    ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "NemotronHForCausalLM", "qwen3_xml", "nemotron_v3", "", ""),
    ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "NemotronHForCausalLM", "qwen3_coder", "nemotron_v3", "", ""),
    ("zai-org/GLM-5-FP8", "GlmMoeDsaForCausalLM", "glm47", "glm45", "", ""),
    ("zai-org/GLM-4.7-FP8", "Glm4MoeForCausalLM", "glm47", "glm45", "", ""),
    ("zai-org/GLM-4.5-Air", "Glm4MoeForCausalLM", "glm45", "glm45", "", ""),
    ("moonshotai/Kimi-K3", "KimiK3ForConditionalGeneration", "kimi_k3", "kimi_k3", "", ""),
    ("moonshotai/Kimi-K2-Thinking", "DeepseekV3ForCausalLM", "kimi_k2", "kimi_k2", "", ""),
    ("internlm/Intern-S1-FP8", "InternS1ForConditionalGeneration", "internlm", "deepseek_r1", "", ""),
    ("XiaomiMiMo/MiMo-V2-Flash", "MiMoV2FlashForCausalLM", "qwen3_xml", "qwen3", "", ""),
    ("XiaomiMiMo/MiMo-V2.6-Flash-RL", "MiMoV2ForCausalLM", "mimo", "mimo", "", ""),
    ("LiquidAI/LFM2.5-1.2B-Thinking", "Lfm2ForCausalLM", "lfm2", "qwen3", "", ""),
    ("LiquidAI/LFM2.5-1.2B-Instruct", "Lfm2ForCausalLM", "lfm2", "", "", ""),
    ("JetBrains/Mellum2-12B-A2.5B-Thinking", "MellumForCausalLM", "hermes", "qwen3", "", ""),
    ("IFM/Jais-3-7B", "K2HorizonForCausalLM", "k2_horizon", "k2_horizon", "", ""),
    ("stepfun-ai/Step-3.7-Flash", "Step3p7ForConditionalGeneration", "step3p5", "step3p5", "", ""),
    ("CohereLabs/North-Mini-Code-1.0", "Cohere2MoeForCausalLM", "cohere_command4", "cohere_command4", "", ""),
    ("CohereLabs/command-a-reasoning-08-2025", "Cohere2ForCausalLM", "cohere_command3", "cohere_command3", "", ""),
    ("ibm-granite/granite-4.0-h-small", "GraniteMoeHybridForCausalLM", "granite4", "", "", ""),
    ("ibm-granite/granite-20b-functioncalling", "GPTBigCodeForCausalLM", "granite-20b-fc", "", "tool_chat_template_granite_20b_fc", ""),
    ("swiss-ai/Apertus-8B-Instruct-2509", "ApertusForCausalLM", "apertus", "", "tool_chat_template_apertus", ""),
    ("allenai/Olmo-3-7B-Instruct", "Olmo3ForCausalLM", "olmo3", "", "", ""),
    ("ai-sage/GigaChat3-10B-A1.8B", "DeepseekV3ForCausalLM", "gigachat3", "", "", ""),
    ("NousResearch/Hermes-3-Llama-3.1-8B", "LlamaForCausalLM", "hermes", "", "", ""),
    ("Salesforce/Llama-xLAM-2-8b-fc-r", "LlamaForCausalLM", "xlam", "", "tool_chat_template_xlam_llama", ""),
    ("Team-ACE/ToolACE-8B", "LlamaForCausalLM", "pythonic", "", "tool_chat_template_toolace", ""),
    ("tencent/Hunyuan-A13B-Instruct", "HunYuanMoEV1ForCausalLM", "hunyuan_a13b", "hunyuan_a13b", "", ""),
    ("meituan-longcat/LongCat-Flash-Chat", "LongcatFlashForCausalLM", "longcat", "", "", ""),
    ("Aleph-Alpha/Kolibri-1", "Kolibri1ForCausalLM", "hf", "hf", "", ""),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "Llama4ForConditionalGeneration", "llama4_pythonic", "", "tool_chat_template_llama4_pythonic", ""),
]


@pytest.mark.parametrize(("model", "architecture", "tool", "reasoning", "template", "mode"), RECIPES, ids=lambda value: str(value))
def test_recipes(model: str, architecture: str, tool: str, reasoning: str, template: str, mode: str) -> None:
    found = match_family(CATALOGUE["families"], model, architecture)
    assert found is not None
    said = found["chat_template"].rpartition("/")[2].removesuffix(".jinja")
    assert (found["tool_call_parser"], found["reasoning_parser"], said, found["tokenizer_mode"]) == (tool, reasoning, template, mode)


def test_a_model_of_no_family_gets_no_parser() -> None:
    """A Llama that is none of Meta's may speak any dialect of tool calls, whatever its name contains."""
    for name in ("someone/my-llama", "someone/Llama-3.1-8B-Instruct-roleplay", "someone/not-llama-3.1-8b-instruct"):
        assert match_family(CATALOGUE["families"], name, "LlamaForCausalLM") is None


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("Qwen2ForSequenceClassification", "a classifier"),
        ("Qwen2ForRewardModel", "a reward model"),
        ("JinaForRanking", "a reranker"),
        ("XLMRobertaModel", "an embedding model"),
        ("ColQwen3_5", "an embedding model"),
    ],
)
def test_models_that_do_not_write_are_told_apart(architecture: str, what: str) -> None:
    with pytest.raises(plan_of.PlanError, match=f"{architecture} is {what}, which answers with .* the agent needs a model that chats"):
        check_answers_with_text(architecture, set(REGISTRY["cuda"]["architectures"]))


def test_models_that_write_are_let_through() -> None:
    for architecture in [*REGISTRY["cuda"]["architectures"], "NewForCausalLM"]:
        check_answers_with_text(architecture, set(REGISTRY["cuda"]["architectures"]))


def test_unknown_parser() -> None:
    check_parser("tool call", "", ["hermes"])
    check_parser("tool call", "hermes", ["hermes"])
    with pytest.raises(plan_of.PlanError, match="the pinned vLLM has no tool call parser herm, for example hermes"):
        check_parser("tool call", "herm", ["hermes", "mistral"])


@pytest.mark.parametrize("model", CATALOGUE["models"], ids=lambda model: model["id"])
def test_models(model: dict[str, Any]) -> None:
    known = shape(model["shape"])
    assert known.weight_bytes() / plan_of.GIB == pytest.approx(model["weights_gib"], abs=0.06)
    assert known.architecture in REGISTRY["cuda"]["architectures"]
    assert match_family(CATALOGUE["families"], model["id"], known.architecture) is not None
    # Nobody has tried a commit here, so none may be named.
    assert model["revision"] == ""


@pytest.mark.parametrize("profile", CATALOGUE["profiles"], ids=lambda profile: profile["name"])
def test_profiles_carry_several_contexts(profile: dict[str, Any]) -> None:
    entry = next(model for model in CATALOGUE["models"] if model["id"] == profile["model"])
    gpus = [plan_of.Gpu("GPU", profile["total_mib"], profile["total_mib"], profile["capability"])] * profile["gpus"]
    wish = plan_of.Wish(profile["gpu_memory_utilization"], profile["max_model_len"], profile["gpus"])
    plan = plan_of.make_plan(shape(entry["shape"]), None, gpus, wish)
    assert plan.fits, plan.reason
    assert plan.memory.contexts >= 3


def test_the_readme_shows_the_profiles() -> None:
    """Row by row, as the plan says it now: for each size of GPU that people have, and for several."""
    rows = []
    for profile in CATALOGUE["profiles"]:
        entry = next(model for model in CATALOGUE["models"] if model["id"] == profile["model"])
        gpus = [plan_of.Gpu("GPU", profile["total_mib"], profile["total_mib"], profile["capability"])] * profile["gpus"]
        wish = plan_of.Wish(profile["gpu_memory_utilization"], profile["max_model_len"], profile["gpus"])
        at_once = plan_of.make_plan(shape(entry["shape"]), None, gpus, wish).memory.contexts
        rows.append(f"| {profile['name']} | `{profile['model']}` | {profile['max_model_len']:,} | {at_once:.1f} |")
    readme = (ROOT / "roles" / "vllm" / "README.md").read_text()
    assert "\n".join(rows) in readme
    assert [profile["name"] for profile in CATALOGUE["profiles"]] == [
        *(f"{gb} GB" for gb in (16, 24, 32, 48, 80, 96, 141)),
        *(f"{n} x 80 GB" for n in (2, 4, 8)),
    ]
    totals = {f"{kind.gb} GB": kind.total_mib for kind in KINDS}
    assert {profile["total_mib"] for profile in CATALOGUE["profiles"] if totals[profile["name"].rpartition("x ")[2]] != profile["total_mib"]} == set()


@pytest.mark.parametrize("profile", CATALOGUE["profiles"], ids=lambda profile: profile["name"])
def test_profiles_call_tools(profile: dict[str, Any]) -> None:
    entry = next(model for model in CATALOGUE["models"] if model["id"] == profile["model"])
    family = match_family(CATALOGUE["families"], entry["id"], shape(entry["shape"]).architecture)
    assert family is not None
    assert family["tool_call_parser"]
    assert not entry["gated"]


def test_the_suggested_models_are_shipped() -> None:
    """The directory of the tests links to the files that the playbook reads, so that both are one."""
    for entry in CATALOGUE["models"]:
        assert (MODELS / f"{entry['shape']}.json").resolve() == ROOT / "roles" / "vllm" / "files" / "models" / f"{entry['shape']}.json"


def test_keys_are_read_without_importing() -> None:
    source = "A = {'x': 1, 'y': 2}\nB: dict[str, int] = {'z': 3, **A}\nraise SystemExit"
    assert record_vllm.keys(source, ["A", "B"]) == ["x", "y", "z"]
    with pytest.raises(KeyError):
        record_vllm.keys(source, ["C"])
    assert "vllm" not in sys.modules
