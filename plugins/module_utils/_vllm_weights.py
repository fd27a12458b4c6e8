# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What a model's weights take: parameters by formula, and how a quantisation keeps them. PRIVATE to the collection: it may change at any time.

Where the sizes of the safetensors files are known, they count; the formulas stand in for them, and tell what of them a quantisation shrinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_specs as specs
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import MOST, MOST_LAYERS, Config, PlanError, plain

# How the weights of linear layers are kept: bits for each, and bits for each group of them (a scale, AWQ's 4 bit zero point).
LINEAR_BITS = {
    "bf16": (16.0, 0.0),
    "fp8": (8.0, 0.0),
    "int8": (8.0, 0.0),
    "mxfp8": (8.0, 8.0),
    "awq": (4.0, 20.0),
    "gptq": (4.0, 16.0),
    "int4": (4.0, 16.0),
    "nf4": (4.0, 16.0),
    "mxfp4": (4.0, 8.0),
    "nvfp4": (4.0, 8.0),
}
GROUPED = ("awq", "gptq", "int4", "nf4", "mxfp4", "mxfp8", "nvfp4")
# One group for each row.
ROW_GROUP = 4096
# vLLM pads MXFP4 experts of gpt-oss to multiples of these (hidden size, intermediate size): 60.8 GiB on the disk are 65.97 in memory, as it logged.
MXFP4_PADDING = (256, 128)


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has: the embedding and the logits' matrix, those of linear layers, of these the experts', and all others."""

    embedding: int
    linear: int
    other: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.embedding + self.linear + self.other


# ------------------------------------------------------------------------------------------------------------------- quantisation


@dataclass(frozen=True)
class Quantization:
    """How weights are kept. `name` is a key of LINEAR_BITS, or the method's own name where only files can tell the size."""

    name: str
    group: int = 0
    method: str = ""

    @property
    def sizable(self) -> bool:
        return self.name in LINEAR_BITS


def read_quantization(config: Any, known: frozenset[str] = frozenset()) -> Quantization:
    """Return how a `quantization_config` says that weights are kept. `known` are the methods of the vLLM that serves. Raises PlanError."""
    if config is None or config == {}:
        return Quantization("bf16")
    if not isinstance(config, dict):
        raise PlanError(f"config.json has {plain(config)} as quantization_config; allowed is an object.")
    method = config.get("quant_method")
    inner = config.get("quantization")
    inner = inner if isinstance(inner, dict) else {}
    algorithm = config.get("quant_algo") or inner.get("quant_algo")
    if not method and algorithm:
        method = "modelopt"
    method = str(method or "").lower().replace("compressed_tensors", "compressed-tensors")
    if method in ("", "none"):
        return Quantization("bf16")
    name, group = _by_method(method, config, str(algorithm or "").upper())
    if known and method not in known and method not in ALIASES:
        outside = OUTSIDE.get(method, "")
        served = f"it serves {', '.join(sorted(known))}."
        raise PlanError(f"config.json names the quantisation {plain(method)}, which the pinned vLLM does not serve{outside}; {served}")
    if name == method and not known and method not in LINEAR_BITS:
        raise PlanError(f"config.json names the quantisation {method}, which this plan does not know.")
    return Quantization(name, group, method)


# Names in published configurations that vLLM reads as another one's.
ALIASES = frozenset({"auto-round"})
# Quantisations that vLLM has only with a plugin (vllm-project/vllm#43529).
OUTSIDE = {
    "bitsandbytes": " (since 0.28 it needs the plugin vllm-bnb-plugin, which its image does not have; for an image that has it, vllm_plan_unknown: serve)",
}


