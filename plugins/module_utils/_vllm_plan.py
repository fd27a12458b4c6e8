# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Whether a model fits, and how much it carries. Pure arithmetic. PRIVATE to the collection: it may change at any time.

The pool of cache blocks is what is left of `utilisation x memory` after the weights and one trial step (_vllm_cache.py shares it out).
What the trial step takes is fitted to vLLM's own log lines on an H100; bench/gpu_plan.sh measures it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_specs, _vllm_weights
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_ask import Answer, Unshared
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_cache import (
    BLOCK,
    Engine,
    NoPool,
    Pool,
    bytes_per_token,
    kv_capacity,
    kv_pool,
    longest_context,
)
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import (
    GIB,
    MIB,
    Config,
    PlanError,
    UnknownArchitecture,
    max_context,
    read_config,
)
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_specs import FULL, LATENT, Cache, Layer
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_weights import Parameters, Quantization

__all__ = ["BLOCK", "GIB", "MIB", "PlanError", "UnknownArchitecture"]

OLDEST_CAPABILITY = 7.5
BF16_CAPABILITY = 8.0
FP8_CAPABILITY = 8.9
MXFP4_CAPABILITY = 8.0
# Types of models that vLLM refuses to compute in float16 (vllm/config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS).
NOT_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
# Beside the weights and the trial step, on one GPU: allocations outside PyTorch (0.22 GiB seen), rounding of its allocator (0.1 seen).
FIXED_BYTES = int(0.35 * GIB)
# CUDA graphs, which vLLM 0.33 subtracts before it sizes the KV cache: 0.98 GiB seen for 32 layers. How it grows with the layers is an assumption.
GRAPH_BYTES = int(0.4 * GIB)
GRAPH_BYTES_PER_LAYER = 18 * MIB
# Graphs are captured for batches of up to this many requests, twice `--max-num-seqs` at most (vllm/config/vllm.py, _set_cudagraph_sizes).
MOST_CAPTURED = 512
# Without graphs and compilation, the trial step's sampler is what is left. From one public log: Llama 3.1 8B on an A5000 with --enforce-eager.
EAGER_BYTES = int(0.45 * GIB)
# NCCL and the buffers of the custom all-reduce, for each of several GPUs. An assumption: not measured.
PARALLEL_BYTES = 1 * GIB
# What some models' own kernels take beside that, from public logs: of DeepSeek V4 on two GH200 5.44 GiB were left for the cache, and 12.5 without
# (vllm-project/vllm#44376); of GLM-5 on eight H200 32.1, and 34.7 without.
OWN_BYTES = {"deepseek_v4": 7 * GIB, "glm_moe_dsa": int(2.6 * GIB), "deepseek_v32": int(2.6 * GIB)}


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
class Shape:
    """What config.json says about a model, as far as memory depends on it.

    `part` is the share of the layers that one host has, `asked` what vLLM itself said of a model that no formula knows.
    """

    config: Config
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    experts: int
    active_experts: int
    expert_intermediate: int
    vocabulary: int
    max_context: int
    quantization: Quantization
    counted: Parameters
    kv_element: int = 0
    known: bool = True
    part: float = 1.0
    asked: Answer | None = None

    @property
    def architecture(self) -> str:
        return self.config.architecture

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def multimodal(self) -> bool:
        return self.config.multimodal

    @property
    def parameters(self) -> int:
        return self.counted.total

    @property
    def stateful_layers(self) -> int:
        return _vllm_specs.stateful(self.caches(Cache()))

    def weight_bytes(self) -> int:
        """Return what the weights take in memory if nothing but the config is known. Raises PlanError."""
        return _vllm_weights.weight_bytes(self.counted, self.quantization, experts_only=self.quantization.name == "mxfp4" and self.counted.experts > 0)

    def caches(self, cache: Cache) -> tuple[Layer, ...]:
        """Return what the layers keep on one GPU. Raises PlanError."""
        if self.asked:
            layers = self.asked.caches(cache.tensor_parallel, cache.element)
        else:
            layers = _vllm_specs.cache_layers(self.config, cache) if self.known else _vllm_specs.as_if_plain(self.config, cache)
        return layers if self.part == 1 else tuple(replace(layer, count=math.ceil(layer.count * self.part)) for layer in layers)

    def kv_bytes_per_token(self, tensor_parallel: int, element_bytes: int) -> int:
        """Return the bytes of one token in all layers on one GPU, as long as no window has been left."""
        return bytes_per_token(self.caches(Cache(tensor_parallel, element_bytes)))


