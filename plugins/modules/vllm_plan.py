#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: does a model fit on the GPUs, what does it carry there, and how to swap to it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_plan
short_description: Plan a model on the host's GPUs before it is fetched or started
version_added: 0.2.0
description:
  - Reads a model's C(config.json) and the index or headers of its safetensors files, from a directory, a cache or the hub, and never its weights.
    Asks the host for its GPUs. Tells whether vLLM can serve the model there, how long a context it can have and how many fit at once,
    with which arguments, and how to change to it from what runs now.
  - A model that does not fit is an answer, not a failure - RV(fits) is false, RV(reason) says why and RV(advice) what would fit. An input from which no
    plan can be made is a failure with one sentence - a model that does not exist, a gated one without a token, an architecture, a quantisation or a
    parser that the pinned vLLM does not know, a model that answers with vectors or marks, a context beyond the model's, a broken safetensors index.
  - The KV cache is counted as vLLM counts it. On an H100 the tokens that vLLM 0.26 logged for 11 models were 1 to 6 % more than planned, because vLLM 0.33
    sets memory for CUDA graphs aside and 0.26 did not. What several GPUs need for talking to each other is an assumption.
options:
  model:
    description: Id on the hub, or the absolute path of a directory on the host. Needed unless O(suggest_for) is given.
    type: str
    default: ""
  revision:
    description: Commit, tag or branch on the hub. Empty means its main branch.
    type: str
    default: ""
  directories:
    description: Directories on the host in which the model may already be - a Hugging Face cache, or the directory of models of the role C(vllm).
    type: list
    elements: path
    default: []
  hub_url:
    description: The hub or a mirror of it. Empty means that it is not asked.
    type: str
    default: https://huggingface.co
  token:
    description: Token for a gated model. It is sent to O(hub_url) alone, and only over https.
    type: str
    default: ""
  gpus:
    description:
      - GPUs to plan for, as M(selfhosted.agent_stack.gpu_vram_info) returns them. C(total_mib) is needed, C(name), C(free_mib), C(reserved_mib) and
        C(compute_capability) are used if given. Without any, the host is asked for its own.
    type: list
    elements: dict
    default: []
  gpu_memory_utilization:
    description: Share of each GPU's memory that vLLM may use, more than 0 and at most 1.
    type: float
    default: 0.9
  max_model_len:
    description: Context that must fit, prompt and answer together, in tokens. 0 means the longest that fits.
    type: int
    default: 0
  tensor_parallel_size:
    description: Number of GPUs of one host that share the model. 0 means the smallest that fits.
    type: int
    default: 0
  pipeline_parallel_size:
    description: Number of hosts with such GPUs that share the model's layers.
    type: int
    default: 1
  kv_cache_dtype:
    description: How keys and values are kept. V(fp8) halves them. V(auto) is what the checkpoint asks for, and 16 bits if it asks for nothing.
    type: str
    choices: [auto, fp8, fp8_e4m3, fp8_e5m2, bfloat16, float16]
    default: auto
  enforce_eager:
    description: Whether vLLM captures no CUDA graphs, which leaves more memory and is slower.
    type: bool
    default: false
  language_model_only:
    description: Whether a model that also takes images or sound is loaded without what reads them.
    type: bool
    default: false
  max_num_seqs:
    description: How many requests run at once. 0 means vLLM's own choice for the GPU.
    type: int
    default: 0
  max_num_batched_tokens:
    description: How many tokens one step of the engine takes. 0 means vLLM's own choice for the GPU.
    type: int
    default: 0
  quantization:
    description:
      - How weights that are not quantised are made smaller while they are loaded, for example V(fp8), or a name of what the model's files have anyway.
        Empty means as they are.
    type: str
    default: ""
  speculative_config:
    description:
      - Speculative decoding, as C(--speculative-config) takes it, with C(method), C(num_speculative_tokens) and, unless the model's own head guesses,
        C(model). The weights and the cache of what guesses are in the plan.
    type: dict
    default: {}
  lora_adapters:
    description:
      - LoRA adapters that are served beside the model, each with C(name), by which requests ask for it, C(source), an id on the hub or a directory of the
        host, and C(revision) if it is not the main branch. What vLLM does not take is refused, and their memory is in the plan.
    type: list
    elements: dict
    default: []
  extra_arguments:
    description:
      - More arguments of C(vllm serve) with which the model will be started. They are read as vLLM reads them, and one that it does not have is refused.
        Counted are those above, the sizes of the model's context, batch, blocks and GPUs, C(--dtype), C(--kv-cache-memory-bytes), C(--cpu-offload-gb),
        C(--mamba-ssm-cache-dtype), C(--compilation-config), C(--enable-lora) and C(--hf-overrides).
    type: list
    elements: str
    default: []
  survey:
    description:
      - Whether to answer for the GPUs that one can rent, 1 to 8 of each, instead of for some of them - RV(survey) and RV(survey_table). The rest of the
        result is then for the first of them that carries the model, so that no GPU is needed where this runs.
    type: bool
    default: false
  image:
    description:
      - Reference of vLLM's image. An architecture whose caches no formula knows is then asked of vLLM itself, inside the image on this host, without
        a GPU, a network or weights. It takes about half a minute. Where the image is not on the host yet, RV(pending) says so.
    type: str
    default: ""
  asked_directory:
    description: Directory on the host in which vLLM's answers are kept, by image and by the model's files. Empty means that none is kept.
    type: path
    default: ""
  suggest_for:
    description:
      - GPUs that models of the catalogue are to be named for, best first - a size in GB or a name, and 1, 2, 4 or 8 before it, such as V(24), V(H100) or
        V(4 x 80). The result then has RV(suggestions) and RV(suggestions_table) alone, and neither a hub nor a GPU is asked.
    type: str
    default: ""
  unknown:
    description:
      - What to do with an architecture whose caches no formula knows, and which vLLM is not asked for or does not build. V(refuse) fails, in check mode
        it warns. V(serve) plans it as if every layer kept all tokens, and what the plan then says of its memory is a warning. It also serves a
        quantisation or an architecture that the recorded vLLM does not have, for images with more in them.
    type: str
    choices: [refuse, serve]
    default: refuse
  tool_call_parser:
    description: vLLM's parser for tool calls. V(auto) takes it from the catalogue, empty means none.
    type: str
    default: auto
  reasoning_parser:
    description: vLLM's parser for what a model thinks. V(auto) takes it from the catalogue, empty means none.
    type: str
    default: auto
  disk_path:
    description: Directory into which the model would be fetched. Its file system must have room for what is not there yet. Empty means that it is not checked.
    type: path
    default: ""
  serving:
    description:
      - What serves now, as M(selfhosted.agent_stack.vllm_swap) returns it with C(state=status) - C(active) and C(slots). Leave it out if nothing does.
    type: dict
    default: {}
  timeout:
    description: Time for each question to the hub and to the driver, in seconds.
    type: int
    default: 30
  catalogue:
    description: Model families and their parsers. Without it, the collection's own from C(roles/vllm/vars/catalogue.yml).
    type: dict
  registry:
    description: The parsers and architectures of the vLLM that will serve. Without it, those of the pinned one from C(roles/vllm/files/vllm-registry.json).
    type: dict
  asker:
    description: The program that asks vLLM inside O(image). Without it, the collection's own from C(roles/vllm/files/ask_vllm.py).
    type: str