# What `--quantization` makes of weights that are not quantised, while they are loaded: linear layers and experts, or experts alone
# (vllm/config/quantization.py, _ONLINE_SHORTHANDS).
ONLINE = {"fp8": "fp8", "fp8_per_tensor": "fp8", "fp8_per_block": "fp8", "fp8_per_channel": "fp8", "mxfp8": "mxfp8", "mxfp4": "mxfp4"}
ONLINE_EXPERTS = {"experts_int8": "int8", "int8_per_channel_weight_only": "int8", "nvfp4_per_token": "nvfp4"}
# Names that vLLM takes for one another's files; `humming` are kernels for any of them.
SAME = (
    {"awq", "awq_marlin", "auto_awq", "moe_wna16", "inc"},
    {"gptq", "gptq_marlin", "auto_gptq", "moe_wna16", "inc", "auto-round"},
    {"mxfp4", "gpt_oss_mxfp4"},
    {"modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"},
    {"fp8", "deepseek_v4_fp8"},
)
# vLLM refuses these unless it is told otherwise (model_executor/layers/quantization/__init__.py).
DEPRECATED = ("fbgemm_fp8", "fp_quant")


def check_allowed(quantization: Quantization, asked: str, *, deprecated: bool) -> None:
    """Raise PlanError for a quantisation that vLLM does not start with: `asked` is what --quantization says, or nothing."""
    method = quantization.method
    if (method in DEPRECATED or asked in DEPRECATED) and not deprecated:
        name = method if method in DEPRECATED else asked
        raise PlanError(f"vLLM has deprecated the quantisation {name}; --allow-deprecated-quantization in vllm_extra_arguments serves it all the same.")
    if not asked:
        return
    if not method:
        if asked not in (*ONLINE, *ONLINE_EXPERTS):
            allowed = ", ".join(sorted({*ONLINE, *ONLINE_EXPERTS}))
            raise PlanError(f"--quantization is {plain(asked)}, and the model's files are not quantised; allowed for them is {allowed}.")
    elif asked not in (method, "humming") and not any({asked, method} <= names for names in SAME):
        raise PlanError(f"--quantization is {plain(asked)}, and the model's files are quantised otherwise ({method}); allowed is to leave it out.")


def _by_method(method: str, config: dict[str, Any], algorithm: str) -> tuple[str, int]:
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin", "auto_awq", "auto_gptq", "auto-round", "inc"):
        bits = _whole(config, "bits", "w_bit", default=4)
        if bits == 8:
            return "int8", 0
        group = _whole(config, "group_size", "q_group_size", default=128)
        return ("awq" if "awq" in method else "gptq"), group if group > 0 else ROW_GROUP
    if method == "bitsandbytes":
        return ("nf4", 64) if config.get("load_in_4bit") or config.get("_load_in_4bit") else ("int8", 0)
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return "mxfp4", 32
    if method == "mxfp8":
        return "mxfp8", 32
    if method in ("fp8", "fbgemm_fp8", "ptpc_fp8", "deepseek_v4_fp8", "fp_quant_fp8"):
        blocks = config.get("weight_block_size")
        return "fp8", _entry(blocks)
    if method.startswith("modelopt"):
        if "NVFP4" in algorithm or method == "modelopt_fp4":
            return "nvfp4", 16
        if "MXFP8" in algorithm or method == "modelopt_mxfp8":
            return "mxfp8", 32
        if "W4A16" in algorithm or "INT4" in algorithm:
            return "awq", 128
        return ("fp8", 0) if method != "modelopt_mixed" else (method, 0)
    if method == "compressed-tensors":
        return _compressed(config)
    return method, 0


def _compressed(config: dict[str, Any]) -> tuple[str, int]:
    groups = config.get("config_groups")
    if groups is not None and not isinstance(groups, dict):
        raise PlanError(f"config.json has {plain(groups)} as config_groups of its quantisation; allowed is an object.")
    first: Any = next(iter((groups or {}).values()), {})
    if not isinstance(first, dict):
        raise PlanError(f"config.json has {plain(first)} as a group of its quantisation; allowed is an object with the weights' format.")
    weights = first.get("weights")
    if weights is not None and not isinstance(weights, dict):
        raise PlanError(f"config.json has {plain(weights)} as the weights of its quantisation; allowed is an object.")
    weights = weights or {}
    if _whole(weights, "num_bits", default=8) == 4:
        group = _whole(weights, "group_size", default=128)
        if weights.get("type") == "float":
            return ("mxfp4", 32) if "mxfp4" in str(config.get("format") or first.get("format")) else ("nvfp4", 16)
        return "int4", group if group > 0 else ROW_GROUP
    return ("fp8" if weights.get("type") == "float" else "int8"), 0