@dataclass(frozen=True)
class Batch:
    """How many tokens one step of the engine takes, and how many requests."""

    tokens: int
    requests: int


@dataclass(frozen=True)
class Drafter:
    """What guesses tokens ahead: the bytes of its weights, and its layers, which are a model's of its own or so many `heads` like the model's last."""

    weights: int
    shape: Shape | None = None
    heads: int = 0

    def caches(self, own: Sequence[Layer], cache: Cache) -> tuple[Layer, ...]:
        """Return what its layers keep on one GPU, beside the model's `own`. Raises PlanError."""
        if self.shape:
            return self.shape.caches(cache)
        return tuple(replace(layer, count=self.heads) for layer in own if self.heads and layer.kind in (FULL, LATENT))


@dataclass(frozen=True)
class Wish:
    """What the user asks for. 0 means that the plan chooses.

    pipeline: how many hosts share the layers
    drafts: how many tokens are guessed ahead, and `drafter` what guesses them
    one_step: whether the next step is scheduled only when one is over
    captured: the most requests of a CUDA graph
    cache_bytes: the cache of one GPU, whatever is left
    offloaded_bytes: weights of each GPU that the host's memory holds
    """

    utilization: float = 0.9
    context: int = 0
    tensor_parallel: int = 0
    kv_element_bytes: int = 0
    batch_tokens: int = 0
    batch_requests: int = 0
    pipeline: int = 1
    eager: bool = False
    prefix_caching: bool = True
    drafts: int = 0
    block: int = 0
    state_element: int = 0
    one_step: bool = False
    captured: int = 0
    cache_bytes: int = 0
    offloaded_bytes: int = 0
    drafter: Drafter | None = None
    loras: int = 0
    lora_rank: int = 16


@dataclass(frozen=True)
class Memory:
    """What one GPU holds under a plan, in bytes, and what the KV cache then carries. `request` are the bytes of one request of the plan's context."""

    weights: int
    overhead: int
    kv_cache: int
    kv_bytes_per_token: int
    kv_tokens: int
    contexts: float
    longest_context: int
    request: int = 0


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


def read_shape(
    config: Any,
    known_architectures: set[str] | None = None,
    methods: frozenset[str] = frozenset(),
    *,
    serve_unknown: bool = False,
    asked: Answer | None = None,
) -> Shape:
    """Return the shape that a config.json describes, or that vLLM itself `asked` what it is said.

    Raises PlanError, and UnknownArchitecture for one without a formula, unless those are to be served all the same.
    """
    read = read_config(config)
    if known_architectures and read.architecture not in known_architectures and not serve_unknown:
        raise PlanError(f"the architecture {read.architecture} is none that the pinned vLLM serves.")
    if asked:
        return asked_shape(read, asked, methods)
    known = True
    try:
        _vllm_specs.rule_of(read)
    except UnknownArchitecture:
        if not serve_unknown:
            raise
        known = False
    layers = _vllm_specs.layer_count(read)
    hidden = read.number("hidden_size", "n_embd", "d_model", least=1)
    # Mamba has no heads.
    heads = kv_heads = 0
    if read.model_type not in ("mamba", "mamba2", "falcon_mamba"):
        heads, kv_heads = _vllm_specs.head_count(read), _vllm_specs.kv_head_count(read)
    intermediate = _vllm_weights.feed_forward_width(read, hidden)
    experts = _vllm_weights.expert_count(read)
    described = read.get("quantization_config")
    shape = Shape(
        config=read,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        experts=experts,
        active_experts=_active_experts(read) if experts else 0,
        expert_intermediate=_vllm_weights.expert_width(read, intermediate) if experts else 0,
        vocabulary=read.number("vocab_size", "padded_vocab_size", least=1),
        max_context=max_context(read),
        quantization=_vllm_weights.read_quantization(described, methods),
        counted=_vllm_weights.read_parameters(read),
        kv_element=_vllm_weights.kv_element(described),
        known=known,
    )
    # Read once here, so that what is wrong with it is said before anything is planned.
    shape.caches(Cache())
    return shape


