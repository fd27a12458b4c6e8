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
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_arguments
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._model_files import ModelError
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_plan import PlanError
from ansible_collections.selfhosted.agent_stack.plugins.modules import vllm_plan

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parent / "data" / "models"
H100 = {"name": "NVIDIA H100 80GB HBM3", "total_mib": 81559, "reserved_mib": 480, "free_mib": 81079, "compute_capability": "9.0"}
RTX4090 = {"name": "NVIDIA GeForce RTX 4090", "total_mib": 24564, "compute_capability": "8.9"}


def model(directory: Path, name: str, **change: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(json.loads((MODELS / f"{name}.json").read_text()) | change))
    return str(directory)


def plan_parameters(model: str, **params: Any) -> dict[str, Any]:
    return {
        "model": model,
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
        "catalogue": yaml.safe_load((ROOT / "roles/vllm/vars/catalogue.yml").read_text())["__vllm_catalogue"],
        "registry": json.loads((ROOT / "roles/vllm/files/vllm-registry.json").read_text())["cuda"],
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-num-seqs", "8", "--max_num_seqs=16"], {"requests": 16}),
        (["--max-num-batched-tokens", "8k"], {"tokens": 8000}),
        (["--max-num-batched-tokens=2K"], {"tokens": 2048}),
        (["--no-enable-prefix-caching"], {"prefix_caching": False}),
        (["--no-enable-prefix-caching", "--enable-prefix-caching"], {"prefix_caching": True}),
        (["--language-model-only"], {"text_only": True}),
        (["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'], {"drafts": 3}),
        (["--speculative-config.method", "mtp", "--speculative-config.num_speculative_tokens", "2"], {"drafts": 2}),
        (["--block-size", "32", "--seed", "-1"], {"block": 32}),
        (["--enforce-eager", "--kv-cache-dtype", "fp8"], {"eager": True, "kv_cache_dtype": "fp8"}),
    ],
)
def test_arguments_are_read_as_vllm_reads_them(arguments: list[str], expected: dict[str, Any]) -> None:
    assert _vllm_arguments.read_arguments(arguments) == _vllm_arguments.Arguments(**expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-num-seqs", "many"], "--max-num-seqs is 'many'; allowed is a whole number from 1 to 100,000,000."),
        (["--max-num-seqs"], "--max-num-seqs is ''; allowed"),
        (["--kv-cache-dtype", "nvfp4"], "--kv-cache-dtype is 'nvfp4', which this plan cannot size; it can auto,"),
        (["--speculative-config", "{"], "--speculative-config is '{'; allowed is a JSON object."),
        (["--speculative-config", "[]"], "allowed is a JSON object."),
    ],
)
def test_arguments_that_cannot_be_read(arguments: list[str], said: str) -> None:
    with pytest.raises(PlanError) as error:
        _vllm_arguments.read_arguments(arguments)
    assert said in str(error.value)


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
    nothing = plan(model(tmp_path / "DeepSeek-V3", "deepseek-v3", quantization_config=None), survey=True, gpus=[], gpu_memory_utilization=0.5)
    assert (nothing["fits"], nothing["survey_table"][-1]) == (False, "none of these carries it")


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
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=120)
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
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == status, result.stdout + result.stderr
    assert said in " ".join(result.stdout.split())
    assert "changed=0" in result.stdout


def test_the_playbook_without_an_inventory_surveys(tmp_path: Path) -> None:
    program = shutil.which("ansible-playbook", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program
    settings = {"vllm_model": model(tmp_path / "Llama-3.1-8B", "llama-3.1-8b"), "vllm_plan_json": True, "ansible_python_interpreter": sys.executable}
    command = [program, "playbooks/plan.yml", "-i", os.devnull, "-e", json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"ANSIBLE_FORCE_COLOR": "0"}, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fetch_seconds" in result.stdout
    assert "H200" in result.stdout
