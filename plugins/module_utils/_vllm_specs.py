# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What each layer of a model caches, from its config.json: vLLM's cache specifications by formula. PRIVATE to the collection: it may change at any time.

A formula stands for an architecture only where a record of vLLM (tests/unit/data/plans.json) or its source says so; `BY_SOURCE` names the latter.
Any other architecture is unknown, and no plan is made from a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import MOST_LAYERS, Config, PlanError, UnknownArchitecture, plain

FULL, SLIDING, CHUNKED, LATENT, SLIDING_LATENT, STATE = "full", "sliding", "chunked", "mla", "sliding_mla", "state"
# Gated delta networks keep a third state for each request where FlashInfer computes them (vllm/v1/attention/backends/gdn_attn.py).
GATED_DELTA = "gated_delta"
INDEXER = "indexer"
FLOAT = 4
# Bytes of one token's key in the indexer of sparse attention: 128 values of 8 bits and a scale of 32 bits for each 128 (models/deepseek_v32/attention.py).
INDEX_GROUP = 128
# Packed formats of a latent in 8 bits: DeepSeek V3.2's (v1/attention/backends/mla/flashmla_sparse.py) and V4's (models/deepseek_v4/attention.py).
PACKED_LATENT, PACKED_LATENT_V4 = 656, 584
V4_BLOCK, V4_WINDOW_BLOCK, V4_ALIGNMENT = 256, 64, 576


@dataclass(frozen=True)
class Layer:
    """Layers that keep their cache alike. `bytes` are those of one token in one layer on one GPU, or of one request's state for `state`.

    `window` is in tokens. `tokens_per_entry` tokens share what is kept. A `block` of tokens and the `alignment` of its bytes are given
    where the model fixes them. `role` tells apart what is kept alike for different ends.
    """

    kind: str
    count: int
    bytes: int
    window: int = 0
    tokens_per_entry: int = 1
    block: int = 0
    alignment: int = 1
    role: str = ""


@dataclass(frozen=True)
class Cache:
    """How the cache is kept: over how many GPUs of a host, and in how many bytes an element of keys and values.

    `state_element` are the bytes of a number in a state where `--mamba-ssm-cache-dtype` says it, 0 where the model does.
    """

    tensor_parallel: int = 1
    element: int = 2
    state_element: int = 0


Rule = Callable[[Config, Cache], list[Layer]]

# What the words of `layer_types` and its like mean. Some layers only compute.
WORDS = {
    "full_attention": FULL,
    "attention": FULL,
    "global_attention": FULL,
    "global": FULL,
    "full": FULL,
    "sliding_attention": SLIDING,
    "sliding_window_attention": SLIDING,
    "local_attention": SLIDING,
    "local": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": STATE,
    "mamba": STATE,
    "mamba2": STATE,
    "conv": STATE,
    "short_conv": STATE,
    "moe": "",
    "mlp": "",
}


def layer_count(config: Config) -> int:
    """Return how many layers the model has. Raises PlanError."""
    return config.number("num_hidden_layers", "n_layer", "n_layers", "num_layers", least=1, most=MOST_LAYERS)


def head_count(config: Config) -> int:
    heads = config.number("num_attention_heads", "n_head", "n_heads", "num_heads")
    if heads < 1:
        raise PlanError(f"config.json says {heads} heads, which is no model.")
    return heads


def kv_head_count(config: Config) -> int:
    """Return the heads of keys and values. Raises PlanError."""
    if config.flag("multi_query") and not config.flag("new_decoder_architecture"):
        return 1
    attention = config.get("attn_config")
    if isinstance(attention, dict) and attention.get("kv_n_heads") is not None:
        return config.checked("attn_config.kv_n_heads", attention["kv_n_heads"], 1, 1_000_000)
    return config.number("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", default=head_count(config), least=1, most=1_000_000)