def loaded_as(shape: Shape, disk_bytes: int | None, asked: str, element: int) -> tuple[Shape, int | None]:
    """Return a model and the bytes of its weights as vLLM loads them: quantised while they are loaded, or in `element` bytes. Raises PlanError."""
    if shape.quantization.name != "bf16":
        return shape, disk_bytes
    name, experts = _vllm_weights.ONLINE.get(asked, ""), _vllm_weights.ONLINE_EXPERTS.get(asked, "")
    before = shape.weight_bytes()
    if name:
        changed = replace(shape, quantization=Quantization(name, 32 if name.startswith("mx") else 0, asked))
        after = _vllm_weights.weight_bytes(shape.counted, changed.quantization)
    elif experts:
        # Its other layers stay as they are, so that it is not told apart from a model that is not quantised.
        changed, quantization = shape, Quantization(experts, 16 if experts == "nvfp4" else 0, asked)
        after = _vllm_weights.weight_bytes(shape.counted, quantization, experts_only=True)
    else:
        changed, after = shape, before * element // 2
    return changed, math.ceil((before if disk_bytes is None else disk_bytes) * after / before)


def asked_shape(read: Config, asked: Answer, methods: frozenset[str]) -> Shape:
    """Return the shape that vLLM itself said; what its files say of quantisation is read from them. Raises PlanError."""
    described = read.get("quantization_config")
    sizes = {"layers": 1, "hidden": 1, "vocabulary": 1} | {name: value for name, value in asked.sizes.items() if value}
    return Shape(
        config=read,
        layers=sizes["layers"],
        hidden=sizes["hidden"],
        heads=sizes.get("heads", 0),
        kv_heads=sizes.get("kv_heads", 0),
        intermediate=sizes.get("intermediate", 0),
        experts=sizes.get("experts", 0),
        active_experts=sizes.get("active_experts", 0),
        expert_intermediate=sizes.get("expert_intermediate", 0),
        vocabulary=sizes["vocabulary"],
        max_context=asked.max_context or max_context(read),
        quantization=_vllm_weights.read_quantization(described, methods),
        counted=asked.parameters,
        kv_element=_vllm_weights.kv_element(described),
        asked=asked,
    )