def _whole(config: dict[str, Any], *names: str, default: int) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 65536:
            raise PlanError(f"config.json has {plain(value)} as {name} of its quantisation; allowed is a whole number up to 65,536.")
        return int(value)
    return default


def _entry(blocks: Any) -> int:
    if not blocks:
        return 0
    if not isinstance(blocks, list) or not isinstance(blocks[0], int) or isinstance(blocks[0], bool) or not 0 <= blocks[0] <= 65536:
        raise PlanError(f"config.json has {plain(blocks)} as weight_block_size of its quantisation; allowed is a list of two whole numbers.")
    return blocks[0]


def kv_element(config: Any) -> int:
    """Return the bytes of an element of keys and values that the checkpoint itself asks for, 0 if it does not: vLLM's `auto` follows it."""
    if not isinstance(config, dict):
        return 0
    inner = config.get("quantization")
    inner = inner if isinstance(inner, dict) else {}
    scheme = next((part.get(name) for name in ("kv_cache_scheme", "kv_cache_quant_algo") for part in (inner, config) if part.get(name)), None)
    if isinstance(scheme, dict):
        return 1 if scheme.get("num_bits") == 8 and scheme.get("type") == "float" else 0
    return 1 if isinstance(scheme, str) and scheme.upper().startswith("FP8") else 0


# --------------------------------------------------------------------------------------------------------------------- parameters


def read_parameters(config: Config) -> Parameters:
    """Return how many parameters the model's text part has. Raises PlanError."""
    layers, hidden = specs.layer_count(config), config.number("hidden_size", "n_embd", "d_model", least=1)
    vocabulary = config.number("vocab_size", "padded_vocab_size", least=1)
    embedding = vocabulary * hidden * (1 if _tied(config) else 2)
    mixers, small = _mixers(config, layers, hidden)
    feed, experts, routers = _feed_forward(config, layers, hidden)
    side, side_embedding = _per_layer_inputs(config, layers, hidden)
    norms = layers * hidden * _norms(config) + hidden * (2 if config.get("parallel_attn") else 1)
    return Parameters(embedding + side_embedding, mixers + feed + side, small + routers + norms, experts)


def heads_ahead(config: Config) -> int:
    """Return how many layers the model's own head has that guesses tokens ahead. Raises PlanError."""
    return config.number("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", default=1, most=100) or 1


def _tied(config: Config) -> bool:
    tied = config.get("tie_word_embeddings")
    if tied is None:
        return config.model_type.startswith("gemma") or config.model_type in ("falcon", "cohere", "cohere2")
    return bool(tied)


def _norms(config: Config) -> int:
    if config.model_type in ("gemma2", "gemma3_text", "gemma4_text"):
        return 4
    if config.get("parallel_attn"):
        return 2  # one, with a weight and a bias
    return 1 if config.model_type in ("cohere", "cohere2", "mamba", "mamba2", "falcon_mamba", "nemotron_h") else 2


def _mixers(config: Config, layers: int, hidden: int) -> tuple[int, int]:
    """Return the parameters of what mixes tokens, of linear layers and others."""
    rule = specs.BY_ARCHITECTURE.get(config.architecture) or specs.BY_TYPE.get(config.model_type)
    if rule in (specs.mamba, specs.mamba2):
        linear, small = _mamba(config, hidden, rule is specs.mamba2)
        return layers * linear, layers * small
    if rule in (specs.latent, specs.sparse, specs.double_latent) and config.get("kv_lora_rank") is not None:
        linear, small = _latent(config, hidden)
        return layers * linear, layers * small
    if rule is specs.deepseek_v4:
        return layers * _deepseek_v4(config, hidden), 0
    if rule is specs.two_geometries:
        return _two_geometries(config, layers, hidden)
    attending, states = layers, 0
    state = (0, 0)
    if rule in (
        specs.qwen_next,
        specs.olmo_hybrid,
        specs.kimi_linear,
        specs.nemotron_h,
        specs.granite_hybrid,
        specs.jamba,
        specs.lfm2,
        specs.falcon_h1,
        specs.zamba2,
    ):
        kept = specs.cache_layers(config, specs.Cache())
        states = specs.stateful(kept)
        attending = sum(layer.count for layer in kept if layer.kind != specs.STATE)
        state = _state(config, hidden)
    linear, small = _latent(config, hidden) if rule is specs.kimi_linear else _heads(config, hidden)
    return attending * linear + states * state[0], attending * small + states * state[1]


