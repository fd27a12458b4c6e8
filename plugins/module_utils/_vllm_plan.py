# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Whether a model fits, how much it carries, and how to swap to it. Pure arithmetic. PRIVATE to the collection: it may change at any time.

The KV cache is counted as vLLM counts it (vllm/v1/core/kv_cache_planning.py): layers of one kind of attention form groups of equal size, all
groups take blocks of 16 tokens from one pool, and the pool is what is left of `utilisation x memory` after the weights and one trial step.
What the trial step takes is fitted to vLLM's own log lines on an H100; bench/gpu_plan.sh measures it again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

GIB = 1024**3
MIB = 1024**2
BLOCK = 16
# How the weights of linear layers are kept: bits for each, and bits for each group of them (a 16 bit scale, AWQ's 4 bit zero point).
LINEAR_BITS = {"bf16": (16.0, 0.0), "fp8": (8.0, 0.0), "int8": (8.0, 0.0), "awq": (4.0, 20.0), "gptq": (4.0, 16.0), "int4": (4.0, 16.0), "mxfp4": (4.0, 8.0)}
OLDEST_CAPABILITY = 7.5
BF16_CAPABILITY = 8.0
FP8_CAPABILITY = 8.9
MXFP4_CAPABILITY = 8.0
# Beside the weights and the trial step, on one GPU: allocations outside PyTorch (0.22 GiB seen), rounding of its allocator (0.1 seen).
FIXED_BYTES = int(0.35 * GIB)
# CUDA graphs, which vLLM 0.33 subtracts before it sizes the KV cache: 0.98 GiB seen for 32 layers. How it grows with the layers is an assumption.
GRAPH_BYTES = int(0.4 * GIB)
GRAPH_BYTES_PER_LAYER = 18 * MIB
# NCCL and the buffers of the custom all-reduce, for each of several GPUs. An assumption: not measured.
PARALLEL_BYTES = 1 * GIB
# What a sleeping engine keeps on its GPU: the CUDA context and what its own allocator does not manage. Seen: 1,889 and 2,003 MiB.
ASLEEP_MIB = 2050
# An engine holds a little more than its share (850 MiB seen), which is not another program's.
FOREIGN_TOLERANCE_MIB = 1024


class PlanError(ValueError):
    """An input that no plan can be made from; the message is one sentence for the user."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as a program sees it: `total_mib` without what the driver reserves."""

    name: str
    total_mib: int
    free_mib: int
    capability: float = 0.0

    @property
    def total(self) -> int:
        return self.total_mib * MIB


@dataclass(frozen=True)
class Layers:
    """Layers that keep their KV cache alike: all tokens, the last `window` of them, or one `chunk`."""

    count: int
    window: int | None = None
    chunk: bool = False


@dataclass(frozen=True)
class Shape:
    """What config.json says about a model, as far as memory depends on it."""

    architecture: str
    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    latent_dim: int
    intermediate: int
    experts: int
    active_experts: int
    expert_intermediate: int
    vocabulary: int
    max_context: int
    quantization: str
    group_size: int
    dtype_bytes: int
    attention: tuple[Layers, ...]
    embedding_parameters: int
    linear_parameters: int
    other_parameters: int
    multimodal: bool = False
    stateful_layers: int = 0

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.linear_parameters + self.other_parameters

    def weight_bytes(self) -> int:
        """Return what the weights take in memory if nothing but the config is known."""
        bits, group_bits = LINEAR_BITS[self.quantization]
        if self.quantization in ("awq", "gptq", "int4", "mxfp4"):
            bits += group_bits / self.group_size
        plain = (self.embedding_parameters + self.other_parameters) * self.dtype_bytes
        return plain + int(self.linear_parameters * (self.dtype_bytes if self.quantization == "bf16" else bits / 8))

    def kv_bytes_per_layer(self, tensor_parallel: int, element_bytes: int) -> int:
        """Return the bytes of one token in one layer on one GPU. A latent (MLA) is kept whole on every GPU."""
        if self.latent_dim:
            return self.latent_dim * element_bytes
        return 2 * max(1, math.ceil(self.kv_heads / tensor_parallel)) * self.head_dim * element_bytes

    def kv_bytes_per_token(self, tensor_parallel: int, element_bytes: int) -> int:
        """Return the bytes of one token in all layers on one GPU, as long as no window has been left."""
        return sum(layers.count for layers in self.attention) * self.kv_bytes_per_layer(tensor_parallel, element_bytes)


@dataclass(frozen=True)
class Batch:
    """How many tokens one step of the engine takes, and how many requests."""

    tokens: int
    requests: int