attributes:
  check_mode:
    description: The module only reads.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Plan a model that is not on the host yet
  selfhosted.agent_stack.vllm_plan:
    model: Qwen/Qwen3-8B
    max_model_len: 16384
    disk_path: /var/lib/agent-stack
  register: plan

- name: Stop before anything changes
  ansible.builtin.assert:
    that: plan.fits
    fail_msg: "{{ plan.reason }} {{ plan.advice }}"

- name: Plan for a server that is not bought yet
  selfhosted.agent_stack.vllm_plan:
    model: hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4
    gpus:
      - {name: RTX 6000 Ada, total_mib: 49140, compute_capability: "8.9"}
  delegate_to: localhost
"""

RETURN = r"""
fits:
  description: Whether vLLM can serve the model as asked.
  returned: success
  type: bool
  sample: true
reason:
  description: Why it does not fit, one sentence. Empty if it does.
  returned: success
  type: str
  sample: ""
advice:
  description: What would fit, one sentence. Empty if it fits.
  returned: success
  type: str
  sample: ""
warnings_found:
  description: What the plan cannot know or what may surprise.
  returned: success
  type: list
  elements: str
  sample: []
summary:
  description: The plan in one line.
  returned: success
  type: str
  sample: "Qwen/Qwen3-8B: 15.3 GiB of weights on 1 GPU, 54.1 GiB of KV cache for 393,000 tokens, 24.0 contexts of 16,384"
arguments:
  description: Arguments for C(vllm serve) that follow from the plan.
  returned: success
  type: list
  elements: str
  sample: [--max-model-len, "16384", --gpu-memory-utilization, "0.9", --tensor-parallel-size, "1", --enable-auto-tool-choice, --tool-call-parser, hermes]
model_arguments:
  description: Those of RV(arguments) that follow from the model and the kind of GPU, and not from what is free at the moment.
  returned: success
  type: list
  elements: str
  sample: [--enable-auto-tool-choice, --tool-call-parser, hermes]
faster:
  description: C(arguments) of C(vllm serve), a list, and C(environment) variables that were measured to make such a model faster on such a GPU.
  returned: success
  type: dict
  sample: {arguments: [--linear-backend, humming], environment: {HUMMING_CACHE_DIR: /cache/humming}}
max_model_len:
  description: The context, in tokens.
  returned: success
  type: int
  sample: 16384
longest_context:
  description: The longest context that fits, in tokens, at most the model's own.
  returned: success
  type: int
  sample: 40960