def _heads(config: Config, hidden: int) -> tuple[int, int]:
    heads, kv_heads, size = specs.head_count(config), specs.kv_head_count(config), specs.head_size(config)
    queries = 2 * heads if config.get("attn_output_gate") or config.model_type == "qwen3_next" else heads
    values = config.number("v_head_dim", default=size, least=1)
    linear = hidden * (queries * size + kv_heads * (size + values) + heads * values)
    model_type, small = config.model_type, 0
    if model_type.startswith("qwen2") or config.get("attention_bias"):
        small += size * (heads + 2 * kv_heads)
    if config.get("attention_bias") and not model_type.startswith("qwen2"):
        small += hidden
    if model_type.startswith("qwen3") or model_type == "gemma3_text":
        small += 2 * size
    if model_type == "gpt_oss":
        small += heads  # attention sinks
    return linear, small


def _latent(config: Config, hidden: int) -> tuple[int, int]:
    heads = specs.head_count(config)
    rank, rope = config.number("kv_lora_rank", least=1), config.number("qk_rope_head_dim", default=64)
    nope, value = config.number("qk_nope_head_dim", default=128), config.number("v_head_dim", default=128, least=1)
    query_rank = config.number("q_lora_rank", default=0)
    query = query_rank * (hidden + heads * (nope + rope)) if query_rank else hidden * heads * (nope + rope)
    linear = query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    index_heads, index_dim = config.number("index_n_heads", default=0), config.number("index_head_dim", default=0)
    if index_heads:
        linear += query_rank * index_heads * index_dim + hidden * index_dim + hidden * index_heads
    return linear, rank + query_rank


def _deepseek_v4(config: Config, hidden: int) -> int:
    heads, size, rank = specs.head_count(config), config.number("head_dim", least=1), config.number("q_lora_rank", default=0)
    groups, out_rank = config.number("o_groups", default=1, least=1), config.number("o_lora_rank", default=0)
    out = heads * size * out_rank + groups * out_rank * hidden if out_rank else heads * size * hidden
    return hidden * (rank + size) + rank * heads * size + out


def _two_geometries(config: Config, layers: int, hidden: int) -> tuple[int, int]:
    heads, size, kv_heads = specs.head_count(config), specs.head_size(config), specs.kv_head_count(config)
    whole = config.number("global_head_dim", default=size, least=1)
    same = config.flag("attention_k_eq_v")
    whole_heads = config.number("num_global_key_value_heads", default=kv_heads, least=1) if same else kv_heads
    linear = small = 0
    for kind in specs.kinds_of(config, layers):
        dim, kept = (size, kv_heads) if kind == specs.SLIDING else (whole, whole_heads)
        linear += hidden * dim * (2 * heads + 2 * kept)
        small += 2 * dim + 1
    return linear, small


def _per_layer_inputs(config: Config, layers: int, hidden: int) -> tuple[int, int]:
    """Gemma 3n and 4 embed every token for each layer once more."""
    width = config.number("hidden_size_per_layer_input", default=0)
    if not width or not config.model_type.startswith(("gemma3n", "gemma4")):
        return 0, 0
    vocabulary = config.number("vocab_size_per_layer_input", default=config.number("vocab_size", least=1))
    return layers * width * 3 * hidden, vocabulary * layers * width


def _mamba(config: Config, hidden: int, second: bool) -> tuple[int, int]:
    inner = config.number("expand", default=2, least=1) * hidden
    kernel = config.number("conv_kernel", default=4, least=1)
    if second:
        heads = config.number("num_heads", default=128, least=1)
        groups, state = config.number("n_groups", default=8, least=1), config.number("state_size", default=128, least=1)
        convolution = inner + 2 * groups * state
        return hidden * (inner + convolution + heads) + inner * hidden, convolution * (kernel + 1) + 3 * heads + inner
    inner = config.number("intermediate_size", default=inner, least=1)
    state = config.number("state_size", default=16, least=1)
    rank = config.get("time_step_rank")
    step = config.checked("time_step_rank", rank, 1) if rank not in (None, "auto") else math.ceil(hidden / 16)
    return 3 * hidden * inner + inner * (2 * step + 2 * state), inner * (kernel + state + 3)