@dataclass(frozen=True)
class Wish:
    """What the user asks for. 0 means that the plan chooses. `pipeline` is how many hosts share the layers."""

    utilization: float = 0.9
    context: int = 0
    tensor_parallel: int = 0
    kv_element_bytes: int = 2
    batch_tokens: int = 0
    batch_requests: int = 0
    pipeline: int = 1


@dataclass(frozen=True)
class Memory:
    """What one GPU holds under a plan, in bytes, and what the KV cache then carries."""

    weights: int
    overhead: int
    kv_cache: int
    kv_bytes_per_token: int
    kv_tokens: int
    contexts: float
    longest_context: int


@dataclass(frozen=True)
class Plan:
    """The answer for one model on some GPUs. `reason` and `advice` are sentences, and empty if it fits."""

    fits: bool
    reason: str
    advice: str
    gpu: Gpu
    tensor_parallel: int
    context: int
    memory: Memory
    batch: Batch


# ---------------------------------------------------------------------------------------------------------------- the config


def read_shape(config: Any, known_architectures: set[str] | None = None) -> Shape:
    """Return the shape that a config.json describes. Raises PlanError."""
    if not isinstance(config, dict):
        raise PlanError("config.json does not hold an object.")
    architecture = str((config.get("architectures") or [""])[0])
    if not architecture:
        raise PlanError("config.json names no architecture, so vLLM cannot know what model this is.")
    if known_architectures and architecture not in known_architectures:
        raise PlanError(f"the architecture {architecture} is none that the pinned vLLM serves.")
    text = config.get("text_config") or config.get("llm_config") or {}
    merged = {**config, **text} if isinstance(text, dict) else config
    # A quantisation is described for the whole model even where its text part has a config of its own.
    quantization = config.get("quantization_config") or merged.get("quantization_config") or {}
    try:
        return _shape(architecture, merged, quantization, multimodal=any(key in config for key in ("vision_config", "audio_config")))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"config.json of {architecture} lacks a number that memory depends on, or has it in a form not known: {error!r}.") from None