concurrent_contexts:
  description: How many requests of full length the KV cache holds.
  returned: success
  type: float
  sample: 24.0
kv_tokens:
  description: Tokens that the KV cache holds, as vLLM will log them (C(GPU KV cache size)).
  returned: success
  type: int
  sample: 393000
kv_bytes_per_token:
  description: Bytes of one token on each GPU.
  returned: success
  type: int
  sample: 147456
weights_mib:
  description: Weights on each GPU, in MiB.
  returned: success
  type: int
  sample: 15625
overhead_mib:
  description: What the engine needs on each GPU beside weights and KV cache, in MiB.
  returned: success
  type: int
  sample: 2400
kv_cache_mib:
  description: KV cache on each GPU, in MiB.
  returned: success
  type: int
  sample: 55400
tensor_parallel_size:
  description: Number of GPUs.
  returned: success
  type: int
  sample: 1
family:
  description: The catalogue's name for the model's family. Empty if it has none.
  returned: success
  type: str
  sample: Qwen3
family_by:
  description: V(name) if the model's name says its family, V(architecture) if only its architecture does. Empty without a family.
  returned: success
  type: str
  sample: name
planned_by:
  description:
    - V(formula), V(vllm) if vLLM itself was asked, or V(guess) for an architecture that neither knows.
  returned: success
  type: str
  sample: formula
pending:
  description: Whether the model can only be planned once vLLM's image is on the host. The rest of the result is then a guess.
  returned: success
  type: bool
  sample: false
kind:
  description: V(chat), or V(guard) for a model that judges what others write.
  returned: success
  type: str
  sample: chat
layers:
  description: What the layers keep on each GPU - C(kind), how many C(layers), C(bytes) of one token or of a request's state, and C(window) in tokens.
  returned: success
  type: list
  elements: dict
  sample: [{kind: full, layers: 36, bytes: 4096}]
tool_call_parser:
  description: Parser for tool calls. Empty if there is none.
  returned: success
  type: str
  sample: hermes
reasoning_parser:
  description: Parser for what the model thinks. Empty if there is none.
  returned: success
  type: str
  sample: qwen3
model_info:
  description: C(architecture), C(quantization), C(parameters), C(max_context), C(origin) where it was read, and C(revision), the commit if the hub was asked.
  returned: success
  type: dict
  sample: {architecture: Qwen3ForCausalLM, quantization: bf16, parameters: 8190735360, max_context: 40960, origin: "https://huggingface.co", revision: main}
survey:
  description: With O(survey), what each kind and number of GPUs carries - C(gpus), C(gb), C(link), C(fits), C(context), C(users), C(reason) and C(helps).
  returned: success
  type: list
  elements: dict
  sample: [{gpus: 1, gb: 24, example: "L4, RTX 4090", link: "", fits: true, context: 32768, users: 2.5, reason: "", helps: ""}]
survey_table:
  description: RV(survey) as lines of a table.
  returned: success
  type: list
  elements: str
  sample: []
suggestions:
  description:
    - With O(suggest_for), the catalogue's models, those that fit first - C(model), C(fits), C(weights_gib), the longest C(context), how many C(users) have
      C(at_context) tokens at once, C(tool_call_parser), C(gated), and what C(helps) where it does not fit.
  returned: success
  type: list
  elements: dict
  sample: []
suggestions_table:
  description: Those of RV(suggestions) that fit, as lines of a table.
  returned: success
  type: list
  elements: str
  sample: []
fetching:
  description: What the weights take on the disk (C(disk_gib)), and seconds to fetch them at 1 Gbit/s and to read them from the disk.
  returned: success
  type: dict
  sample: {disk_gib: 15.3, fetch_seconds: 131, read_seconds: 15}
disk:
  description: C(needed_mib) still to be fetched, and C(free_mib) in O(disk_path). C(free_mib) is -1 if it was not checked.
  returned: success
  type: dict
  sample: {needed_mib: 15640, free_mib: 204800}
swap:
  description:
    - How to change from what runs - C(strategy) is V(start) if nothing runs, V(side_by_side), V(sleep), V(hold_and_recreate), or V(none) if the model does not
      fit. C(hold_seconds) is how long requests will wait, C(gpu_memory_utilization) the share that the new model must be started with, C(reason) one sentence.
  returned: success
  type: dict
  sample: {strategy: start, hold_seconds: 0.0, gpu_memory_utilization: 0.9, reason: nothing runs now}