def _state(config: Config, hidden: int) -> tuple[int, int]:
    """Return the parameters of one layer that keeps a state, of linear layers and others."""
    rule = specs.BY_ARCHITECTURE.get(config.architecture) or specs.BY_TYPE.get(config.model_type)
    if rule in (specs.qwen_next, specs.olmo_hybrid):
        keys = config.number("linear_num_key_heads", least=1) * config.number("linear_key_head_dim", least=1)
        heads, size = config.number("linear_num_value_heads", least=1), config.number("linear_value_head_dim", least=1)
        values, kernel = heads * size, config.number("linear_conv_kernel_dim", default=4, least=1)
        return hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden, (2 * keys + values) * kernel + 2 * heads + size
    if rule is specs.kimi_linear:
        part = config.part("linear_attn_config")
        heads = config.checked("linear_attn_config.num_heads", part.get("num_heads", config.get("linear_num_heads")), 1)
        size = config.checked("linear_attn_config.head_dim", part.get("head_dim", config.get("linear_head_dim")), 1)
        width = heads * size
        return 4 * hidden * width + 2 * size * (hidden + width) + hidden * heads, 3 * width * 4 + width + heads + size
    if rule is specs.lfm2:
        width = config.number("conv_dim", default=hidden, least=1)
        return 3 * hidden * width + width * hidden, width * config.number("conv_L_cache", default=3)
    names = (
        {
            specs.nemotron_h: ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
            specs.granite_hybrid: ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv"),
            specs.falcon_h1: ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv"),
            specs.zamba2: ("n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_d_state", "mamba_d_conv"),
        }.get(rule)
        if rule is not None
        else None
    )
    if names is None:  # Jamba's Mamba 1
        inner, state = config.number("mamba_expand", default=2, least=1) * hidden, config.number("mamba_d_state", default=16, least=1)
        rank = config.get("mamba_dt_rank")
        step = config.checked("mamba_dt_rank", rank, 1) if rank not in (None, "auto") else math.ceil(hidden / 16)
        return 3 * hidden * inner + inner * (2 * step + 2 * state), inner * (config.number("mamba_d_conv", default=4) + state + 3)
    heads, size, groups, state, kernel = (config.number(name, default=1, least=1) for name in names)
    inner = config.number("mamba_d_ssm", default=heads * size, least=1)
    convolution = inner + 2 * groups * state
    return hidden * (inner + convolution + heads) + inner * hidden, convolution * (kernel + 1) + 3 * heads + inner