def _shape(architecture: str, config: dict[str, Any], quantization_config: dict[str, Any], *, multimodal: bool) -> Shape:
    model_type = str(config.get("model_type") or "")
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers")
    hidden = _number(config, "hidden_size", "n_embd", "d_model", default=_text_default(model_type, "hidden_size"))
    heads = _number(config, "num_attention_heads", "n_head", "n_heads", default=_text_default(model_type, "num_attention_heads"))
    if not all(value > 0 for value in (layers, hidden, heads)):
        raise PlanError(f"config.json says {layers} layers, a hidden size of {hidden} and {heads} heads, which is no model.")
    kv_heads = _number(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", default=_text_default(model_type, "num_key_value_heads") or heads)
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    head_dim = _number(config, "head_dim", default=_text_default(model_type, "head_dim") or hidden // heads)
    latent = _number(config, "kv_lora_rank", default=0) + _number(config, "qk_rope_head_dim", default=0) if _is_latent(config) else 0
    vocabulary = _number(config, "vocab_size", default=_text_default(model_type, "vocab_size"))
    intermediate = _number(config, "intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", default=4 * hidden)
    experts = _number(config, "num_experts", "num_local_experts", "n_routed_experts", default=0)
    attention, stateful = attention_layers(config, layers)
    embedding = _embedding_parameters(config, model_type, vocabulary, hidden)
    linear, other = _layer_parameters(config, layers, hidden, heads, kv_heads, head_dim, intermediate, experts)
    quantization, group_size = read_quantization(quantization_config)
    if quantization == "mxfp4":
        # Only the experts are kept in 4 bits.
        outside = linear - layers * experts * 3 * hidden * _number(config, "intermediate_size")
        linear, other = linear - outside, other + outside
    return Shape(
        architecture=architecture,
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        latent_dim=latent,
        intermediate=intermediate,
        experts=experts,
        active_experts=_number(config, "num_experts_per_tok", default=1) if experts else 0,
        expert_intermediate=_number(config, "moe_intermediate_size", "intermediate_size", default=intermediate) if experts else 0,
        vocabulary=vocabulary,
        max_context=max_context(config),
        quantization=quantization,
        group_size=group_size,
        dtype_bytes=2,  # vLLM serves float32 models in 16 bits, too, unless it is told otherwise
        attention=attention,
        embedding_parameters=embedding,
        linear_parameters=linear,
        other_parameters=other,
        multimodal=multimodal,
        stateful_layers=stateful,
    )


def _text_default(model_type: str, key: str) -> int | None:
    """Gemma 3's published configs leave out what the library's defaults say."""
    defaults = {
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "hidden_size": 2304,
    }
    return defaults.get(key) if model_type == "gemma3_text" else None


def _number(config: dict[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    if default is None:
        raise KeyError(names[0])
    return default


def _is_latent(config: dict[str, Any]) -> bool:
    # MiniCPM3 has the same keys, but vLLM expands its latent to whole heads.
    return bool(config.get("kv_lora_rank")) and config.get("model_type") != "minicpm3"


def attention_layers(config: dict[str, Any], layers: int) -> tuple[tuple[Layers, ...], int]:
    """Return the layers by the way they keep their KV cache, and how many keep a state of fixed size instead."""
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False:
        window = None
    model_type = config.get("model_type")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = _layer_kinds(config, model_type, layers, window)
    chunk = config.get("attention_chunk_size")
    counts = [
        Layers(sum(kind in ("full_attention", "attention") for kind in kinds)),
        Layers(sum(kind == "sliding_attention" for kind in kinds), window=window),
        Layers(sum(kind == "chunked_attention" for kind in kinds), window=chunk, chunk=True),
    ]
    found = tuple(entry for entry in counts if entry.count)
    return found, len(kinds) - sum(entry.count for entry in found)


def _layer_kinds(config: dict[str, Any], model_type: Any, layers: int, window: int | None) -> list[str]:
    if config.get("attention_chunk_size"):
        return ["full_attention" if (index + 1) % 4 == 0 else "chunked_attention" for index in range(layers)]
    if not window:
        return ["full_attention"] * layers
    if model_type == "gemma2":
        return ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
    default = {"gemma3_text": 6, "gemma3": 6, "cohere2": 4}.get(str(model_type))
    pattern = config.get("sliding_window_pattern") or default
    if pattern:
        return ["sliding_attention" if (index + 1) % int(pattern) else "full_attention" for index in range(layers)]
    first = int(config.get("max_window_layers") or 0) if model_type in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe") else 0
    return ["full_attention" if index < first else "sliding_attention" for index in range(layers)]


def read_quantization(config: dict[str, Any]) -> tuple[str, int]:
    """Return the format of the linear layers and the size of its groups. Raises PlanError."""
    method = str(config.get("quant_method") or "").lower()
    bits = config.get("bits") or config.get("w_bit") or 4
    if method in ("", "none"):
        return "bf16", 0
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin", "auto_awq", "auto-round"):
        if int(bits) == 8:
            return "int8", 0
        return ("awq" if "awq" in method else "gptq"), _group_size(config.get("group_size") or config.get("q_group_size") or 128)
    if method == "mxfp4":
        return "mxfp4", 32
    if method in ("fp8", "fbgemm_fp8", "modelopt"):
        return "fp8", int((config.get("weight_block_size") or [0])[0])
    if method == "compressed-tensors":
        groups: dict[str, Any] = config.get("config_groups") or {}
        first: dict[str, Any] = next(iter(groups.values()), {})
        weights = first.get("weights") or {}
        if int(weights.get("num_bits") or 8) == 4:
            return "int4", _group_size(weights.get("group_size") or 128)
        return ("fp8" if weights.get("type") == "float" else "int8"), 0
    raise PlanError(f"config.json names the quantisation {method}, which this plan cannot size; known are AWQ, GPTQ, FP8, MXFP4 and compressed-tensors.")


def _group_size(value: Any) -> int:
    size = int(value)
    return size if size > 0 else 4096  # -1: one group for each row


def max_context(config: dict[str, Any]) -> int:
    """Return the longest context that vLLM lets the model have."""
    length = _number(
        config,
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "max_sequence_length",
        default=_text_default(str(config.get("model_type")), "max_position_embeddings") or 2048,
    )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind is None or kind in ("default", "su", "longrope", "llama3", "mrope") or "gemma3" in str(config.get("model_type")):
        return length
    if kind == "yarn":
        length = int(scaling.get("original_max_position_embeddings") or length)
    return int(length * float(scaling.get("factor") or 1))


# -------------------------------------------------------------------------------------------------------------- parameters


def _embedding_parameters(config: dict[str, Any], model_type: str, vocabulary: int, hidden: int) -> int:
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = model_type.startswith("gemma") or model_type == "falcon"
    return vocabulary * hidden * (1 if tied else 2)


def _layer_parameters(
    config: dict[str, Any], layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, experts: int
) -> tuple[int, int]:
    """Return the parameters of the linear layers, which a quantisation shrinks, and of all others."""
    if _is_latent(config):
        attention, small = _latent_attention(config, hidden, heads)
    else:
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        small = _attention_small(config, hidden, heads, kv_heads, head_dim)
    norms = hidden * (4 if config.get("model_type") in ("gemma2", "gemma3_text") else 1 if config.get("parallel_attn") else 2)
    matrices = 2 if config.get("parallel_attn") or config.get("model_type") == "falcon" else 3
    dense = matrices * hidden * intermediate
    if config.get("parallel_attn"):
        norms *= 2  # a weight and a bias
    if not experts:
        return layers * (attention + dense), layers * (small + norms) + _final_norm(config, hidden)
    dense_layers, shared = _dense_layers(config, layers), _number(config, "n_shared_experts", default=0)
    width = _number(config, "moe_intermediate_size", "intermediate_size")
    mixture = 3 * hidden * width * (experts + shared) + 3 * hidden * int(config.get("shared_expert_intermediate_size") or 0)
    router = hidden * experts + (experts if config.get("topk_method") == "noaux_tc" else 0)
    if config.get("model_type") == "gpt_oss":
        small += experts * (2 * width + hidden) + experts
    sparse_layers = layers - dense_layers
    linear = layers * attention + dense_layers * dense + sparse_layers * mixture
    return linear, layers * (small + norms) + sparse_layers * router + _final_norm(config, hidden)


def _final_norm(config: dict[str, Any], hidden: int) -> int:
    return hidden * (2 if config.get("parallel_attn") else 1)


def _dense_layers(config: dict[str, Any], layers: int) -> int:
    if config.get("first_k_dense_replace"):
        return int(config["first_k_dense_replace"])
    return len(config.get("mlp_only_layers") or [])


def _attention_small(config: dict[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Biases, and the norms of queries and keys."""
    model_type = str(config.get("model_type"))
    small = 0
    if model_type.startswith("qwen2") or config.get("attention_bias"):
        small += head_dim * (heads + 2 * kv_heads)
    if config.get("attention_bias") and not model_type.startswith("qwen2"):
        small += hidden
    if model_type.startswith("qwen3") or model_type == "gemma3_text":
        small += 2 * head_dim
    if model_type == "gpt_oss":
        small += heads  # attention sinks
    return small


def _latent_attention(config: dict[str, Any], hidden: int, heads: int) -> tuple[int, int]:
    rank, rope = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    nope, value = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
    query_rank = config.get("q_lora_rank")
    query = hidden * int(query_rank) + int(query_rank) * heads * (nope + rope) if query_rank else hidden * heads * (nope + rope)
    return query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden, rank + int(query_rank or 0)


# ---------------------------------------------------------------------------------------------------------------- KV cache


@dataclass(frozen=True)
class Pool:
    """vLLM's pool of blocks: what one block takes, and how many blocks a request of some length needs."""

    layers_per_group: int
    groups: tuple[tuple[Layers, int], ...]
    bytes_per_block: int
    in_flight: int

    def blocks(self, context: int) -> int:
        return sum(number * self._group_blocks(layers, context) for layers, number in self.groups)

    def _group_blocks(self, layers: Layers, context: int) -> int:
        if layers.window is None:
            return math.ceil(context / BLOCK)
        if layers.chunk:
            return math.ceil(min(layers.window + self.in_flight, context) / BLOCK)
        return math.ceil(min(layers.window - 1 + self.in_flight, context) / BLOCK) + 1


def kv_pool(shape: Shape, tensor_parallel: int, element_bytes: int, batch: Batch) -> Pool:
    counts = [layers.count for layers in shape.attention]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = tuple((layers, math.ceil(layers.count / size)) for layers in shape.attention)
    # Two steps are in flight: vLLM schedules the next while one runs.
    return Pool(size, groups, size * BLOCK * shape.kv_bytes_per_layer(tensor_parallel, element_bytes), 2 * batch.tokens)


def kv_capacity(pool: Pool, kv_bytes: int, context: int) -> tuple[int, float]:
    """Return how many tokens vLLM will say that the cache holds, and how many requests of full length."""
    blocks = max(0, kv_bytes) // pool.bytes_per_block
    contexts = blocks / pool.blocks(context)
    return int(contexts * context), contexts


def longest_context(pool: Pool, kv_bytes: int, limit: int) -> int:
    """Return the longest context, up to a limit, of which the cache holds one. One block is never given out."""
    blocks = max(0, kv_bytes) // pool.bytes_per_block - 1
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if pool.blocks(middle) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def default_batch(gpu: Gpu) -> Batch:
    """Return what `vllm serve` chooses by the GPU (vllm/engine/arg_utils.py, get_batch_defaults)."""
    if gpu.total >= 160 * GIB:
        return Batch(16384, 1024)
    if gpu.total >= 70 * GIB and "a100" not in gpu.name.lower():
        return Batch(8192, 1024)
    return Batch(2048, 256)


def step_bytes(shape: Shape, tensor_parallel: int, batch: Batch) -> int:
    """Return what one step takes at its peak beyond weights and cache.

    Three things compete. The first step copies the embedding once while it is compiled; that one decides for small and middling models.
    Activations: the two halves of the MLP and their product, and about four copies of the hidden state. Logits: one row for each request.
    """
    hidden = batch.tokens * shape.hidden * 2
    compile_peak = math.ceil(shape.vocabulary / tensor_parallel) * shape.hidden * 2 + 2 * hidden
    width = math.ceil(shape.intermediate / tensor_parallel)
    activations = batch.tokens * 3 * width * 2 + 4 * hidden
    if shape.experts:
        expert = math.ceil(shape.expert_intermediate / tensor_parallel)
        activations = max(activations, batch.tokens * shape.active_experts * (max(2 * expert, shape.hidden) + expert) * 2 + 4 * hidden)
    logits = batch.requests * shape.vocabulary * 2 + hidden
    return max(compile_peak, activations, logits)


def overhead_bytes(shape: Shape, tensor_parallel: int, batch: Batch, *, several: bool) -> int:
    graphs = GRAPH_BYTES + GRAPH_BYTES_PER_LAYER * shape.layers
    return FIXED_BYTES + graphs + step_bytes(shape, tensor_parallel, batch) + (PARALLEL_BYTES if several else 0)


# -------------------------------------------------------------------------------------------------------------- the verdict


def check_wish(wish: Wish, shape: Shape) -> None:
    """Raise PlanError for a wish that no GPU could fulfil."""
    if not 0 < wish.utilization <= 1:
        raise PlanError(f"the utilisation is {wish.utilization:g}; allowed is more than 0 and at most 1.")
    if wish.context < 0 or wish.tensor_parallel < 0:
        raise PlanError(f"the context is {wish.context} and the number of GPUs {wish.tensor_parallel}; neither can be negative.")
    if not 1 <= wish.pipeline <= shape.layers:
        raise PlanError(f"{wish.pipeline} hosts were to share the model's {shape.layers} layers; allowed is 1 to {shape.layers}.")
    if wish.context > shape.max_context:
        raise PlanError(f"a context of {wish.context:,} tokens was asked for, and the model has at most {shape.max_context:,}.")


def stage_of(shape: Shape, disk_bytes: int | None, pipeline: int) -> tuple[Shape, int | None]:
    """Return the part of a model that one of several hosts serves, the largest one. The first holds the embedding, the last the logits' matrix."""
    if pipeline == 1:
        return shape, disk_bytes
    layers = math.ceil(shape.layers / pipeline)
    share = layers / shape.layers
    stage = replace(
        shape,
        layers=layers,
        attention=tuple(replace(kind, count=math.ceil(kind.count * share)) for kind in shape.attention),
        embedding_parameters=min(shape.embedding_parameters, shape.vocabulary * shape.hidden),
        linear_parameters=math.ceil(shape.linear_parameters * share),
        other_parameters=math.ceil(shape.other_parameters * share),
    )
    return stage, None if disk_bytes is None else math.ceil(disk_bytes * stage.weight_bytes() / shape.weight_bytes())


def make_plan(shape: Shape, disk_bytes: int | None, gpus: Sequence[Gpu], wish: Wish) -> Plan:
    """Return the plan with the fewest GPUs that fits, or the one for all GPUs with the reason why it does not. Raises PlanError.

    `gpus` are those of one host; with `wish.pipeline` hosts each has as many, and holds as much.
    """
    check_wish(wish, shape)
    shape, disk_bytes = stage_of(shape, disk_bytes, wish.pipeline)
    if not gpus:
        raise PlanError("there is no GPU to plan for.")
    if any(gpu.total_mib <= 0 for gpu in gpus):
        raise PlanError("the GPU does not say how much memory it has, so give it with gpus.")
    # Largest first: a small card for the screen beside a big one is no reason to plan for the small one.
    ordered = sorted(gpus, key=lambda gpu: -gpu.total_mib)
    if wish.tensor_parallel > len(ordered):
        raise PlanError(f"{wish.tensor_parallel} GPUs were asked for, and there are {len(ordered)}.")
    sizes = [wish.tensor_parallel] if wish.tensor_parallel else [2**power for power in range(len(ordered).bit_length()) if 2**power <= len(ordered)]
    plans = [plan_on(shape, disk_bytes, _least(ordered[:size]), size, wish) for size in sizes]
    chosen = next((plan for plan in plans if plan.fits), plans[-1])
    if chosen.fits:
        return chosen
    return _with_advice(shape, disk_bytes, chosen, wish)


def _least(gpus: Sequence[Gpu]) -> Gpu:
    """Return the GPU that decides when some share a model: the smallest, with the least free memory of them all."""
    return replace(gpus[-1], free_mib=min(gpu.free_mib for gpu in gpus))


def plan_on(shape: Shape, disk_bytes: int | None, gpu: Gpu, tensor_parallel: int, wish: Wish) -> Plan:
    """Return the plan for some number of GPUs like this one."""
    memory, batch = memory_on(shape, disk_bytes, gpu, tensor_parallel, wish)
    context = wish.context or max(1, min(shape.max_context, memory.longest_context))
    reason = _obstacle(shape, gpu, tensor_parallel) or _shortage(memory, gpu, tensor_parallel, wish, context)
    return Plan(not reason, reason, "", gpu, tensor_parallel, context, memory, batch)


def memory_on(shape: Shape, disk_bytes: int | None, gpu: Gpu, tensor_parallel: int, wish: Wish) -> tuple[Memory, Batch]:
    default = default_batch(gpu)
    batch = Batch(wish.batch_tokens or default.tokens, wish.batch_requests or default.requests)
    weights = loaded_bytes(shape, disk_bytes, gpu) // tensor_parallel
    overhead = overhead_bytes(shape, tensor_parallel, batch, several=tensor_parallel * wish.pipeline > 1)
    kv_cache = int(wish.utilization * gpu.total) - weights - overhead
    pool = kv_pool(shape, tensor_parallel, wish.kv_element_bytes, batch)
    longest = longest_context(pool, kv_cache, shape.max_context)
    tokens, contexts = kv_capacity(pool, kv_cache, wish.context or max(1, longest))
    per_token = shape.kv_bytes_per_token(tensor_parallel, wish.kv_element_bytes)
    return Memory(weights, overhead, max(0, kv_cache), per_token, tokens, contexts, longest), batch


def loaded_bytes(shape: Shape, disk_bytes: int | None, gpu: Gpu) -> int:
    """Return what the weights take on all GPUs together. The kernel that vLLM takes for AWQ on Hopper wants 16 bit zero points."""
    loaded = disk_bytes if disk_bytes is not None else shape.weight_bytes()
    if shape.quantization == "awq" and gpu.capability == 9.0:
        loaded += int(shape.linear_parameters / shape.group_size * 12 / 8)
    return loaded


def _obstacle(shape: Shape, gpu: Gpu, tensor_parallel: int) -> str:
    """Return why the model cannot run on such GPUs whatever their memory, or nothing."""
    if 0 < gpu.capability < OLDEST_CAPABILITY:
        return f"the {gpu.name} has compute capability {gpu.capability:g}, and vLLM needs {OLDEST_CAPABILITY:g}."
    if shape.quantization == "mxfp4" and 0 < gpu.capability < MXFP4_CAPABILITY:
        return f"the {gpu.name} has compute capability {gpu.capability:g}, and MXFP4 needs {MXFP4_CAPABILITY:g}."
    if shape.heads % tensor_parallel or (tensor_parallel % shape.kv_heads and shape.kv_heads % tensor_parallel):
        return f"the model's {shape.heads} heads and {shape.kv_heads} KV heads cannot be shared evenly by {tensor_parallel} GPUs."
    # The group runs along the input of a layer, which is what the down projection is split by.
    width = shape.expert_intermediate if shape.experts else shape.intermediate
    if (
        tensor_parallel > 1
        and shape.quantization in ("awq", "gptq", "int4", "fp8")
        and 1 < shape.group_size <= width
        and width // tensor_parallel % shape.group_size
    ):
        return f"the groups of {shape.group_size} in which the weights are quantised cannot be shared evenly by {tensor_parallel} GPUs."
    return ""


def _shortage(memory: Memory, gpu: Gpu, tensor_parallel: int, wish: Wish, context: int) -> str:
    budget = wish.utilization * gpu.total
    where = f"{wish.utilization:g} of {gpu.total / GIB:.1f} GiB" + (f" on each of {tensor_parallel} GPUs" if tensor_parallel > 1 else "")
    if memory.weights + memory.overhead >= budget:
        return (
            f"the weights take {memory.weights / GIB:.1f} GiB and the engine {memory.overhead / GIB:.1f} GiB, more than the {budget / GIB:.1f} GiB ({where})."
        )
    if memory.longest_context < context or memory.longest_context < 1:
        room = f"{memory.kv_cache / GIB:.1f} GiB are left for the KV cache ({where})"
        return f"{room}, which holds a context of {memory.longest_context:,} tokens and not one of {context:,}."
    return ""


def _with_advice(shape: Shape, disk_bytes: int | None, plan: Plan, wish: Wish) -> Plan:
    """Return the plan with a sentence on what would fit: the change that costs least first."""
    gpu, size = plan.gpu, plan.tensor_parallel

    def fits(on: Gpu = gpu, gpus: int = size, bytes_on_disk: int | None = disk_bytes, model: Shape = shape, **changed: Any) -> bool:
        return plan_on(model, bytes_on_disk, on, gpus, replace(wish, **changed)).fits

    useful = 2048
    # Without an obstacle that memory does not lift.
    if not _obstacle(shape, gpu, size):
        if wish.context and plan.memory.longest_context >= min(useful, wish.context):
            return replace(plan, advice=f"A context of {plan.memory.longest_context // BLOCK * BLOCK:,} tokens fits.")
        if wish.utilization < 0.95 and fits(utilization=0.95):
            return replace(plan, advice="A utilisation of 0.95 is enough.")
        if wish.kv_element_bytes == 2 and fits(kv_element_bytes=1):
            return replace(plan, advice="A KV cache in fp8 is enough (--kv-cache-dtype fp8).")
    offers = []
    four_bit = _as_awq(shape)
    if shape.quantization in ("bf16", "fp8", "int8") and fits(model=four_bit, bytes_on_disk=None):
        offers.append(f"a 4 bit version of it (AWQ, about {four_bit.weight_bytes() * wish.pipeline / GIB:.0f} GiB)")
    more = next((count for count in (2, 4, 8, 16) if count > size and fits(gpus=count)), None)
    if more:
        offers.append(f"{more} such GPUs")
    larger = next(
        (gib for gib in (24, 32, 40, 48, 80, 96, 141, 180, 288) if gib * GIB > gpu.total and fits(on=Gpu(gpu.name, gib * 1000, gib * 1000, gpu.capability))),
        None,
    )
    if larger:
        offers.append(f"{'GPUs' if size > 1 else 'a GPU'} of {larger} GB")
    return replace(plan, advice=f"What would fit: {', or '.join(offers)}." if offers else "No GPU known to this plan would fit it; a smaller model would.")


def _as_awq(shape: Shape) -> Shape:
    return replace(shape, quantization="awq", group_size=128)


# ----------------------------------------------------------------------------------------------------------------- the swap


@dataclass(frozen=True)
class Running:
    """The model that serves now: what its process holds on each GPU, and whether it can be put to sleep."""

    name: str
    used_mib: int
    weights_mib: int
    sleep_mode: bool = False
    slept_before: bool = False


@dataclass(frozen=True)
class Serving:
    """What serves, and whether the planned model waits beside it for a rollback: loaded before, and perhaps asleep."""

    running: Running | None = None
    asleep: bool = False
    loaded_before: bool = False


def read_serving(found: dict[str, Any], model: str, total_mib: int) -> Serving:
    """Return what the module vllm_swap says of its slots, for a model that is planned on GPUs of this size.

    A slot holds the share that it was started with, so that what other programs hold on the GPU is seen.
    """
    slots = dict(found.get("slots") or {})
    active = slots.pop(found.get("active") or "", None)
    if active is None:
        return Serving()
    standby: dict[str, Any] = next(iter(slots.values()), {})
    condition = str(standby.get("condition"))
    beside = {"asleep": ASLEEP_MIB, "running": int(standby.get("utilization", 0) * total_mib)}.get(condition, 0)
    used = int(active["utilization"] * total_mib) + beside
    known = standby.get("model") == model
    running = Running(active["model"], used, active["weights_mib"], active["sleep_mode"], active["slept_before"])
    return Serving(running, known and condition == "asleep", known)


@dataclass(frozen=True)
class Swap:
    strategy: str  # start, side_by_side, sleep, hold_and_recreate or none
    hold_seconds: float
    reason: str
    utilization: float


@dataclass(frozen=True)
class Timings:
    """Seconds seen on an H100 (vLLM 0.26, Llama 3.1 8B in bf16, 15 GiB of weights)."""

    # The first sleep at level 1 pins host memory for the weights: 10.1 and 16.2 s. It stays pinned, so the next sleep took 0.4 s.
    first_sleep_per_gib: float = 1.05
    later_sleep_per_gib: float = 0.03
    wake_per_gib: float = 0.04  # 0.5 and 0.6 s
    stop: float = 2.5
    load_warm: float = 75.0  # compile cache kept
    load_cold: float = 135.0
    read_gib_per_second: float = 1.0  # weights from the disk; an assumption


def plan_swap(plan: Plan, serving: Serving, *, host_free_mib: int, timings: Timings) -> Swap:
    """Return how to change from what serves to the planned model, the cheapest way first."""
    running, asleep = serving.running, serving.asleep
    gib = plan.memory.weights * plan.tensor_parallel / GIB
    load = (timings.load_warm if serving.loaded_before else timings.load_cold) + gib / timings.read_gib_per_second
    wanted = plan.memory.weights + plan.memory.overhead
    if not plan.fits:
        return Swap("none", 0.0, "the new model does not fit even alone, so what runs stays as it is", 0.0)
    gpu, share = plan.gpu, plan_utilization(plan)
    foreign = max(0, gpu.total_mib - gpu.free_mib - (running.used_mib if running else 0))
    # vLLM refuses to start where less is free than its share of the whole.
    if gpu.total_mib - foreign + FOREIGN_TOLERANCE_MIB < share * gpu.total_mib:
        anyway = f" even if {running.name} stops" if running else ""
        return Swap("none", 0.0, f"other programs hold {foreign:,} of {gpu.total_mib:,} MiB, so a share of {share:g} is not free{anyway}.", 0.0)
    if running is None:
        return Swap("start", 0.0, "nothing runs now", 0.0)
    # Green's share is what is free, at most what was asked for.
    beside = min(share, math.floor(100 * (gpu.free_mib - 256) / gpu.total_mib) / 100)
    one_context = plan.memory.kv_bytes_per_token * plan.context
    if beside > 0 and beside * gpu.total >= wanted + one_context:
        return Swap(
            "side_by_side", 0.0, f"{gpu.free_mib:,} MiB are free beside {running.name}, and the new model needs {(wanted + one_context) // MIB:,}", beside
        )
    blue_gib = running.weights_mib / 1024
    sleep = (timings.later_sleep_per_gib if running.slept_before else timings.first_sleep_per_gib) * blue_gib
    stop_and_load = timings.stop + load
    if not running.sleep_mode:
        why = f"{running.name} was started without sleep mode"
    elif gpu.total_mib - foreign - ASLEEP_MIB < math.ceil(share * gpu.total_mib):
        why = f"beside {running.name} asleep ({ASLEEP_MIB:,} MiB) and other programs ({foreign:,} MiB) the new model's share is not free"
    elif host_free_mib < running.weights_mib + 2048:
        why = f"the host has {host_free_mib:,} MiB of memory free, and the weights of {running.name} take {running.weights_mib:,}"
    else:
        then = timings.wake_per_gib * gib if asleep else load
        reason = f"{running.name} sleeps, and {'the new model wakes' if asleep else 'the new model loads'}; going back takes one wake-up"
        return Swap("sleep", round(sleep + then, 1), reason, share)
    return Swap("hold_and_recreate", round(stop_and_load, 1), f"{why}, so it stops before the new one loads", share)


def plan_utilization(plan: Plan) -> float:
    """Return the share of the memory that the plan takes, as asked for."""
    taken = plan.memory.weights + plan.memory.overhead + plan.memory.kv_cache
    return round(taken / plan.gpu.total, 4)


# ------------------------------------------------------------------------------------------------------------ the catalogue


def match_family(families: Sequence[dict[str, Any]], name: str, shape: Shape) -> dict[str, Any] | None:
    """Return the first family that the name belongs to and that has such a config, or else the one that takes any name."""
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower())
    for family in families:
        if shape.model_type in family["model_types"] and re.search(family["name_pattern"], plain):
            return family
    return None


def check_parser(kind: str, name: str, known: Sequence[str]) -> None:
    """Raise PlanError for a parser that the pinned vLLM does not have."""
    if name and known and name not in known:
        close = [entry for entry in known if name[:4] == entry[:4]]
        hint = f", for example {', '.join(close[:3])}" if close else ""
        raise PlanError(f"the pinned vLLM has no {kind} parser {name}{hint}.")