def head_size(config: Config) -> int:
    found = config.number("head_dim", "hidden_size_per_head", "kv_channels", "attention_head_dim", default=0, most=1_000_000)
    return found or max(1, config.number("hidden_size", "n_embd", "d_model") // head_count(config))


def kept(kv_heads: int, keys: int, values: int, cache: Cache) -> int:
    """Return the bytes of one token's keys and values in one layer on one GPU. A head that is not shared out is kept on each GPU."""
    return max(1, math.ceil(kv_heads / cache.tensor_parallel)) * (keys + values) * cache.element


def counted(layers: Sequence[Layer]) -> list[Layer]:
    """Return layers in their order, those that are alike as one."""
    found: dict[Layer, int] = {}
    for layer in layers:
        if layer.count and layer.bytes:
            alike = replace(layer, count=1)
            found[alike] = found.get(alike, 0) + layer.count
    return [replace(layer, count=count) for layer, count in found.items()]


# --------------------------------------------------------------------------------------------------- kinds of layers, in their order


def kinds_of(config: Config, layers: int) -> list[str]:
    """Return the kind of each layer. Raises PlanError for a word that is not known."""
    for name in ("layer_types", "layers_block_type", "attention_layer_types"):
        words = config.per_layer(name, str, layers)
        if words is not None:
            unknown = next((word for word in words if word not in WORDS), None)
            if unknown is not None:
                raise PlanError(f"config.json of {config.architecture} has {plain(unknown)} in {name}; known are {', '.join(sorted(WORDS))}.")
            return [WORDS[word] for word in words]
    return unnamed_kinds(config, layers)


def unnamed_kinds(config: Config, layers: int) -> list[str]:
    """Return the kinds where no list names them, as transformers' classes derive them from the type of the model."""
    model_type = config.model_type
    if model_type.startswith("llama4") or (config.get("attention_chunk_size") and model_type.startswith("llama")):
        return [FULL if (index + 1) % 4 == 0 else CHUNKED for index in range(layers)]
    interval = config.number("full_attention_interval", default=0, most=MOST_LAYERS)
    if interval:
        return [FULL if (index + 1) % interval == 0 else STATE for index in range(layers)]
    if not window_of(config):
        return [FULL] * layers
    if model_type in ("gemma2", "gpt_oss", "vaultgemma"):
        first, second = (SLIDING, FULL)
        return [second if index % 2 else first for index in range(layers)]
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str):
        return [SLIDING if pattern[index % len(pattern)].upper() == "L" else FULL for index in range(layers)] if pattern else [FULL] * layers
    default = {"gemma3_text": 6, "gemma3": 6, "cohere2": 4, "exaone4": 4, "gemma4_text": 6, "olmo3": 4, "afmoe": 4, "gemma3n_text": 5}.get(model_type, 0)
    period = config.number("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", default=default, most=MOST_LAYERS)
    if period:
        return [SLIDING if (index + 1) % period else FULL for index in range(layers)]
    # Qwen's first layers see everything, where a window is used at all.
    first_windowed = config.number("max_window_layers", default=0) if model_type in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe") else 0
    return [FULL if index < first_windowed else SLIDING for index in range(layers)]


def window_of(config: Config) -> int:
    """Return the window of those layers that have one, in tokens, 0 if there is none. Raises PlanError."""
    if config.get("use_sliding_window") is False:
        return 0
    value = config.get("sliding_window")
    if isinstance(value, list):
        value = next((entry for entry in value if entry), None)
    return 0 if value is None else config.checked("sliding_window", value)


def attention(config: Config, cache: Cache) -> list[Layer]:
    """Keys and values of every head, of all tokens, of a window or of a chunk."""
    layers = layer_count(config)
    window, chunk = window_of(config), config.number("attention_chunk_size", default=0)
    size = head_size(config)
    token = kept(kv_head_count(config), size, size, cache)
    if config.architecture in ("Cohere2ForCausalLM", "Cohere2MoeForCausalLM", "Cohere2VisionForConditionalGeneration"):
        window += 1  # as vLLM reads it (commandr.py)
    found = []
    for kind in kinds_of(config, layers):
        if kind == STATE:
            raise PlanError(f"config.json of {config.architecture} has layers with a state, which this architecture does not have.")
        if (kind == SLIDING and not window) or (kind == CHUNKED and not chunk):
            kind = FULL
        found.append(Layer(kind, 1, token, {SLIDING: window, CHUNKED: chunk}.get(kind, 0)))
    return counted(found)


def every_layer(config: Config, cache: Cache) -> list[Layer]:
    """Attention of all tokens whatever the configuration says of windows: vLLM runs these models so."""
    size = head_size(config)
    return [Layer(FULL, layer_count(config), kept(kv_head_count(config), size, size, cache))]


