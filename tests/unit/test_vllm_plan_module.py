"""The module vllm_plan as a play sees it: each bad input its own sentence, and a plan that says how to serve and how to swap."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.action import vllm_plan as action_plugin
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_arguments, _vllm_survey
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._model_files import ModelError
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_plan import PlanError
from ansible_collections.selfhosted.agent_stack.plugins.modules import vllm_plan

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parent / "data" / "models"
H100 = {"name": "NVIDIA H100 80GB HBM3", "total_mib": 81559, "reserved_mib": 480, "free_mib": 81079, "compute_capability": "9.0"}
CATALOGUE = action_plugin.catalogue(with_shapes=True)
REGISTRY = json.loads((ROOT / "roles/vllm/files/vllm-registry.json").read_text())["cuda"]
KNOWN = REGISTRY["arguments"]
RTX4090 = {"name": "NVIDIA GeForce RTX 4090", "total_mib": 24564, "compute_capability": "8.9"}


def model(directory: Path, name: str, **change: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(json.loads((MODELS / f"{name}.json").read_text()) | change))
    return str(directory)


def plan_parameters(model: str, **params: Any) -> dict[str, Any]:
    return {
        "model": model,
        "suggest_for": "",
        "revision": "",
        "directories": [],
        "hub_url": "",
        "token": "",
        "gpus": [H100],
        "gpu_memory_utilization": 0.9,
        "max_model_len": 0,
        "tensor_parallel_size": 0,
        "pipeline_parallel_size": 1,
        "kv_cache_dtype": "auto",
        "enforce_eager": False,
        "language_model_only": False,
        "max_num_seqs": 0,
        "max_num_batched_tokens": 0,
        "quantization": "",
        "speculative_config": {},
        "lora_adapters": [],
        "extra_arguments": [],
        "unknown": "refuse",
        "image": "",
        "asked_directory": "",
        "asker": "",
        "survey": False,
        "tool_call_parser": "auto",
        "reasoning_parser": "auto",
        "disk_path": "",
        "serving": {},
        "timeout": 5,
        "catalogue": CATALOGUE,
        "registry": REGISTRY,
    } | params


def plan(model: str, **params: Any) -> dict[str, Any]:
    result: dict[str, Any] = vllm_plan.make_result(plan_parameters(model, **params))
    return result


def test_a_plan_says_how_to_serve(tmp_path: Path) -> None:
    result = plan(model(tmp_path / "Qwen--Qwen3-8B--main", "qwen3-8b"), max_model_len=16384)
    assert result["fits"]
    assert result["arguments"] == [
        *("--max-model-len", "16384", "--gpu-memory-utilization", "0.9", "--tensor-parallel-size", "1"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
    ]
    assert result["family"] == "Qwen3"
    assert result["swap"]["strategy"] == "start"
    assert "Qwen3-8B--main: 15.3 GiB of weights on 1 GPU" in result["summary"]
    assert result["kv_tokens"] == int(result["concurrent_contexts"] * 16384) or abs(result["kv_tokens"] / 16384 - result["concurrent_contexts"]) < 0.01


def test_a_70b_on_hopper_gets_the_faster_kernel_and_on_ada_does_not(tmp_path: Path) -> None:
    path = model(tmp_path / "Meta-Llama-3.1-70B-Instruct-AWQ-INT4", "llama-3.1-70b-awq")
    assert plan(path)["faster"] == {"arguments": ["--linear-backend", "humming"], "environment": {"HUMMING_CACHE_DIR": "/cache/humming"}}
    assert plan(path, gpus=[{"total_mib": 49140, "compute_capability": "8.9"}])["faster"] == {"arguments": [], "environment": {}}


def test_turing_is_told_to_use_half(tmp_path: Path) -> None:
    result = plan(model(tmp_path / "Llama-3.2-3B", "llama-3.2-3b"), gpus=[{"name": "Tesla T4", "total_mib": 15360, "compute_capability": "7.5"}])
    assert result["arguments"][6:8] == ["--dtype", "half"]


def serving(utilization: float) -> dict[str, Any]:
    slot = {"model": "blue", "condition": "running", "utilization": utilization, "weights_mib": 15360, "sleep_mode": True, "slept_before": False}
    return {"active": "blue", "slots": {"blue": slot}}


def test_what_does_not_fit_is_an_answer(tmp_path: Path) -> None:
    result = plan(model(tmp_path / "m", "llama-3.1-70b"), serving=serving(0.9))
    assert not result["fits"]
    assert result["reason"].startswith("the weights take 131.4 GiB")
    assert result["advice"].startswith("What would fit: a 4 bit version of it (AWQ, about 37 GiB)")
    assert (result["arguments"], result["swap"]["strategy"]) == ([], "none")


def test_a_swap_is_planned_against_what_runs(tmp_path: Path) -> None:
    result = plan(model(tmp_path / "m", "llama-3.2-3b"), gpus=[H100 | {"free_mib": 41079}], serving=serving(0.49), max_model_len=8192)
    assert result["swap"]["strategy"] == "side_by_side"
    assert result["arguments"][3] == f"{result['swap']['gpu_memory_utilization']:g}" != "0.9"


def test_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10 * 2**30))
    needed, sentence = vllm_plan.disk_of(str(tmp_path / "not" / "there" / "yet"), 16 * 2**30)
    assert needed == {"needed_mib": 16384, "free_mib": 10240}
    assert sentence == f"the model's files take 16.0 GiB, and {tmp_path}/not/there/yet has 10.0 GiB free."
    assert vllm_plan.disk_of(str(tmp_path), 0)[1] == ""
    assert vllm_plan.disk_of("", 16 * 2**30) == ({"needed_mib": 16384, "free_mib": -1}, "")


@pytest.mark.parametrize(
    ("change", "params", "said"),
    [
        ({}, {"gpu_memory_utilization": 1.5}, "the utilisation is 1.5; allowed is more than 0 and at most 1."),
        ({}, {"gpu_memory_utilization": 0.0}, "the utilisation is 0; allowed is more than 0 and at most 1."),
        ({}, {"max_model_len": 200000}, "a context of 200,000 tokens was asked for, and the model has at most 131,072."),
        ({}, {"tensor_parallel_size": 4}, "4 GPUs were asked for, and there are 1."),
        ({}, {"tool_call_parser": "llama3"}, "the pinned vLLM has no tool call parser llama3, for example llama3_json, "),
        ({}, {"reasoning_parser": "deepseek"}, "the pinned vLLM has no reasoning parser deepseek, for example deepseek_r1"),
        ({"architectures": ["NewForCausalLM"]}, {}, "the architecture NewForCausalLM is none that the pinned vLLM serves."),
        ({}, {"gpus": [{"name": "GPU"}]}, "gpus has an entry without a usable number: 'total_mib'; total_mib is needed, in MiB."),
        ({}, {"hub_url": "ftp://example.com"}, "allowed is an https URL"),
    ],
)
def test_bad_input(tmp_path: Path, change: dict[str, Any], params: dict[str, Any], said: str) -> None:
    with pytest.raises((PlanError, ModelError)) as error:
        plan(model(tmp_path / "m", "llama-3.1-8b", **change), **params)
    assert said in str(error.value)


def test_more_arguments_change_the_plan(tmp_path: Path) -> None:
    path = model(tmp_path / "Llama-3.1-8B-Instruct", "llama-3.1-8b")
    plain = plan(path, max_model_len=8192)
    assert plan(path, max_model_len=8192, extra_arguments=["--enforce-eager"])["overhead_mib"] < plain["overhead_mib"]
    for fp8 in ({"kv_cache_dtype": "fp8"}, {"extra_arguments": ["--kv_cache_dtype=fp8_e4m3"]}):
        assert plan(path, max_model_len=8192, **fp8)["kv_bytes_per_token"] * 2 == plain["kv_bytes_per_token"]
    assert plan(path, kv_cache_dtype="fp8")["model_arguments"][:2] == ["--kv-cache-dtype", "fp8"]


DRAFT = _vllm_arguments.Draft


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-num-seqs", "8", "--max_num_seqs=16"], {"requests": 16}),
        (["--max-num-batched-tokens", "8k"], {"tokens": 8000}),
        (["--max-num-batched-tokens=2K"], {"tokens": 2048}),
        (["--no-enable-prefix-caching"], {"prefix_caching": False}),
        (["--disable-prefix-caching"], {"prefix_caching": False}),
        (["--no-disable-prefix-caching"], {"prefix_caching": True}),
        (["--no-enable-prefix-caching", "--enable-prefix-caching"], {"prefix_caching": True}),
        (["--enable-prefix-caching", "--no-enable-prefix-caching"], {"prefix_caching": False}),
        (["--language-model-only"], {"text_only": True}),
        (["--limit-mm-per-prompt", '{"image": 0, "video": 0}'], {"text_only": True}),
        (["--limit-mm-per-prompt.image", "0", "--limit-mm-per-prompt.video=2"], {"text_only": False}),
        (["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'], {"draft": DRAFT(3, "mtp")}),
        (["--speculative-config.method", "mtp", "--speculative-config.num_speculative_tokens", "2"], {"draft": DRAFT(2, "mtp")}),
        (["-sc.model=o/draft", "-sc.num-speculative-tokens", "5", "-sc.revision", "v1"], {"draft": DRAFT(5, "", "o/draft", "v1")}),
        (["--spec-method", "ngram", "--spec-tokens", "4"], {"draft": DRAFT(4, "ngram")}),
        (["--block-size", "32", "--seed", "-1"], {"block": 32}),
        (["--enforce-eager", "--kv-cache-dtype", "fp8"], {"eager": True, "kv_cache_dtype": "fp8"}),
        (["--enforce-eager", "--no-enforce-eager"], {"eager": False}),
        (["-O0"], {"eager": True}),
        (["-O=0"], {"eager": True}),
        (["-O", "2"], {"eager": False}),
        (["-cc.mode=none", "-cc.cudagraph_mode=none"], {"eager": True}),
        (["--compilation-config", '{"cudagraph_capture_sizes": [1, 2, 4]}'], {"captured": 4}),
        (["--compilation-config.cudagraph_capture_sizes+", "1,8"], {"captured": 8}),
        (["--max-cudagraph-capture-size", "16"], {"captured": 16}),
        (["-q", "FP8", "--dtype", "float32"], {"quantization": "fp8", "element": 4}),
        (["--mamba-ssm-cache-dtype", "float32"], {"state_element": 4}),
        (
            ["--max-model-len", "16k", "-tp=2", "-pp", "3", "--data_parallel_size=2"],
            {"context": 16000, "tensor_parallel": 2, "pipeline_parallel": 3, "data_parallel": 2},
        ),
        (["--max-model-len", "-1"], {"context": -1}),
        (["--max-model-len", "auto"], {"context": -1}),
        (["--device-memory-utilization", "0.8"], {"utilization": 0.8}),
        (["--kv-cache-memory-bytes", "4G", "--cpu-offload-gb", "2"], {"cache_bytes": 4 * 2**30, "offloaded_bytes": 2 * 2**30}),
        (["--no-async-scheduling"], {"one_step": True}),
        (["--enable-lora", "--max-loras", "4", "--max-lora-rank", "64"], {"loras": 4, "lora_rank": 64}),
        (["--max-loras", "4"], {"loras": 0}),
        (["--hf-overrides", '{"num_hidden_layers": 2}'], {"overrides": {"num_hidden_layers": 2}}),
        (["--hf-overrides.text_config.num_hidden_layers", "2"], {"overrides": {"text_config": {"num_hidden_layers": 2}}}),
        # A beginning that only one name has.
        (["--max-num-seq", "8", "--enforce"], {"requests": 8, "eager": True}),
        (["--chat-template", "/models/it's $odd.jinja", "--lora-modules", "a=/x", "b=/y"], {}),
    ],
)
def test_arguments_are_read_as_vllm_reads_them(arguments: list[str], expected: dict[str, Any]) -> None:
    assert _vllm_arguments.read_arguments(arguments, KNOWN) == _vllm_arguments.Arguments(**expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-num-seqs", "many"], "--max-num-seqs is 'many'; allowed is a whole number from 1 to 100,000,000."),
        (["--max-num-seqs"], "--max-num-seqs is ''; allowed"),
        (["--kv-cache-dtype", "nvfp4"], "--kv-cache-dtype is 'nvfp4', which this plan cannot size; it can auto,"),
        (["--speculative-config", "{"], "--speculative-config is '{'; allowed is a JSON object."),
        (["--speculative-config", "[" * 100_000], "allowed is a JSON object."),
        (["--speculative-config", "[]"], "allowed is a JSON object."),
        (["--speculative-config", '{"num_speculative_tokens": 2}'], "--speculative-config has neither a method nor a model"),
        (["--speculative-config", '{"method": 7, "num_speculative_tokens": 2}'], "--speculative-config has 7 as method; allowed is a word."),
        (["-sc", '{"method": "mtp"}', "--spec-method", "ngram"], "--spec-method says what --speculative-config says too, its method"),
        (["--enforce-eager=false"], "--enforce-eager has the value 'false'; it takes none, and --no-enforce-eager switches it off."),
        (["--gpu-memory-utilization", "90"], "--gpu-memory-utilization is '90'; allowed is a number from 0 to 1."),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization is '0'; allowed is more than 0 and at most 1."),
        (["--cpu-offload-gb", "all"], "--cpu-offload-gb is 'all'; allowed is a number from 0 to 100,000."),
        (["--max-num-sequences", "8"], "vllm_extra_arguments has '--max-num-sequences', which the pinned vLLM does not know; it has --max-num-"),
        (["--disable-log-requests-at-all"], "which the pinned vLLM does not know"),
        (
            ["--max-num", "8"],
            "vllm_extra_arguments has '--max-num', which the pinned vLLM cannot tell from others; it has --max-num-active-seqs, --max-num-batched-tokens, ",
        ),
        (["--dtype", "int3"], "--dtype is 'int3', which this plan cannot size; it can auto, half,"),
    ],
)
def test_arguments_that_cannot_be_read(arguments: list[str], said: str) -> None:
    with pytest.raises(PlanError) as error:
        _vllm_arguments.read_arguments(arguments, KNOWN)
    assert said in str(error.value)


def test_every_argument_that_the_plan_reads_is_vllms() -> None:
    read = [*_vllm_arguments.ALIASES, *_vllm_arguments.ALIASES.values(), *_vllm_arguments.SWITCHES, *_vllm_arguments.OBJECTS]
    assert set(read) <= set(KNOWN)


def test_options_are_arguments(tmp_path: Path) -> None:
    path = model(tmp_path / "Llama-3.1-8B-Instruct", "llama-3.1-8b")
    options = {"enforce_eager": True, "max_num_seqs": 8, "max_num_batched_tokens": 2048, "quantization": "fp8", "language_model_only": True}
    result = plan(path, max_model_len=8192, speculative_config={"method": "ngram", "num_speculative_tokens": 2}, **options)
    assert result["model_arguments"][:10] == [
        *("--enforce-eager", "--language-model-only", "--max-num-seqs", "8", "--max-num-batched-tokens", "2048", "--quantization", "fp8"),
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'),
    ]
    same = ["--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "2048", "-q", "fp8"]
    assert plan(path, max_model_len=8192, extra_arguments=same)["kv_tokens"] == result["kv_tokens"]
    with pytest.raises(PlanError, match="max_num_seqs is -1; allowed is a whole number from 1, or 0 for vLLM's own"):
        plan(path, max_num_seqs=-1)


def carried(tmp_path: Path, arguments: list[str], name: str = "llama-3.1-8b", **params: Any) -> dict[str, Any]:
    return plan(model(tmp_path / name, name), extra_arguments=arguments, **{"max_model_len": 8192} | params)


@pytest.mark.parametrize(
    ("arguments", "key", "factor"),
    [
        # 6.98 of 8.03 billion parameters in 8 bits.
        (["--quantization", "fp8"], "weights_mib", 0.565),
        (["-q=mxfp8"], "weights_mib", 0.579),
        (["--dtype", "float32"], "weights_mib", 2.0),
        (["--dtype", "float32"], "kv_bytes_per_token", 2.0),
        (["--cpu-offload-gb", "4"], "weights_mib", 1 - 4096 / 15317),
    ],
)
def test_what_an_argument_changes(tmp_path: Path, arguments: list[str], key: str, factor: float) -> None:
    assert carried(tmp_path, arguments)[key] / carried(tmp_path, [])[key] == pytest.approx(factor, rel=0.02)


def test_a_cache_of_some_bytes(tmp_path: Path) -> None:
    """It counts whatever share of the memory is asked for, as long as it is there."""
    for utilization in (0.3, 0.9):
        assert carried(tmp_path, ["--kv-cache-memory-bytes", "8G"], gpu_memory_utilization=utilization)["kv_tokens"] == 8 * 2**30 // 131072
    assert carried(tmp_path, ["--kv-cache-memory-bytes", "900G"])["kv_cache_mib"] < 81079 - 15317


def test_the_last_word_is_the_arguments(tmp_path: Path) -> None:
    result = carried(tmp_path, ["--max-model-len", "4096", "--gpu-memory-utilization", "0.5", "-tp", "2"], gpus=[H100] * 2)
    assert (result["max_model_len"], result["tensor_parallel_size"]) == (4096, 2)
    assert result["kv_cache_mib"] == carried(tmp_path, [], gpus=[H100] * 2, gpu_memory_utilization=0.5, tensor_parallel_size=2)["kv_cache_mib"]
    with pytest.raises(PlanError, match=r"--data-parallel-size is 4, and each copy takes 1 of the 2 GPUs"):
        carried(tmp_path, ["-dp", "4"], gpus=[H100] * 2)


def test_graphs_and_adapters_take_memory(tmp_path: Path) -> None:
    plain = carried(tmp_path, [])["overhead_mib"]
    assert carried(tmp_path, ["--max-cudagraph-capture-size", "8"])["overhead_mib"] < plain
    # Llama 3.1 8B, rank 64: q and o 8,192 each, k and v 5,120 each, gate, up and down 18,432 each, in 32 layers, 16 bits; and the logits.
    adapters = carried(tmp_path, ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "64"])["overhead_mib"] - plain
    assert adapters == pytest.approx(4 * 64 * 2 * (32 * (2 * 8192 + 2 * 5120 + 3 * 18432) + 128256 + 4096) / 2**20, abs=1)


def test_a_draft_takes_weights_and_cache(tmp_path: Path) -> None:
    draft = model(tmp_path / "Llama-3.2-1B", "llama-3.2-1b")
    plain = carried(tmp_path, [])
    guessed = carried(tmp_path, ["--speculative-config", json.dumps({"model": draft, "num_speculative_tokens": 3})])
    # 1.24 billion parameters, and 16 layers of 8 heads of 64 in 16 bits.
    assert guessed["weights_mib"] - plain["weights_mib"] == pytest.approx(1_235_814_400 * 2 / 2**20, rel=0.01)
    assert guessed["kv_bytes_per_token"] - plain["kv_bytes_per_token"] == 16 * 8 * 64 * 2 * 2
    unread = carried(tmp_path, ["--spec-model", "/nowhere", "--spec-tokens", "3"])
    assert any(warning.startswith("What guesses tokens ahead is not in the plan: /nowhere does not exist") for warning in unread["warnings_found"])


def test_the_models_own_head_takes_a_layer(tmp_path: Path) -> None:
    arguments = ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}']
    plain, guessed = (carried(tmp_path, more, "qwen3-next-80b", gpus=[H100] * 4, tensor_parallel_size=4) for more in ([], arguments))
    assert guessed["kv_bytes_per_token"] * 12 == plain["kv_bytes_per_token"] * 13
    assert guessed["weights_mib"] / plain["weights_mib"] == pytest.approx(1 + 1 / 48, rel=0.01)


def test_overrides_are_the_models_configuration(tmp_path: Path) -> None:
    result = carried(tmp_path, ["--hf-overrides", '{"num_hidden_layers": 16}'])
    assert result["layers"] == [{"kind": "full", "layers": 16, "bytes": 4096}]


@pytest.mark.parametrize(
    ("name", "change", "arguments", "said"),
    [
        ("llama-3.1-8b", {}, ["-q", "awq"], "--quantization is 'awq', and the model's files are not quantised; allowed for them is experts_int8, fp8,"),
        ("llama-3.1-8b-awq", {}, ["-q", "fp8"], "--quantization is 'fp8', and the model's files are quantised otherwise (awq); allowed is to leave it out."),
        ("llama-3.1-8b", {"quantization_config": {"quant_method": "fbgemm_fp8"}}, [], "vLLM has deprecated the quantisation fbgemm_fp8; --allow-deprecated-"),
        ("llama-3.1-8b", {"quantization_config": {"quant_method": "bitsandbytes"}}, [], "since 0.28 it needs the plugin vllm-bnb-plugin"),
    ],
)
def test_quantisations_that_vllm_does_not_start_with(tmp_path: Path, name: str, change: dict[str, Any], arguments: list[str], said: str) -> None:
    with pytest.raises(PlanError) as error:
        plan(model(tmp_path / "m", name, **change), extra_arguments=arguments)
    assert said in str(error.value)


def test_quantisations_that_are_allowed_all_the_same(tmp_path: Path) -> None:
    for name, change, params in (
        ("llama-3.1-8b-awq", {}, {"extra_arguments": ["-q", "awq_marlin"]}),
        ("llama-3.1-8b", {"quantization_config": {"quant_method": "fbgemm_fp8"}}, {"extra_arguments": ["--allow-deprecated-quantization"]}),
        ("llama-3.1-8b", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {"unknown": "serve"}),
    ):
        assert plan(model(tmp_path / "m", name, **change), max_model_len=8192, **params)["fits"]


def test_an_architecture_without_a_formula(tmp_path: Path) -> None:
    path = model(tmp_path / "Zeta", "llama-3.1-8b", architectures=["Plamo3ForCausalLM"])
    with pytest.raises(PlanError, match=r"no formula is known for the caches of Plamo3ForCausalLM, .* vllm_plan_unknown: serve serves it all the same"):
        plan(path, max_model_len=8192)
    served = plan(path, max_model_len=8192, unknown="serve")
    assert (served["fits"], served["tool_call_parser"], served["family_by"]) == (True, "plamo3", "architecture")
    assert any("counted as if every layer kept all tokens" in warning for warning in served["warnings_found"])
    too_large = plan(path, max_model_len=8192, unknown="serve", gpus=[{"total_mib": 8192}])
    assert (too_large["fits"], too_large["reason"]) == (True, "")
    assert any(warning.startswith("By that count it does not fit: the weights take 15.0 GiB") for warning in too_large["warnings_found"])


def test_in_check_mode_an_unknown_architecture_is_a_warning(tmp_path: Path) -> None:
    path = model(tmp_path / "Zeta", "llama-3.1-8b", architectures=["Plamo3ForCausalLM"])
    params = plan_parameters(path, max_model_len=8192)
    assert any("No formula is known" in warning for warning in vllm_plan.make_result(params, check_mode=True)["warnings_found"])


def test_models_are_told_apart(tmp_path: Path) -> None:
    guard = plan(model(tmp_path / "Llama-Guard-3-8B", "llama-3.1-8b"))
    assert (guard["kind"], guard["tool_call_parser"]) == ("guard", "")
    with pytest.raises(
        PlanError, match="Qwen2ForRewardModel is a reward model, which answers with a mark and not with text; the agent needs a model that chats"
    ):
        plan(model(tmp_path / "rm", "qwen2.5-7b", architectures=["Qwen2ForRewardModel"]))


def test_a_survey_says_which_gpus_carry_a_model(tmp_path: Path) -> None:
    result = plan(model(tmp_path / "Qwen3-32B", "qwen3-32b"), survey=True, gpus=[], max_model_len=32768)
    rows = {(row["gpus"], row["gb"]): row for row in result["survey"]}
    assert set(rows) == {(count, gb) for count in (1, 2, 4, 8) for gb in (16, 24, 32, 40, 48, 80, 96, 141, 180, 192)}
    assert (rows[1, 24]["fits"], rows[1, 141]["fits"], rows[2, 80]["link"], rows[2, 48]["link"]) == (False, True, "NVLink", "PCIe")
    assert rows[1, 80]["helps"] == "a KV cache in fp8" or "context of" in rows[1, 80]["helps"]
    # More GPUs of a kind never carry less.
    for gb in (24, 48, 80):
        contexts = [rows[count, gb]["context"] for count in (1, 2, 4, 8)]
        assert contexts == sorted(contexts)
    assert result["fits"]
    assert len(result["survey_table"]) > 5
    assert result["fetching"] == {"disk_gib": 61.0, "fetch_seconds": 524, "read_seconds": 61}
    nothing = plan(model(tmp_path / "DeepSeek-V3", "deepseek-v3", quantization_config=None), survey=True, gpus=[], gpu_memory_utilization=0.1)
    assert (nothing["fits"], nothing["survey_table"][-1]) == (False, "none of these carries it")


def test_a_survey_says_what_would_make_it_fit(tmp_path: Path) -> None:
    """32 billion parameters in 16 bits do not fit on 32 GB, and in 4 bits they do."""
    rows = {(row["gpus"], row["gb"]): row for row in plan(model(tmp_path / "Qwen3-32B", "qwen3-32b"), survey=True, gpus=[])["survey"]}
    assert (rows[1, 32]["fits"], rows[1, 32]["helps"]) == (False, "a 4 bit version of it (18 GiB)")
    assert (rows[1, 16]["fits"], rows[1, 16]["helps"]) == (False, "")


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("24", "L4, RTX 4090", 1),
        ("80 GB", "H100 80 GB", 1),
        ("2x24", "L4, RTX 4090", 2),
        ("4 x H100", "H100 80 GB", 4),
        ("8 X 141gb", "H200", 8),
        ("rtx 4090", "L4, RTX 4090", 1),
    ],
)
def test_gpus_are_named(text: str, name: str, count: int) -> None:
    gpus = _vllm_survey.gpus_named(text)
    assert ({gpu.name for gpu in gpus}, len(gpus)) == ({name}, count)


@pytest.mark.parametrize("text", ["", "3 x 24", "25", "x", "100 x 24", "TPU", "H", "4"])
def test_gpus_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match=r"plan_gpu is .*; allowed is a size in GB \(16, 24, .*as in 2 x 24\."):
        _vllm_survey.gpus_named(text)


def suggested(gpu: str, **params: Any) -> list[dict[str, Any]]:
    return list(vllm_plan.make_result(plan_parameters("", suggest_for=gpu, **params))["suggestions"])


def test_models_for_a_gpu() -> None:
    rows = suggested("24")
    fitting = [row["model"] for row in rows if row["fits"]]
    assert fitting[:2] == ["openai/gpt-oss-20b", "Qwen/Qwen3-8B"]
    assert suggested("32")[0]["model"] == "RedHatAI/Qwen3.8-27B-INT4"
    assert not any(row["fits"] for row in rows[len(fitting) :])
    assert {row["model"]: row["helps"] for row in rows}["Qwen/Qwen3-32B"].startswith("What would fit: 4 such GPUs, or a GPU of ")
    larger = [row["model"] for row in suggested("8 x 141") if row["fits"]]
    assert larger[0] == "zai-org/GLM-4.7-FP8"
    # Its 28 heads cannot be shared by 8 GPUs.
    assert set(fitting) - set(larger) == {"Qwen/Qwen2.5-7B-Instruct"}
    # A longer context is for fewer at once, and no longer for all.
    shorter, longer = ({row["model"]: row["users"] for row in suggested("24", max_model_len=context) if row["fits"]} for context in (4096, 32768))
    assert set(longer) < set(shorter)
    assert all(longer[name] < shorter[name] for name in longer)


def test_the_layers_are_shown(tmp_path: Path) -> None:
    result = plan(model(tmp_path / "Qwen3.5-27B", "qwen3.5-27b"), max_model_len=8192)
    assert result["layers"] == [{"kind": "state", "layers": 48, "bytes": 3207168}, {"kind": "full", "layers": 16, "bytes": 4096}]


def test_a_host_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match="there is no GPU to plan for"):
        plan(model(tmp_path / "m", "llama-3.1-8b"), gpus=[])


def test_mig_leaves_the_largest_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"uuid": f"MIG-{size}", "name": f"MIG {size}", "total_mib": size, "used_mib": 0, "free_mib": size, "reserved_mib": 0} for size in (10000, 40448)]
    report = {"gpus": [{"mig_mode": "enabled", "mig_devices": parts, "compute_capability": "9.0", "total_mib": 81559}], "reason": ""}
    monkeypatch.setattr(vllm_plan._nvml, "gpu_report", lambda executable, timeout: report)
    assert [gpu["total_mib"] for gpu in vllm_plan.host_gpus(5)] == [40448]


def ansible(arguments: dict[str, Any]) -> tuple[int, str]:
    program = shutil.which("ansible", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program
    command = [program, "localhost", "--check", "-m", "selfhosted.agent_stack.vllm_plan", "-a", json.dumps(arguments)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=600)
    return result.returncode, " ".join(result.stdout.split())


def test_the_action_brings_the_catalogue(tmp_path: Path) -> None:
    path = model(tmp_path / "Qwen2.5-7B-Instruct", "qwen2.5-7b")
    status, output = ansible({"model": path, "gpus": [RTX4090], "max_model_len": 16384})
    assert status == 0, output
    assert "fits: true" in output
    assert "tool_call_parser: hermes" in output
    status, output = ansible({"model": path, "gpus": [RTX4090], "tool_call_parser": "hermit"})
    assert status != 0
    assert "the pinned vLLM has no tool call parser hermit, for example hermes." in output


@pytest.mark.parametrize(
    ("name", "context", "status", "said"),
    [
        ("llama-3.1-8b", 16384, 0, "--tool-call-parser llama3_json --chat-template /vllm-workspace/examples/tool_chat_template_llama3.1_json.jinja"),
        ("llama-3.1-8b", 131072, 2, "llama-3.1-8b does not fit: "),
        ("something", 16384, 2, 'vllm_tool_call_parser is "auto", and the catalogue knows no parser for '),
    ],
)
def test_the_playbook(tmp_path: Path, name: str, context: int, status: int, said: str) -> None:
    program = shutil.which("ansible-playbook", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program
    settings = {
        "vllm_model": model(tmp_path / name, "llama-3.1-8b"),
        "vllm_plan_gpus": [RTX4090],
        "vllm_max_model_len": context,
        "ansible_python_interpreter": sys.executable,
    }
    command = [program, "playbooks/plan.yml", "-i", "localhost,", "-c", "local", "--check", "-e", json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == status, result.stdout + result.stderr
    assert said in " ".join(result.stdout.split())
    assert "changed=0" in result.stdout


def test_the_playbook_names_models_for_a_gpu() -> None:
    program = shutil.which("ansible-playbook", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program
    settings = {"plan_gpu": "2 x 24", "ansible_python_interpreter": sys.executable}
    command = [program, "playbooks/plan.yml", "-i", os.devnull, "-e", json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Qwen/Qwen3.8-27B-FP8" in result.stdout
    assert "zai-org/GLM-4.7-FP8" not in result.stdout


def test_the_playbook_without_an_inventory_surveys(tmp_path: Path) -> None:
    program = shutil.which("ansible-playbook", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program
    settings = {"vllm_model": model(tmp_path / "Llama-3.1-8B", "llama-3.1-8b"), "vllm_plan_json": True, "ansible_python_interpreter": sys.executable}
    command = [program, "playbooks/plan.yml", "-i", os.devnull, "-e", json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fetch_seconds" in result.stdout
    assert "H200" in result.stdout