"""

import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import (  # noqa: E402
    _lora_adapters,
    _model_files,
    _nvml,
    _vllm_arguments,
    _vllm_ask,
    _vllm_catalogue,
    _vllm_change,
    _vllm_config,
    _vllm_host,
    _vllm_plan,
    _vllm_specs,
    _vllm_survey,
    _vllm_weights,
)
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import GIB, MIB, PlanError, UnknownArchitecture  # noqa: E402

# A fetch also writes what is not weights, and file systems keep a reserve.
DISK_MARGIN = GIB


def host_gpus(timeout: int) -> list[dict[str, Any]]:
    """Return the host's own GPUs. Raises PlanError."""
    report = _nvml.gpu_report(shutil.which("nvidia-smi"), timeout)
    if not report["gpus"]:
        raise PlanError(f"there is no GPU to plan for ({report['reason']}); give one with gpus to plan for another host.")
    if any(gpu["mig_mode"] == "enabled" for gpu in report["gpus"]):
        # A model cannot be shared by instances, so the largest is all there is.
        parts = [instance | {"compute_capability": gpu["compute_capability"]} for gpu in report["gpus"] for instance in gpu["mig_devices"] or [gpu]]
        return [max(parts, key=lambda part: int(part["total_mib"]))]
    return list(report["gpus"])


def gpus_of(entries: list[dict[str, Any]]) -> list[_vllm_plan.Gpu]:
    """Return GPUs as the plan has them. Raises PlanError."""
    try:
        return [gpu_of(entry) for entry in entries]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"gpus has an entry without a usable number: {error}; total_mib is needed, in MiB.") from None


def gpu_of(entry: dict[str, Any]) -> _vllm_plan.Gpu:
    total = int(entry["total_mib"]) - int(entry.get("reserved_mib") or 0)
    free = int(entry["free_mib"]) if entry.get("free_mib") is not None else total
    return _vllm_plan.Gpu(str(entry.get("name") or "GPU"), total, free, float(entry.get("compute_capability") or 0))