def shared(config: Config, cache: Cache) -> list[Layer]:
    """Gemma 3n: the last layers read the keys and values of earlier ones."""
    layers = layer_count(config)
    own = layers - config.number("num_kv_shared_layers", default=0, most=layers)
    size = head_size(config)
    token, window = kept(kv_head_count(config), size, size, cache), window_of(config)
    return counted([Layer(kind, 1, token, window if kind == SLIDING else 0) for kind in kinds_of(config, layers)[:own]])


def two_geometries(config: Config, cache: Cache) -> list[Layer]:
    """Gemma 4: layers that see everything have heads of another size and number than those with a window, and the last may share."""
    layers = layer_count(config)
    own = layers - config.number("num_kv_shared_layers", default=0, most=layers)
    local = kept(kv_head_count(config), head_size(config), head_size(config), cache)
    size = config.number("global_head_dim", default=head_size(config), least=1)
    heads = config.number("num_global_key_value_heads", default=kv_head_count(config), least=1) if config.flag("attention_k_eq_v") else kv_head_count(config)
    whole = kept(heads, size, size, cache)
    kinds = kinds_of(config, layers)[:own]
    return counted([Layer(SLIDING, 1, local, window_of(config)) if kind == SLIDING else Layer(FULL, 1, whole) for kind in kinds])


def mimo_v2(config: Config, cache: Cache) -> list[Layer]:
    """MiMo V2: windows have heads of their own, and values are smaller than keys."""
    layers = layer_count(config)
    pattern = config.per_layer("hybrid_layer_pattern", int, layers)
    kinds = kinds_of(config, layers) if pattern is None else [SLIDING if entry else FULL for entry in pattern]
    size, values = head_size(config), config.number("v_head_dim", default=head_size(config), least=1)
    window_size = config.number("swa_head_dim", default=size, least=1)
    local = kept(
        config.number("swa_num_key_value_heads", default=kv_head_count(config), least=1),
        window_size,
        config.number("swa_v_head_dim", default=values, least=1),
        cache,
    )
    window = config.number("sliding_window_size", "sliding_window", default=128, least=1)
    whole = kept(kv_head_count(config), size, values, cache)
    return counted([Layer(SLIDING, 1, local, window) if kind == SLIDING else Layer(FULL, 1, whole) for kind in kinds])


def expanded(config: Config, cache: Cache) -> list[Layer]:
    """MiniCPM3 has a latent, which vLLM expands to whole heads before it keeps them."""
    size = config.number("qk_nope_head_dim", default=64) + config.number("qk_rope_head_dim", default=32)
    return [Layer(FULL, layer_count(config), kept(head_count(config), size, size, cache))]


# ---------------------------------------------------------------------------------------------------------------------- latents


def latent_size(config: Config) -> int:
    return config.number("kv_lora_rank", least=1) + config.number("qk_rope_head_dim", default=64)


def latent(config: Config, cache: Cache) -> list[Layer]:
    """DeepSeek's latent attention: one vector for a token, whole on every GPU."""
    if config.get("kv_lora_rank") is None:
        return attention(config, cache)
    if config.architecture == "MistralLarge3ForCausalLM" and config.model_type == "mistral4":
        # Read from config.json and not in Mistral's own format, it is none of the types for which vLLM keeps latents (is_deepseek_mla).
        return expanded(config, cache)
    return [Layer(LATENT, layer_count(config), latent_size(config) * cache.element)]


def double_latent(config: Config, cache: Cache) -> list[Layer]:
    """LongCat: two attentions in each layer. `num_hidden_layers`, where it is there, counts the attentions already."""
    layers = config.number("num_layers", default=0, most=MOST_LAYERS) or layer_count(config) // 2
    return [Layer(LATENT, 2 * layers, latent_size(config) * cache.element)]


def sparse(config: Config, cache: Cache) -> list[Layer]:
    """DeepSeek V3.2 and GLM-5: a latent, and in the layers that choose tokens an indexer's key beside it."""
    layers = layer_count(config)
    token = latent_size(config) * cache.element if cache.element > 1 else PACKED_LATENT
    dim = config.number("index_head_dim", least=1)
    pattern = config.get("index_topk_pattern")
    types = config.per_layer("indexer_types", str, layers)
    if types is not None:
        choosing = sum(entry == "full" for entry in types)
    elif isinstance(pattern, str | list):
        choosing = sum(entry != "S" for entry in pattern[:layers]) + max(0, layers - len(pattern))
    else:
        every, offset = config.number("index_topk_freq", default=1, least=1), config.number("index_skip_topk_offset", default=2)
        choosing = sum(max(index - offset + 1, 0) % every == 0 for index in range(layers))
    key = dim + math.ceil(dim / INDEX_GROUP) * FLOAT
    return [Layer(LATENT, layers, token), *([Layer(LATENT, choosing, key, role=INDEXER)] if choosing else [])]