def _feed_forward(config: Config, layers: int, hidden: int) -> tuple[int, int, int]:
    """Return the parameters of the feed-forward layers: of linear ones, of these the experts', and the routers'."""
    if config.model_type in ("mamba", "mamba2", "falcon_mamba"):
        return 0, 0, 0
    intermediate = feed_forward_width(config, hidden)
    matrices = 2 if config.get("parallel_attn") or config.model_type in TWO_MATRICES else 3
    experts = expert_count(config)
    dense_layers, sparse_layers = _mlp_layers(config, layers, experts)
    dense = matrices * hidden * intermediate
    if not experts:
        return dense_layers * dense, 0, 0
    width = expert_width(config, intermediate)
    shared = config.number("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0) * width
    if config.model_type.startswith("llama4"):
        shared = width  # one beside the experts
    shared = config.number("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", default=shared)
    expert_matrices = 2 if config.model_type == "nemotron_h" else 3
    mixture = expert_matrices * hidden * width * experts
    router = hidden * experts + (experts if config.get("topk_method") == "noaux_tc" or config.model_type == "nemotron_h" else 0)
    if config.model_type == "gpt_oss":
        router += experts * (2 * width + hidden) + experts
    if config.get("shared_expert_intermediate_size") and config.model_type.startswith("qwen"):
        router += hidden  # a gate for the shared expert
    linear = dense_layers * dense + sparse_layers * (mixture + expert_matrices * hidden * shared)
    return linear, sparse_layers * mixture, sparse_layers * router


# An up and a down projection without a gate.
TWO_MATRICES = (
    "falcon",
    "nemotron",
    "nemotron_h",
    "gpt2",
    "gptj",
    "gpt_neox",
    "gpt_bigcode",
    "bloom",
    "opt",
    "phi",
    "starcoder2",
    "jais2",
    "arcee",
    "apertus",
)


def feed_forward_width(config: Config, hidden: int) -> int:
    """Return the width of the dense feed-forward layers; of those that have one each, the mean. Raises PlanError."""
    value = config.get("intermediate_size")
    if isinstance(value, list) and value:
        widths = config.some("intermediate_size", value, 0, MOST)
        return sum(widths) // len(widths)
    return config.number("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "ffn_dim", default=4 * hidden)


def expert_count(config: Config) -> int:
    """Return how many experts a layer has, 0 if none. Raises PlanError."""
    if config.model_type.startswith("gemma4") and not config.flag("enable_moe_block"):
        return 0
    value = config.get("moe_num_experts")
    if isinstance(value, list):
        return config.checked("moe_num_experts", value[0] if value else 0)
    return config.number("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", default=0, most=1_000_000)


def expert_width(config: Config, intermediate: int) -> int:
    value = config.get("moe_intermediate_size")
    if isinstance(value, list):
        return config.checked("moe_intermediate_size", value[0] if value else 0)
    return config.number("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", default=intermediate)


def _mlp_layers(config: Config, layers: int, experts: int) -> tuple[int, int]:
    """Return how many layers have a dense feed-forward, and how many have experts."""
    if config.architecture.startswith("NemotronH"):
        pattern = config.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            return pattern.count("-"), pattern.count("E")
        words = config.list_of("layers_block_type", str) or []
        return words.count("mlp"), words.count("moe")
    if not experts:
        return layers, 0
    named = config.list_of("mlp_layer_types", str)
    if named is not None:
        dense = sum(word == "dense" for word in named[:layers])
        return dense, layers - dense
    if config.get("first_k_dense_replace") is not None:
        dense = min(layers, config.number("first_k_dense_replace"))
    elif config.get("num_dense_layers") is not None:
        dense = min(layers, config.number("num_dense_layers"))
    elif config.get("moe_layer_start_index") is not None:
        dense = min(layers, config.number("moe_layer_start_index"))
    elif config.model_type == "jamba":
        period, offset = config.number("expert_layer_period", default=2, least=1), config.number("expert_layer_offset", default=1)
        dense = sum(index % period != offset for index in range(layers))
    elif config.model_type.startswith("llama4"):
        step = config.number("interleave_moe_layer_step", default=1, least=1)
        dense = sum((index + 1) % step != 0 for index in range(layers))
    else:
        dense = min(layers, len(config.some("mlp_only_layers", config.get("mlp_only_layers") or [], 0, MOST_LAYERS)))
    return dense, layers - dense


# -------------------------------------------------------------------------------------------------------------------------- bytes


def weight_bytes(parameters: Parameters, quantization: Quantization, *, experts_only: bool = False) -> int:
    """Return what the weights take in memory if nothing but the config is known, plain ones in 16 bits. Raises PlanError."""
    if not quantization.sizable:
        raise PlanError(f"the sizes of the model's files are not known, and what the quantisation {quantization.method} takes cannot be told without them.")
    bits, group_bits = LINEAR_BITS[quantization.name]
    if quantization.name in GROUPED and quantization.group:
        bits += group_bits / quantization.group
    shrunk = parameters.experts if experts_only else parameters.linear
    return (parameters.total - shrunk) * 2 + int(shrunk * bits / 8)


def padded_expert_bytes(parameters: Parameters, hidden: int, width: int) -> int:
    """Return how many bytes vLLM adds to MXFP4 experts by padding them for its kernels."""
    padded = math.ceil(hidden / MXFP4_PADDING[0]) * MXFP4_PADDING[0] * math.ceil(width / MXFP4_PADDING[1]) * MXFP4_PADDING[1]
    bits = LINEAR_BITS["mxfp4"][0] + LINEAR_BITS["mxfp4"][1] / 32
    return int(parameters.experts * (padded / (hidden * width) - 1) * bits / 8)