def disk_of(path: str, missing_bytes: int) -> tuple[dict[str, int], str]:
    """Return what the disk needs and has, and a sentence if that is too little."""
    needed = {"needed_mib": missing_bytes // MIB, "free_mib": -1}
    if not path:
        return needed, ""
    existing = next(parent for parent in (Path(path), *Path(path).absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    needed["free_mib"] = free // MIB
    if missing_bytes and missing_bytes + DISK_MARGIN > free:
        return needed, f"the model's files take {missing_bytes / GIB:.1f} GiB, and {path} has {free / GIB:.1f} GiB free."
    return needed, ""


def parsers_of(params: dict[str, Any], family: dict[str, Any] | None) -> dict[str, str]:
    """Return the parsers, each checked against the pinned vLLM's own list. Raises PlanError."""
    chosen = {}
    for kind in ("tool_call", "reasoning"):
        name = params[f"{kind}_parser"]
        chosen[kind] = (family or {}).get(f"{kind}_parser", "") if name == "auto" else name
        _vllm_catalogue.check_parser(
            kind.replace("_", " "), chosen[kind], params["registry"].get("tool_parsers" if kind == "tool_call" else "reasoning_parsers", [])
        )
    return chosen


def size_arguments(plan: _vllm_plan.Plan, swap: _vllm_change.Swap, params: dict[str, Any]) -> list[str]:
    utilization = swap.utilization if swap.strategy == "side_by_side" else params["gpu_memory_utilization"]
    sizes = ["--max-model-len", str(plan.context), "--gpu-memory-utilization", f"{utilization:g}", "--tensor-parallel-size", str(plan.tensor_parallel)]
    pipeline = params["pipeline_parallel_size"]
    return sizes + (["--pipeline-parallel-size", str(pipeline)] if pipeline > 1 else [])


def model_arguments(
    plan: _vllm_plan.Plan, parsers: dict[str, str], family: dict[str, Any] | None, shape: _vllm_plan.Shape, params: dict[str, Any]
) -> list[str]:
    """Return what follows from the model and the kind of GPU, and not from what is free at the moment."""
    arguments = own_arguments(params)
    if 0 < plan.gpu.capability < _vllm_plan.BF16_CAPABILITY and shape.quantization.name == "bf16":
        arguments += ["--dtype", "half"]
    if family and family["tokenizer_mode"]:
        arguments += ["--tokenizer-mode", family["tokenizer_mode"]]
    if parsers["tool_call"]:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", parsers["tool_call"]]
        # The parser reads what the family's template asks the model for.
        if family and family["chat_template"] and family["tool_call_parser"] == parsers["tool_call"]:
            arguments += ["--chat-template", family["chat_template"]]
    if parsers["reasoning"]:
        arguments += ["--reasoning-parser", parsers["reasoning"]]
    return arguments


def warnings_of(
    plan: _vllm_plan.Plan,
    swap: _vllm_change.Swap,
    shape: _vllm_plan.Shape,
    family: dict[str, Any] | None,
    params: dict[str, Any],
    files: _model_files.ModelFiles,
) -> list[str]:
    """Return what the plan cannot know or what may surprise, a sentence each."""
    found = []
    if files.weight_bytes is None:
        found.append("No safetensors files were found; the size of the weights is computed from config.json.")
    if family is None:
        found.append(f"The catalogue has no family for this model ({shape.model_type}), so no parser is chosen: the agent can offer it no tools.")
    else:
        if not family["names"]:
            found.append(f"The parsers are those of its architecture ({shape.architecture}, family {family['name']}); no family names this model.")
        if family["kind"] == "guard":
            found.append(f"The model judges what others write ({family['name']}); it calls no tools and makes no agent.")
    if files.chat_template is False and not (family and (family["chat_template"] or family["tokenizer_mode"])):
        found.append("The model has no chat template, so it is a base model: it continues a text, and vLLM answers no chat with it.")
    if shape.asked:
        found.append(f"No formula is known for the caches of {shape.architecture}; vLLM itself was asked for them.")
    if not shape.known:
        found.append(f"No formula is known for the caches of {shape.architecture}; they are counted as if every layer kept all tokens.")
    if shape.multimodal and not params["read"].text_only:
        found.append("The model also takes images; what their encoder needs while it runs is not in the plan (--language-model-only leaves it out).")
    if shape.stateful_layers:
        found.append(f"{shape.stateful_layers} layers keep a state instead of keys and values, which each request has whole, however short it is.")
    if plan.tensor_parallel * params["pipeline_parallel_size"] > 1:
        found.append("What several GPUs need for talking to each other is an assumption (1 GiB each), not measured.")
    if 0 < plan.gpu.capability < _vllm_plan.FP8_CAPABILITY and shape.quantization.name == "fp8":
        found.append(f"The {plan.gpu.name} does not compute in FP8; the weights stay small, and the speed is that of 16 bits.")
    if swap.strategy == "sleep" and shape.quantization.name in ("awq", "gptq", "int4"):
        found.append("vLLM 0.26 miscounted a 4 bit 70B model in sleep mode and ran out of memory at a utilisation of 0.9; try a lower one first.")
    return found


def shape_of(params: dict[str, Any], files: _model_files.ModelFiles, hub: _model_files.Hub | None, *, check_mode: bool) -> tuple[_vllm_plan.Shape, str]:
    """Return the model's shape, and why it is pending, a sentence, or nothing.

    A formula says it, or vLLM itself, or nobody. Raises PlanError, with the variable by which a model is served all the same.
    """
    registry, config, serve = params["registry"], files.config, params["unknown"] == "serve"
    known = set(registry.get("architectures", []))
    methods = frozenset() if serve else frozenset(registry.get("quantizations", []))
    names = config.get("architectures")
    _vllm_catalogue.check_answers_with_text(str(next(iter(names), "")) if isinstance(names, list) else "", known)
    try:
        return _vllm_plan.read_shape(config, known, methods), ""
    except UnknownArchitecture as error:
        unknown = str(error)
    except PlanError:
        if not serve:
            raise
        return _vllm_plan.read_shape(config, known, methods, serve_unknown=True), ""
    pending = ""
    if params["image"]:
        try:
            return _vllm_plan.read_shape(config, known, methods, asked=asked(params, files, hub, check_mode=check_mode)), ""
        except _vllm_ask.ImageAbsent as error:
            pending = f"{unknown} It will be planned by vLLM itself once the image is there: {error}"
        except (PlanError, _model_files.ModelError) as error:
            unknown = f"{unknown} {error}"
    if serve or check_mode or pending:
        return _vllm_plan.read_shape(config, known, methods, serve_unknown=True), pending
    raise PlanError(f"{unknown} vllm_plan_unknown: serve serves it all the same.")


def asked(params: dict[str, Any], files: _model_files.ModelFiles, hub: _model_files.Hub | None, *, check_mode: bool) -> _vllm_ask.Answer:
    """Return what vLLM itself says of a model. Raises ImageAbsent, PlanError and ModelError."""
    small = _model_files.read_small(files, params["model"], hub)
    numbers = _vllm_ask.counts(8 if params["survey"] else len(params["gpus"]), params["tensor_parallel_size"])
    kept = Path(params["asked_directory"]) if params["asked_directory"] and not check_mode else None
    return _vllm_ask.ask(shutil.which("docker"), params["image"], params["asker"], small, numbers, kept)


def wish_of(params: dict[str, Any], drafter: _vllm_plan.Drafter | None = None) -> _vllm_plan.Wish:
    """Return what was asked for. More arguments of `vllm serve` stand last there, and count. Raises PlanError."""
    read = params["read"]
    dtype = read.kv_cache_dtype or params["kv_cache_dtype"]
    return _vllm_plan.Wish(
        utilization=params["gpu_memory_utilization"],
        context=params["max_model_len"],
        tensor_parallel=params["tensor_parallel_size"],
        pipeline=params["pipeline_parallel_size"],
        kv_element_bytes=_vllm_arguments.KV_CACHE_DTYPES[dtype] or (4 if read.element == 4 else 0),
        batch_tokens=read.tokens,
        batch_requests=read.requests,
        eager=read.eager,
        prefix_caching=read.prefix_caching,
        drafts=read.draft.tokens,
        block=read.block,
        state_element=read.state_element,
        one_step=read.one_step,
        captured=read.captured,
        cache_bytes=read.cache_bytes,
        offloaded_bytes=read.offloaded_bytes,
        drafter=drafter,
        loras=read.loras,
        lora_rank=read.lora_rank,
    )


def with_arguments(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters as the arguments of `vllm serve` change them, which stand last there. Raises PlanError."""
    known = [] if params["unknown"] == "serve" else params["registry"].get("arguments", [])
    read = _vllm_arguments.read_arguments(own_arguments(params) + params["extra_arguments"], known)
    changed: dict[str, Any] = {"read": read}
    if read.context:
        changed["max_model_len"] = max(0, read.context)
    if read.utilization:
        changed["gpu_memory_utilization"] = read.utilization
    if read.tensor_parallel:
        changed["tensor_parallel_size"] = read.tensor_parallel
    if read.pipeline_parallel:
        changed["pipeline_parallel_size"] = read.pipeline_parallel
    return params | changed


def own_arguments(params: dict[str, Any]) -> list[str]:
    """Return the arguments of `vllm serve` that options of their own stand for. Raises PlanError."""
    arguments = []
    if params["kv_cache_dtype"] != "auto":
        arguments += ["--kv-cache-dtype", params["kv_cache_dtype"]]
    for name in ("enforce_eager", "language_model_only"):
        arguments += [f"--{name.replace('_', '-')}"] if params[name] else []
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if params[name] < 0:
            raise PlanError(f"{name} is {params[name]}; allowed is a whole number from 1, or 0 for vLLM's own.")
        arguments += [f"--{name.replace('_', '-')}", str(params[name])] if params[name] else []
    if params["quantization"]:
        arguments += ["--quantization", params["quantization"]]
    arguments += _lora_adapters.arguments_of(params.get("lora_ranks", []))
    if params["speculative_config"]:
        arguments += ["--speculative-config", json.dumps(params["speculative_config"], sort_keys=True)]
    return arguments


def adapters_of(params: dict[str, Any], hub: _model_files.Hub | None) -> tuple[list[int], list[str], int]:
    """Return the ranks of the adapters, warnings, and the bytes that are still to be fetched. Raises PlanError and ModelError."""
    ranks, strange, missing = [], [], 0
    for adapter in _lora_adapters.read_adapters(params["lora_adapters"]):
        files = _model_files.find_adapter(adapter.source, adapter.revision, [Path(path) for path in params["directories"]], hub)
        ranks.append(_lora_adapters.rank_of(adapter, files.described, files.names))
        strange.append(_lora_adapters.strange_base(adapter, files.described, params["model"]))
        missing += files.missing_bytes
    return ranks, [sentence for sentence in strange if sentence], missing


def on_host(path: str, params: dict[str, Any]) -> str:
    """Return where a directory of the server's container is on the host: the container has the directory of models at /models."""
    inside = path.removeprefix("/models/")
    parents = [os.path.dirname(params["model"]), *params["directories"]] if params["model"].startswith("/") else params["directories"]
    return next((str(Path(parent) / inside) for parent in parents if inside != path and (Path(parent) / inside).is_dir()), path)


def drafter_of(
    params: dict[str, Any], shape: _vllm_plan.Shape, files: _model_files.ModelFiles, hub: _model_files.Hub | None
) -> tuple[_vllm_plan.Drafter | None, str, int]:
    """Return what guesses tokens ahead, a warning where its size is not known, and the bytes that are still to be fetched. Raises PlanError."""
    draft = params["read"].draft
    if not draft.tokens or draft.method in _vllm_arguments.WITHOUT_A_DRAFT:
        return None, "", 0
    if draft.model and draft.model != params["model"]:
        try:
            found = _model_files.find_model(on_host(draft.model, params), draft.revision, [Path(path) for path in params["directories"]], hub)
            own = _vllm_plan.read_shape(found.config, serve_unknown=True)
            weights = own.weight_bytes() if found.weight_bytes is None else found.weight_bytes
            return _vllm_plan.Drafter(weights, own), "", found.missing_bytes
        except (PlanError, _model_files.ModelError) as error:
            return None, f"What guesses tokens ahead is not in the plan: {error}", 0
    heads = _vllm_weights.heads_ahead(shape.config)
    return _vllm_plan.Drafter(files.ahead_bytes or _vllm_plan.layer_bytes(shape) * heads, heads=heads), "", 0


def layers_of(shape: _vllm_plan.Shape, plan: _vllm_plan.Plan, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the layers keep on each GPU, nothing if vLLM does not share them among so many."""
    cache = _vllm_specs.Cache(plan.tensor_parallel, _vllm_plan.element_bytes(shape, wish_of(params), plan.gpu))
    try:
        return list(_vllm_specs.describe(shape.caches(cache)))
    except _vllm_ask.Unshared:
        return []


def first_that_fits(surveyed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the smallest GPUs of a survey that carry the model, and the largest where none does."""
    rows = [row for row in surveyed if row["fits"]] or surveyed[-1:]
    row = min(rows, key=lambda entry: int(entry["gpus"]) * int(entry["gb"]))
    kind = next(kind for kind in _vllm_survey.KINDS if kind.example == row["example"])
    return [{"name": kind.example, "total_mib": kind.total_mib, "compute_capability": kind.capability}] * int(row["gpus"])


def make_suggestions(params: dict[str, Any]) -> dict[str, Any]:
    """Return what of the catalogue some GPUs carry. Raises PlanError."""
    families = params["catalogue"].get("families", [])
    models = []
    for entry in params["catalogue"].get("models", []):
        shape = _vllm_plan.read_shape(entry["config"])
        family = _vllm_catalogue.match_family(families, entry["id"], shape.architecture)
        models.append((entry, shape, family["tool_call_parser"] if family else ""))
    rows = _vllm_survey.suggest(models, _vllm_survey.gpus_named(params["suggest_for"]), wish_of(params))
    return {"suggestions": rows, "suggestions_table": _vllm_survey.suggestions_table(rows)}


def make_result(params: dict[str, Any], *, check_mode: bool = False) -> dict[str, Any]:
    """Return the module's result. Raises PlanError or ModelError."""
    catalogue = params["catalogue"]
    hub = _model_files.Hub(params["hub_url"], params["token"], params["timeout"]) if params["hub_url"] else None
    if not 0 < params["gpu_memory_utilization"] <= 1:
        raise PlanError(f"the utilisation is {params['gpu_memory_utilization']:g}; allowed is more than 0 and at most 1.")
    ranks, strange, adapter_bytes = adapters_of(params, hub)
    params = with_arguments(params | {"lora_ranks": ranks})
    if params["suggest_for"]:
        return make_suggestions(params)
    if not params["model"]:
        raise PlanError("model is empty; allowed is an id on the hub, such as Qwen/Qwen3-8B, or the absolute path of a directory.")
    files = _model_files.find_model(params["model"], params["revision"], [Path(path) for path in params["directories"]], hub)
    files = replace(files, config=_vllm_config.overridden(files.config, params["read"].overrides))
    given = params["gpus"] or ([] if params["survey"] else host_gpus(params["timeout"]))
    params = params | {"gpus": given}
    shape, pending = shape_of(params, files, hub, check_mode=check_mode)
    _vllm_weights.check_allowed(shape.quantization, params["read"].quantization, deprecated=params["read"].deprecated)
    drafter, not_counted, drafter_bytes = drafter_of(params, shape, files, hub)
    unloaded = shape
    shape, loaded = _vllm_plan.loaded_as(shape, files.weight_bytes, params["read"].quantization, params["read"].element)
    name = os.path.basename(params["model"].rstrip("/")) if params["model"].startswith("/") else params["model"]
    family = _vllm_catalogue.match_family(catalogue.get("families", []), name, shape.architecture)
    parsers = parsers_of(params, family)
    surveyed = _vllm_survey.survey(shape, loaded, wish_of(params, drafter)) if params["survey"] else []
    gpus = gpus_of(first_that_fits(surveyed) if surveyed else given)
    wish = wish_of(params | ({"tensor_parallel_size": len(gpus)} if surveyed else {}), drafter)
    plan = _vllm_plan.make_plan(shape, loaded, gpus, wish)
    copies = params["read"].data_parallel
    if copies * plan.tensor_parallel > len(gpus) and not surveyed:
        raise PlanError(f"--data-parallel-size is {copies}, and each copy takes {plan.tensor_parallel} of the {len(gpus)} GPUs; allowed is no more than fit.")
    serving = _vllm_change.read_serving(params["serving"], params["model"], plan.gpu.total_mib)
    swap = _vllm_change.plan_swap(plan, serving, host_free_mib=_vllm_host.free_mib(), timings=_vllm_change.Timings())
    disk, no_room = disk_of(params["disk_path"], files.missing_bytes + adapter_bytes + drafter_bytes)
    memory = plan.memory
    for_model = model_arguments(plan, parsers, family, shape, params)
    blocked = swap.reason if plan.fits and swap.strategy == "none" else ""
    faster: dict[str, Any] = {"arguments": [], "environment": {}}
    for entry in catalogue.get("faster", []):
        if entry["quantization"] == shape.quantization.name and float(entry["compute_capability"]) == plan.gpu.capability:
            faster["arguments"] += entry["arguments"]
            faster["environment"].update(entry["environment"])
    together = plan.tensor_parallel * params["pipeline_parallel_size"]
    on = "1 GPU" if together == 1 else f"each of {together} GPUs"
    warnings = [sentence for sentence in (pending, not_counted, *strange) if sentence] + warnings_of(plan, swap, shape, family, params, files)
    # A guess refuses nothing.
    guessed = not shape.known and not plan.fits and (params["unknown"] == "serve" or bool(pending))
    if guessed:
        warnings.append(f"By that count it does not fit: {plan.reason}")
    fits = plan.fits or guessed
    return {
        "fits": fits and not no_room and not blocked,
        "reason": ("" if guessed else plan.reason) or no_room or blocked,
        "advice": ("" if guessed else plan.advice)
        or ("Free that much, or set another disk_path." if no_room else "Stop them, or ask for a smaller share." if blocked else ""),
        "warnings_found": warnings,
        "summary": f"{params['model']}: {memory.weights / GIB:.1f} GiB of weights on {on}, {memory.kv_cache / GIB:.1f} GiB of KV cache"
        f" for {memory.kv_tokens:,} tokens, {memory.contexts:.1f} contexts of {plan.context:,}",
        "arguments": size_arguments(plan, swap, params) + for_model if fits else [],
        "model_arguments": for_model,
        "faster": faster,
        "max_model_len": plan.context,
        "longest_context": memory.longest_context,
        "concurrent_contexts": round(memory.contexts, 2),
        "kv_tokens": memory.kv_tokens,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "layers": layers_of(shape, plan, params),
        "weights_mib": memory.weights // MIB,
        "overhead_mib": memory.overhead // MIB,
        "kv_cache_mib": memory.kv_cache // MIB,
        "tensor_parallel_size": plan.tensor_parallel,
        "family": family["name"] if family else "",
        "family_by": "" if family is None else "name" if family["names"] else "architecture",
        "planned_by": "vllm" if shape.asked else "formula" if shape.known else "guess",
        "pending": bool(pending),
        "kind": (family["kind"] if family else "") or "chat",
        "tool_call_parser": parsers["tool_call"],
        "reasoning_parser": parsers["reasoning"],
        "model_info": {
            "architecture": shape.architecture,
            "quantization": shape.quantization.name,
            "parameters": shape.parameters,
            "max_context": shape.max_context,
            "origin": files.origin,
            "revision": files.revision,
        },
        "survey": surveyed,
        "survey_table": _vllm_survey.table(surveyed) if surveyed else [],
        "fetching": _vllm_survey.fetching(files.weight_bytes, unloaded, _vllm_change.Timings().read_gib_per_second),
        "disk": disk,
        "swap": {
            "strategy": "none" if no_room else swap.strategy,
            "hold_seconds": 0.0 if no_room else swap.hold_seconds,
            "gpu_memory_utilization": swap.utilization or params["gpu_memory_utilization"],
            "reason": no_room or swap.reason,
        },
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "model": {"type": "str", "default": ""},
            "suggest_for": {"type": "str", "default": ""},
            "revision": {"type": "str", "default": ""},
            "directories": {"type": "list", "elements": "path", "default": []},
            "hub_url": {"type": "str", "default": "https://huggingface.co"},
            "token": {"type": "str", "default": "", "no_log": True},
            "gpus": {"type": "list", "elements": "dict", "default": []},
            "gpu_memory_utilization": {"type": "float", "default": 0.9},
            "max_model_len": {"type": "int", "default": 0},
            "tensor_parallel_size": {"type": "int", "default": 0},
            "pipeline_parallel_size": {"type": "int", "default": 1},
            "kv_cache_dtype": {"type": "str", "choices": ["auto", "fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16", "float16"], "default": "auto"},
            "enforce_eager": {"type": "bool", "default": False},
            "language_model_only": {"type": "bool", "default": False},
            "max_num_seqs": {"type": "int", "default": 0},
            "max_num_batched_tokens": {"type": "int", "default": 0, "no_log": False},
            "quantization": {"type": "str", "default": ""},
            "speculative_config": {"type": "dict", "default": {}},
            "lora_adapters": {"type": "list", "elements": "dict", "default": []},
            "extra_arguments": {"type": "list", "elements": "str", "default": []},
            "survey": {"type": "bool", "default": False},
            "image": {"type": "str", "default": ""},
            "asked_directory": {"type": "path", "default": ""},
            "unknown": {"type": "str", "choices": ["refuse", "serve"], "default": "refuse"},
            "tool_call_parser": {"type": "str", "default": "auto"},
            "reasoning_parser": {"type": "str", "default": "auto"},
            "disk_path": {"type": "path", "default": ""},
            "serving": {"type": "dict", "default": {}},
            "timeout": {"type": "int", "default": 30},
            "catalogue": {"type": "dict"},
            "registry": {"type": "dict"},
            "asker": {"type": "str"},
        },
        supports_check_mode=True,
    )
    # The action plugin gives all three. Without it, as with `delegate_to` from another tool, nothing is known and nothing refused.
    params = module.params | {"catalogue": module.params["catalogue"] or {}, "registry": module.params["registry"] or {}}
    if not params["asker"]:
        params["image"] = ""
    try:
        result = make_result(params, check_mode=module.check_mode)
    except (PlanError, _model_files.ModelError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