def deepseek_v4(config: Config, cache: Cache) -> list[Layer]:
    """DeepSeek V4: every layer has a window of latents; most also keep one latent for 4 or 128 tokens, and what is still to be compressed.

    Always in 8 bits, whatever is asked for (models/deepseek_v4/attention.py, _resolve_dsv4_kv_cache_dtype).
    """
    layers = layer_count(config)
    ratios = v4_ratios(config, layers)
    by_ratio = {ratio: sum(entry == ratio for entry in ratios) for ratio in (4, 128)}
    dim, index_dim = config.number("head_dim", least=1), config.number("index_head_dim", default=128, least=1)
    index_key = index_dim + math.ceil(index_dim / INDEX_GROUP) * FLOAT
    found = []
    for ratio, count in by_ratio.items():
        found.append(Layer(LATENT, count, PACKED_LATENT_V4, tokens_per_entry=ratio, block=V4_BLOCK, alignment=V4_ALIGNMENT))
        # Keys and scores of the tokens that are not compressed yet, in 32 bits; groups of 4 overlap.
        overlap, block = (2, 4) if ratio == 4 else (1, 8)
        state = 2 * overlap * FLOAT
        found.append(Layer(SLIDING_LATENT, count, state * dim, overlap * ratio, block=block, alignment=V4_ALIGNMENT, role="compressor"))
        if ratio == 4:
            found.append(Layer(LATENT, count, index_key, tokens_per_entry=4, block=V4_BLOCK, alignment=V4_ALIGNMENT, role=INDEXER))
            found.append(Layer(SLIDING_LATENT, count, state * index_dim, 8, block=block, alignment=V4_ALIGNMENT, role="index compressor"))
    window = config.number("sliding_window", default=128, least=1)
    found.append(Layer(SLIDING_LATENT, layers, PACKED_LATENT_V4, window, block=V4_WINDOW_BLOCK, alignment=V4_ALIGNMENT))
    return [layer for layer in found if layer.count]