def _active_experts(config: Config) -> int:
    value = next((config.get(name) for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k") if config.get(name) is not None), 1)
    if isinstance(value, list):
        value = max((entry for entry in value if isinstance(entry, int)), default=1)
    return config.checked("num_experts_per_tok", value, 0, 1_000_000)


# ----------------------------------------------------------------------------------------------------------------- one step


def default_batch(gpu: Gpu) -> Batch:
    """Return what `vllm serve` chooses by the GPU (vllm/engine/arg_utils.py, get_batch_defaults)."""
    if gpu.total >= 160 * GIB:
        return Batch(16384, 1024)
    # GB10 has the memory of a large GPU and not its speed.
    if gpu.total >= 70 * GIB and "a100" not in gpu.name.lower() and gpu.capability != 12.1:
        return Batch(8192, 1024)
    return Batch(2048, 256)


def step_bytes(shape: Shape, tensor_parallel: int, batch: Batch, *, eager: bool = False) -> int:
    """Return what one step takes at its peak beyond weights and cache.

    Three things compete. The first step copies the embedding once while it is compiled; that one decides for small and middling models.
    Activations: the two halves of the MLP and their product, and about four copies of the hidden state. Logits: one row for each request.
    """
    hidden = batch.tokens * shape.hidden * 2
    compile_peak = 0 if eager else math.ceil(shape.vocabulary / tensor_parallel) * shape.hidden * 2 + 2 * hidden
    width = math.ceil(shape.intermediate / tensor_parallel)
    activations = batch.tokens * 3 * width * 2 + 4 * hidden
    if shape.experts:
        expert = math.ceil(shape.expert_intermediate / tensor_parallel)
        activations = max(activations, batch.tokens * shape.active_experts * (max(2 * expert, shape.hidden) + expert) * 2 + 4 * hidden)
    logits = batch.requests * shape.vocabulary * 2 + hidden
    return max(compile_peak, activations, logits)


def captured(requests: int, limit: int = 0) -> int:
    """Return for how many sizes of a batch CUDA graphs are captured: 1, 2, 4, then every 8 and from 256 on every 16."""
    most = limit or min(MOST_CAPTURED, 2 * requests)
    return sum(size <= most for size in (1, 2, 4, *range(8, 256, 8), *range(256, MOST_CAPTURED + 1, 16)))


def overhead_bytes(shape: Shape, tensor_parallel: int, batch: Batch, *, several: bool, eager: bool = False, limit: int = 0) -> int:
    """Return what the engine takes on one GPU beside weights and cache. `limit` are the most requests of a CUDA graph."""
    layers = int(GRAPH_BYTES_PER_LAYER * shape.layers * captured(batch.requests, limit) / captured(MOST_CAPTURED))
    graphs = EAGER_BYTES if eager else GRAPH_BYTES + layers
    own = OWN_BYTES.get(shape.model_type, 0)
    return FIXED_BYTES + graphs + own + step_bytes(shape, tensor_parallel, batch, eager=eager) + (PARALLEL_BYTES if several else 0)


def layer_bytes(shape: Shape) -> int:
    """Return what the weights of one layer take, the mean. Raises PlanError."""
    return (shape.weight_bytes() - 2 * shape.counted.embedding) // shape.layers if shape.quantization.sizable else 0


def lora_bytes(shape: Shape, tensor_parallel: int, loras: int, rank: int) -> int:
    """Return what vLLM sets aside on one GPU for adapters that are used at once, each of the largest rank.

    Each linear layer has two matrices for each adapter: what comes in by the rank, and the rank by what goes out, of which one is shared out
    (vllm/lora/layers). Adapters of experts are as many as those.
    """
    if not loras:
        return 0
    hidden, queries = shape.hidden, shape.hidden
    keys = math.ceil(queries * shape.kv_heads / max(1, shape.heads))

    def pair(whole: int, shared: int) -> int:
        return whole + math.ceil(shared / tensor_parallel)

    attention = 2 * pair(hidden, queries) + 2 * pair(hidden, keys)
    width = shape.expert_intermediate if shape.experts else shape.intermediate
    feed = 3 * pair(hidden, width) * max(1, shape.experts)
    return loras * rank * 2 * (shape.layers * (attention + feed) + shape.vocabulary + hidden)


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
    whole = shape.counted
    counted = Parameters(
        min(whole.embedding, shape.vocabulary * shape.hidden),
        math.ceil(whole.linear * share),
        math.ceil(whole.other * share),
        math.ceil(whole.experts * share),
    )
    stage = replace(shape, layers=layers, part=share, counted=counted)
    if disk_bytes is None:
        return stage, None
    if not shape.quantization.sizable:
        return stage, math.ceil(disk_bytes * stage.parameters / shape.parameters)
    return stage, math.ceil(disk_bytes * stage.weight_bytes() / shape.weight_bytes())


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
    try:
        memory, batch = memory_on(shape, disk_bytes, gpu, tensor_parallel, wish)
    except (NoPool, Unshared) as error:
        nothing = Memory(loaded_bytes(shape, disk_bytes, gpu) // tensor_parallel, 0, 0, 0, 0, 0.0, 0)
        reason = str(error) if isinstance(error, Unshared) else f"vLLM cannot put the model's layers into one pool on such GPUs: {error}."
        return Plan(False, reason, "", gpu, tensor_parallel, 1, nothing, default_batch(gpu))
    context = wish.context or max(1, min(shape.max_context, memory.longest_context))
    reason = _obstacle(shape, gpu, tensor_parallel) or _shortage(memory, gpu, tensor_parallel, wish, context)
    return Plan(not reason, reason, "", gpu, tensor_parallel, context, memory, batch)


def element_bytes(shape: Shape, wish: Wish, gpu: Gpu) -> int:
    """Return the bytes of an element of keys and values: as asked for, as the checkpoint says, or 16 bits."""
    if wish.kv_element_bytes or shape.kv_element:
        return wish.kv_element_bytes or shape.kv_element
    # vllm/model_executor/models/config.py, GlmMoeDsaForCausalLM
    return 1 if shape.architecture == "GlmMoeDsaForCausalLM" and int(gpu.capability) == 10 else 2


def memory_on(shape: Shape, disk_bytes: int | None, gpu: Gpu, tensor_parallel: int, wish: Wish) -> tuple[Memory, Batch]:
    """Return what a GPU holds, and the size of a step. Raises PlanError, and NoPool for layers that cannot share one."""
    default = default_batch(gpu)
    batch = Batch(wish.batch_tokens or default.tokens, wish.batch_requests or default.requests)
    weights = loaded_bytes(shape, disk_bytes, gpu) // tensor_parallel
    weights = max(0, weights + (wish.drafter.weights // tensor_parallel if wish.drafter else 0) - wish.offloaded_bytes)
    overhead = overhead_bytes(shape, tensor_parallel, batch, several=tensor_parallel * wish.pipeline > 1, eager=wish.eager, limit=wish.captured)
    overhead += lora_bytes(shape, tensor_parallel, wish.loras, wish.lora_rank)
    memory = int(wish.utilization * gpu.total) - weights - overhead
    if wish.cache_bytes:
        # vLLM then asks for no share of the memory, only whether it is there.
        memory = min(wish.cache_bytes, gpu.total - weights - overhead)
    element = element_bytes(shape, wish, gpu)
    cache = Cache(tensor_parallel, element, wish.state_element)
    layers = shape.caches(cache)
    if wish.drafter:
        layers += wish.drafter.caches(layers, cache)
    pool = pool_of(layers, gpu, batch, wish, element)
    longest = longest_context(pool, memory, shape.max_context)
    context = wish.context or max(1, longest)
    tokens, contexts = kv_capacity(pool, memory, context)
    request = pool.blocks(context) * pool.bytes_per_block
    return Memory(weights, overhead, max(0, memory), bytes_per_token(layers), tokens, contexts, longest, request), batch


def pool_of(layers: Sequence[Layer], gpu: Gpu, batch: Batch, wish: Wish, element: int) -> Pool:
    # Two steps are in flight: vLLM schedules the next while one runs.
    steps = 1 if wish.one_step else 2
    return kv_pool(layers, Engine(gpu.capability, wish.prefix_caching, steps * batch.tokens, element == 1, wish.drafts, wish.block))


def loaded_bytes(shape: Shape, disk_bytes: int | None, gpu: Gpu) -> int:
    """Return what the weights take on all GPUs together. Raises PlanError.

    The kernel that vLLM takes for AWQ on Hopper wants 16 bit zero points; those for MXFP4 experts want sizes that gpt-oss does not have.
    """
    loaded = disk_bytes if disk_bytes is not None else shape.weight_bytes()
    if shape.quantization.name == "awq" and gpu.capability == 9.0 and shape.quantization.group:
        loaded += int(shape.counted.linear / shape.quantization.group * 12 / 8)
    if shape.quantization.name == "mxfp4" and shape.counted.experts and shape.expert_intermediate:
        loaded += _vllm_weights.padded_expert_bytes(shape.counted, shape.hidden, shape.expert_intermediate)
    return loaded


def _obstacle(shape: Shape, gpu: Gpu, tensor_parallel: int) -> str:
    """Return why the model cannot run on such GPUs whatever their memory, or nothing."""
    if 0 < gpu.capability < OLDEST_CAPABILITY:
        return f"the {gpu.name} has compute capability {gpu.capability:g}, and vLLM needs {OLDEST_CAPABILITY:g}."
    if shape.quantization.name == "mxfp4" and 0 < gpu.capability < MXFP4_CAPABILITY:
        return f"the {gpu.name} has compute capability {gpu.capability:g}, and MXFP4 needs {MXFP4_CAPABILITY:g}."
    if 0 < gpu.capability < BF16_CAPABILITY and shape.model_type in NOT_IN_FLOAT16:
        return f"the {gpu.name} has compute capability {gpu.capability:g}, which has no bfloat16, and vLLM does not compute {shape.model_type} in float16."
    if shape.heads and (shape.heads % tensor_parallel or (tensor_parallel % shape.kv_heads and shape.kv_heads % tensor_parallel)):
        return f"the model's {shape.heads} heads and {shape.kv_heads} KV heads cannot be shared evenly by {tensor_parallel} GPUs."
    # The group runs along the input of a layer, which is what the down projection is split by.
    width, group = shape.expert_intermediate if shape.experts else shape.intermediate, shape.quantization.group
    if tensor_parallel > 1 and shape.quantization.name in ("awq", "gptq", "int4", "fp8") and 1 < group <= width and width // tensor_parallel % group:
        return f"the groups of {group} in which the weights are quantised cannot be shared evenly by {tensor_parallel} GPUs."
    return ""


def _shortage(memory: Memory, gpu: Gpu, tensor_parallel: int, wish: Wish, context: int) -> str:
    # With bytes for its cache, vLLM asks for no share of the memory.
    share = 1.0 if wish.cache_bytes else wish.utilization
    budget = share * gpu.total
    where = f"{share:g} of {gpu.total / GIB:.1f} GiB" + (f" on each of {tensor_parallel} GPUs" if tensor_parallel > 1 else "")
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
        if element_bytes(shape, wish, gpu) == 2 and fits(kv_element_bytes=1):
            return replace(plan, advice="A KV cache in fp8 is enough (vllm_kv_cache_dtype: fp8, which is --kv-cache-dtype fp8).")
    offers = []
    four_bit = as_awq(shape)
    if shape.quantization.name in ("bf16", "fp8", "int8") and fits(model=four_bit, bytes_on_disk=None):
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


def as_awq(shape: Shape) -> Shape:
    """Return a model as it would be in 4 bits."""
    return replace(shape, quantization=Quantization("awq", 128, "awq"))