def v4_ratios(config: Config, layers: int) -> list[int]:
    """Return how many tokens each layer compresses into one, 0 for a window alone. Raises PlanError."""
    ratios = config.per_layer("compress_ratios", int, layers)
    if ratios is None:
        rates = config.part("compress_rates") or {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
        words = config.per_layer("layer_types", str, layers)
        if words is None:
            raise config.wrong("compress_ratios", None, "a list with a whole number for each layer")
        ratios = [config.checked("compress_rates", rates.get(word, 0)) for word in words]
    strange = next((ratio for ratio in ratios if ratio not in (0, 1, 4, 128)), None)
    if strange is not None:
        raise config.wrong("compress_ratios", strange, "0, 4 or 128 for each layer")
    return ratios


# ----------------------------------------------------------------------------------------------------------------------- states


def element_of(config: Config, *names: str, default: int = 2) -> int:
    """Return the bytes of a number in a state, which some configurations give a type of its own."""
    word = next((config.get(name) for name in names if config.get(name) is not None), None)
    return {None: default, "float32": 4, "float16": 2, "bfloat16": 2}.get(word if isinstance(word, str) else None, default)


def groups_on(groups: int, gpus: int) -> int:
    """Return the groups that `gpus` GPUs keep between them; what does not divide is repeated (MambaStateShapeCalculator)."""
    return groups if groups % gpus == 0 else groups + gpus - groups


def mamba2_state(inner: int, groups: int, heads: int, head: int, state: int, kernel: int, cache: Cache, element: int = 2) -> int:
    """Return the bytes of one request's Mamba 2 state in one layer on one GPU: the last inputs of the convolution, and the state itself."""
    gpus = cache.tensor_parallel
    convolution = math.ceil((inner + 2 * groups_on(groups, gpus) * state) / gpus) * (kernel - 1)
    return convolution * 2 + math.ceil(heads / gpus) * head * state * (cache.state_element or element)


def mamba1_state(inner: int, state: int, kernel: int, cache: Cache) -> int:
    width = math.ceil(inner / cache.tensor_parallel)
    return width * (kernel - 1) * 2 + width * state * (cache.state_element or 2)


def delta_state(config: Config, cache: Cache, element: int) -> int:
    """Return the bytes of one request's state of a gated delta network in one layer on one GPU."""
    keys, values = config.number("linear_num_key_heads", least=1), config.number("linear_num_value_heads", least=1)
    key, value = config.number("linear_key_head_dim", least=1), config.number("linear_value_head_dim", least=1)
    gpus = cache.tensor_parallel
    convolution = math.ceil((2 * key * keys + value * values) / gpus) * (config.number("linear_conv_kernel_dim", default=4, least=1) - 1)
    return convolution * 2 + math.ceil(values / gpus) * value * key * (cache.state_element or element)


def with_state(config: Config, cache: Cache, state: int, role: str = "", kinds: list[str] | None = None) -> list[Layer]:
    """Some layers attend to all tokens, the others keep a state."""
    words = kinds_of(config, layer_count(config)) if kinds is None else kinds
    token = 0
    if FULL in words:
        size = head_size(config)
        token = kept(kv_head_count(config), size, size, cache)
    return counted([Layer(STATE, 1, state, role=role) if kind == STATE else Layer(FULL, 1, token) for kind in words if kind in (STATE, FULL)])


def qwen_next(config: Config, cache: Cache) -> list[Layer]:
    """Qwen3-Next and Qwen3.5: every fourth layer attends, the others are gated delta networks."""
    if config.get("layer_types") is None and config.get("full_attention_interval") is None:
        kinds: list[str] | None = [FULL if (index + 1) % 4 == 0 else STATE for index in range(layer_count(config))]
    else:
        kinds = None
    return with_state(config, cache, delta_state(config, cache, element_of(config, "mamba_ssm_dtype")), GATED_DELTA, kinds)


def olmo_hybrid(config: Config, cache: Cache) -> list[Layer]:
    return with_state(config, cache, delta_state(config, cache, 2), "")


def kimi_linear(config: Config, cache: Cache) -> list[Layer]:
    """Kimi Linear: most layers are Kimi's delta attention, the others keep a latent."""
    layers = layer_count(config)
    part = config.part("linear_attn_config")
    if part:
        attending = config.some("linear_attn_config.full_attn_layers", part.get("full_attn_layers"))
        kinds = [FULL if index + 1 in set(attending) else STATE for index in range(layers)]
        heads, size = part.get("num_heads"), part.get("head_dim")
        kernel = config.checked("linear_attn_config.short_conv_kernel_size", part.get("short_conv_kernel_size", 4), 1, 1000)
    else:
        kinds = kinds_of(config, layers)
        heads, size = config.get("linear_num_heads"), config.get("linear_head_dim")
        kernel = config.number("linear_conv_kernel_dim", default=4, least=1, most=1000)
    heads, size = config.checked("linear_attn_config.num_heads", heads, 1, 100_000), config.checked("linear_attn_config.head_dim", size, 1, 100_000)
    gpus = cache.tensor_parallel
    state = math.ceil(3 * heads * size / gpus) * (kernel - 1) * 2 + math.ceil(heads / gpus) * size * size * FLOAT
    token = latent_size(config) * cache.element
    return counted([Layer(STATE, 1, state) if kind == STATE else Layer(LATENT, 1, token) for kind in kinds])


def nemotron_h(config: Config, cache: Cache) -> list[Layer]:
    """Nemotron-H: a letter for each layer, M for Mamba 2, * for attention, - and E for layers that only compute."""
    pattern = config.get("hybrid_override_pattern")
    if pattern is None:
        words = config.list_of("layers_block_type", str)
        if words is None:
            raise config.wrong("hybrid_override_pattern", None, "a word of the letters M, *, - and E")
        unknown = next((word for word in words if word not in WORDS), None)
        if unknown is not None:
            raise config.wrong("layers_block_type", unknown, ", ".join(sorted(WORDS)))
        kinds = [WORDS[word] for word in words]
    else:
        letters = {"M": STATE, "*": FULL, "-": "", "E": ""}
        if not isinstance(pattern, str) or len(pattern) > MOST_LAYERS or set(pattern) - set(letters):
            raise config.wrong("hybrid_override_pattern", pattern, "a word of the letters M, *, - and E")
        kinds = [letters[letter] for letter in pattern]
    heads, head = config.number("mamba_num_heads", least=1), config.number("mamba_head_dim", least=1)
    state = mamba2_state(
        heads * head,
        config.number("n_groups", default=8, least=1),
        heads,
        head,
        config.number("ssm_state_size", least=1),
        config.number("conv_kernel", default=4, least=1, most=1000),
        cache,
        element_of(config, "mamba_ssm_cache_dtype", default=FLOAT),
    )
    return with_state(config, cache, state, kinds=kinds)


def granite_hybrid(config: Config, cache: Cache) -> list[Layer]:
    if all(kind == FULL for kind in kinds_of(config, layer_count(config))):
        return every_layer(config, cache)
    state = mamba2_state(
        config.number("mamba_expand", default=2, least=1) * config.number("hidden_size", least=1),
        config.number("mamba_n_groups", default=1, least=1),
        config.number("mamba_n_heads", least=1),
        config.number("mamba_d_head", least=1),
        config.number("mamba_d_state", least=1),
        config.number("mamba_d_conv", default=4, least=1, most=1000),
        cache,
    )
    return with_state(config, cache, state)


def falcon_h1(config: Config, cache: Cache) -> list[Layer]:
    """Falcon-H1: every layer attends and keeps a Mamba 2 state."""
    hidden = config.number("hidden_size", least=1)
    inner = config.number("mamba_d_ssm", default=config.number("mamba_expand", default=2) * hidden, least=1)
    heads = config.number("mamba_n_heads", least=1)
    head = config.number("mamba_d_head", default=max(1, inner // heads), least=1) if isinstance(config.get("mamba_d_head"), int) else max(1, inner // heads)
    state = mamba2_state(
        inner,
        config.number("mamba_n_groups", default=1, least=1),
        heads,
        head,
        config.number("mamba_d_state", least=1),
        config.number("mamba_d_conv", default=4, least=1, most=1000),
        cache,
    )
    layers, size = layer_count(config), head_size(config)
    return [Layer(STATE, layers, state), Layer(FULL, layers, kept(kv_head_count(config), size, size, cache))]


def jamba(config: Config, cache: Cache) -> list[Layer]:
    layers = layer_count(config)
    period, offset = config.number("attn_layer_period", default=8, least=1), config.number("attn_layer_offset", default=4)
    kinds = [FULL if index % period == offset else STATE for index in range(layers)]
    inner = config.number("mamba_expand", default=2, least=1) * config.number("hidden_size", least=1)
    state = mamba1_state(inner, config.number("mamba_d_state", default=16), config.number("mamba_d_conv", default=4, least=1, most=1000), cache)
    return with_state(config, cache, state, kinds=kinds)


def zamba2(config: Config, cache: Cache) -> list[Layer]:
    """Zamba 2: every layer is Mamba 2, and some have an attention block before it, whose weights they share and whose caches they do not."""
    layers = layer_count(config)
    attending = config.get("hybrid_layer_ids")
    words = config.list_of("layers_block_type", str) or config.list_of("layer_types", str)
    count = len(set(config.some("hybrid_layer_ids", attending))) if attending is not None else sum(word in ("hybrid", "attention") for word in words or [])
    state = mamba2_state(
        config.number("mamba_expand", default=2, least=1) * config.number("hidden_size", least=1),
        config.number("mamba_ngroups", default=1, least=1),
        config.number("n_mamba_heads", default=8, least=1),
        config.number("mamba_headdim", default=64, least=1),
        config.number("mamba_d_state", default=64, least=1),
        config.number("mamba_d_conv", default=4, least=1, most=1000),
        cache,
    )
    size = config.number("attention_head_dim", default=2 * config.number("hidden_size", least=1) // head_count(config), least=1)
    return counted([Layer(STATE, layers, state), Layer(FULL, min(count, layers), kept(kv_head_count(config), size, size, cache))])


def lfm2(config: Config, cache: Cache) -> list[Layer]:
    """LFM2: some layers attend, the others keep the last inputs of a short convolution."""
    layers = layer_count(config)
    attending = config.get("full_attn_idxs")
    kinds = None
    if config.get("layer_types") is None and attending is not None:
        chosen = set(config.some("full_attn_idxs", attending))
        kinds = [FULL if index in chosen else STATE for index in range(layers)]
    width = math.ceil(config.number("conv_dim", "hidden_size", least=1) / cache.tensor_parallel)
    return with_state(config, cache, width * (config.number("conv_L_cache", default=3, least=1, most=1000) - 1) * 2, kinds=kinds)


def mamba2(config: Config, cache: Cache) -> list[Layer]:
    hidden = config.number("hidden_size", least=1)
    state = mamba2_state(
        config.number("expand", default=2, least=1) * hidden,
        config.number("n_groups", default=8, least=1),
        config.number("num_heads", default=128, least=1),
        config.number("head_dim", default=64, least=1),
        config.number("state_size", default=128, least=1),
        config.number("conv_kernel", default=4, least=1, most=1000),
        cache,
    )
    return [Layer(STATE, layer_count(config), state)]


def mamba(config: Config, cache: Cache) -> list[Layer]:
    inner = config.number("intermediate_size", default=config.number("expand", default=2) * config.number("hidden_size", least=1), least=1)
    state = mamba1_state(inner, config.number("state_size", default=16), config.number("conv_kernel", default=4, least=1, most=1000), cache)
    return [Layer(STATE, layer_count(config), state)]


# -------------------------------------------------------------------------------------------------------------- who has which rule

RULES: dict[Rule, str] = {
    attention: """
        AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM BloomForCausalLM ChatGLMModel
        ChatGLMForConditionalGeneration CohereForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CwmForCausalLM DbrxForCausalLM DeepseekForCausalLM
        Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM ExaoneForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM ExaoneMoEForCausalLM FalconForCausalLM
        FlexOlmoForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM GlmForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM GptOssForCausalLM
        GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM
        GraniteSWAForCausalLM GraniteMoeSWAForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HYV3ForCausalLM HyperCLOVAXForCausalLM
        InternLM2ForCausalLM InternLM3ForCausalLM IQuestCoderForCausalLM Jais2ForCausalLM LagunaForCausalLM LlamaForCausalLM LLaMAForCausalLM
        Llama4ForCausalLM MellumForCausalLM MiMoForCausalLM MiniCPMForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM MistralForCausalLM
        MixtralForCausalLM MuseGlimmerForCausalLM NanbeigeForCausalLM NemotronForCausalLM OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM
        OlmoeForCausalLM OPTForCausalLM OrionForCausalLM PhiForCausalLM Phi3ForCausalLM PhiMoEForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM
        Qwen3ForCausalLM Qwen3MoeForCausalLM Rnj1ForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM SolarForCausalLM StableLmForCausalLM
        Starcoder2ForCausalLM TeleChat2ForCausalLM TeleChat3ForCausalLM VaultGemmaForCausalLM
        """,
    shared: "Gemma3nForCausalLM",
    two_geometries: "Gemma4ForCausalLM",
    mimo_v2: "MiMoV2FlashForCausalLM MiMoV2ForCausalLM",
    expanded: "MiniCPM3ForCausalLM",
    latent: """
        AXK1ForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM MistralLarge3ForCausalLM PanguUltraMoEForCausalLM
        SarvamMLAForCausalLM
        """,
    double_latent: "LongcatFlashForCausalLM",
    sparse: "DeepseekV32ForCausalLM GlmMoeDsaForCausalLM HYV4ForCausalLM",
    deepseek_v4: "DeepseekV4ForCausalLM DeepseekV4ForConditionalGeneration",
    qwen_next: "Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM",
    olmo_hybrid: "OlmoHybridForCausalLM",
    kimi_linear: "KimiLinearForCausalLM",
    nemotron_h: "NemotronHForCausalLM",
    granite_hybrid: "GraniteMoeHybridForCausalLM",
    falcon_h1: "FalconH1ForCausalLM",
    jamba: "JambaForCausalLM",
    zamba2: "Zamba2ForCausalLM",
    lfm2: "Lfm2ForCausalLM Lfm2MoeForCausalLM",
    mamba2: "Mamba2ForCausalLM",
    mamba: "MambaForCausalLM FalconMambaForCausalLM",
}
BY_ARCHITECTURE: dict[str, Rule] = {name: rule for rule, names in RULES.items() for name in names.split()}
# Models that also take images or sound: the type of their text part says which rule is theirs.
MULTIMODAL_NAMES = """
    AriaForConditionalGeneration Cohere2VisionForConditionalGeneration DeepseekVLV2ForCausalLM Ernie4_5_VLMoeForConditionalGeneration
    Exaone4_5_ForConditionalGeneration Gemma3ForConditionalGeneration Gemma3nForConditionalGeneration Gemma4ForConditionalGeneration
    Gemma4UnifiedForConditionalGeneration Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration Granite4VisionForConditionalGeneration
    GraniteSpeechForConditionalGeneration Idefics3ForConditionalGeneration InternS1ForConditionalGeneration InternVLChatModel
    InternVLForConditionalGeneration KimiK25ForConditionalGeneration KimiVLForConditionalGeneration Lfm2VlForConditionalGeneration
    Llama4ForConditionalGeneration LlavaForConditionalGeneration LlavaNextForConditionalGeneration LlavaOnevisionForConditionalGeneration
    Mistral3ForConditionalGeneration MuseGlimmerForConditionalGeneration NemotronH_Nano_VL_V2 PaliGemmaForConditionalGeneration Phi3VForCausalLM
    PixtralForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration SmolVLMForConditionalGeneration
    UltravoxModel VoxtralForConditionalGeneration
"""
MULTIMODAL = frozenset(MULTIMODAL_NAMES.split())
TYPES: dict[Rule, str] = {
    attention: """
        aria_text cohere2 ernie4_5_vl_moe ernie4_5_moe exaone4 gemma gemma2 gemma3_text gemma3 glm4v glm4v_text glm4v_moe glm4v_moe_text granite
        internlm2 internlm3 llama llama4 llama4_text mistral ministral3 muse_glimmer_text phi3 phi3_v pixtral qwen2 qwen2_moe qwen2_audio qwen2_vl
        qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen2_5_omni_text qwen3 qwen3_moe qwen3_vl_text qwen3_vl_moe_text qwen3_omni_moe_text smollm3
        """,
    shared: "gemma3n_text",
    two_geometries: "gemma4_text gemma4_unified_text",
    latent: "deepseek_v2 deepseek_v3 kimi_k2 mistral4",
    qwen_next: "qwen3_5_text qwen3_5_moe_text qwen3_next",
    nemotron_h: "nemotron_h",
    lfm2: "lfm2 lfm2_moe",
}
BY_TYPE: dict[str, Rule] = {name: rule for rule, names in TYPES.items() for name in names.split()}
# No record confirms these: vLLM's build for CPUs cannot construct them, or is older than they are. Their rules follow the source of 0.33.
BY_SOURCE = frozenset(
    """
    KimiLinearForCausalLM LongcatFlashForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM OlmoHybridForCausalLM
    """.split()  # noqa: SIM905 (a list of names, one a word)
)


def rule_of(config: Config) -> Rule:
    """Return the rule by which an architecture's caches are counted. Raises UnknownArchitecture."""
    rule = BY_ARCHITECTURE.get(config.architecture)
    if rule is None and config.architecture in MULTIMODAL:
        rule = BY_TYPE.get(config.model_type)
    if rule is None:
        inside = f" with a text part of the type {plain(config.model_type)}" if config.architecture in MULTIMODAL else ""
        raise UnknownArchitecture(f"no formula is known for the caches of {config.architecture}{inside}, so what it needs cannot be told.")
    return rule


def cache_layers(config: Config, cache: Cache) -> tuple[Layer, ...]:
    """Return what the layers of a model keep, as vLLM's own cache specifications say it. Raises PlanError."""
    return tuple(rule_of(config)(config, cache))


def as_if_plain(config: Config, cache: Cache) -> tuple[Layer, ...]:
    """Return the layers of an unknown architecture as if each attended to all tokens: more than most keep, and the best guess there is. Raises PlanError."""
    return tuple(every_layer(config, cache) if config.get("kv_lora_rank") is None else latent(config, cache))


def stateful(layers: Sequence[Layer]) -> int:
    return sum(layer.count for layer in layers if layer.kind == STATE)


def describe(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return the layers as the module's result shows them."""
    shown = []
    for layer in layers:
        entry: dict[str, Any] = {"kind": layer.kind, "layers": layer.count, "bytes": layer.bytes}
        shown.append(entry | ({"window": layer.window} if layer.window else {}))
    return shown
