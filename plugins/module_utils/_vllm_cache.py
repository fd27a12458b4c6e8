# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""vLLM's arithmetic of the pool of cache blocks: how layers share it, and what a request takes. PRIVATE to the collection: it may change at any time.

All layers take blocks from one pool, and a block has one size in bytes for all of them. Layers that are alike form groups of equal size, and each
group has block tables of its own (vllm/v1/core/kv_cache_planning.py and vllm/v1/kv_cache_interface.py of 0.33). Pure numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_specs import (
    CHUNKED,
    FULL,
    GATED_DELTA,
    INDEXER,
    LATENT,
    SLIDING,
    SLIDING_LATENT,
    STATE,
    Layer,
)

# Tokens in a block where nothing asks for another number (vllm/config/cache.py, DEFAULT_BLOCK_SIZE).
BLOCK = 16
# What the kernels for sparse attention, and those for latents in 8 bits on Hopper or for latents on Blackwell, take at least
# (get_supported_kernel_block_sizes in vllm/v1/attention/backends/mla).
SPARSE_BLOCK = 64
LATENT_FP8_BLOCK_HOPPER = 64
LATENT_BLOCK_BLACKWELL = 32
# A latent beside a state: the manager's blocks are multiples of this (vllm/platforms/interface.py, _align_hybrid_block_size).
HYBRID_LATENT_BLOCK = 128
# Blocks of a gated delta network are multiples of this where FlashInfer computes it: from Hopper on.
GATED_DELTA_BLOCK = 64
# Groups are as large as the largest kind of layers where it is not much larger than the smallest.
ALIKE = 1.5


class NoPool(ValueError):
    """Layers that vLLM cannot put into one pool; the message is a part of a sentence."""


@dataclass(frozen=True)
class Engine:
    """What the pool depends on beside the model. `in_flight` are the tokens of the steps that run at once, `drafts` those that are guessed ahead."""

    capability: float = 0.0
    prefix_caching: bool = True
    in_flight: int = 0
    fp8: bool = False
    drafts: int = 0
    block: int = 0


@dataclass(frozen=True)
class Spec:
    """A cache specification as vLLM has it: layers of a kind, tokens in a block, and bytes of a block in one layer."""

    kind: str
    count: int
    block: int
    page: int
    window: int = 0
    role: str = ""


@dataclass(frozen=True)
class Group:
    """Layers with one block table: how many, and what a request of some length takes of it."""

    spec: Spec
    count: int


@dataclass(frozen=True)
class Pool:
    """vLLM's pool of blocks: what one block takes in all layers, and how many blocks a request takes."""

    groups: tuple[Group, ...]
    bytes_per_block: int
    engine: Engine

    def blocks(self, context: int) -> int:
        return sum(group.count * blocks_of(group.spec, context, self.engine) for group in self.groups)

    def count(self, memory: int) -> int:
        """Return how many blocks some bytes hold. A model that keeps nothing has one, which vLLM needs for itself."""
        return max(0, memory) // self.bytes_per_block if self.bytes_per_block else 1


def blocks_of(spec: Spec, context: int, engine: Engine) -> int:
    """Return how many blocks one request takes of one group, at most."""
    if spec.kind == STATE:
        own = (2 if spec.role != GATED_DELTA or not checkpoints(engine) else 3) if engine.prefix_caching else 1
        return own + engine.drafts
    if spec.kind == CHUNKED:
        return math.ceil(min(spec.window + engine.in_flight, context) / spec.block)
    if spec.kind in (SLIDING, SLIDING_LATENT):
        return math.ceil(min(spec.window - 1 + engine.in_flight, context) / spec.block) + 1
    return math.ceil(context / spec.block)


def checkpoints(engine: Engine) -> bool:
    """Whether FlashInfer computes gated delta networks, which then keep a state more (_resolve_gdn_prefill_backend). Unknown GPUs are taken for such."""
    return not 0 < engine.capability < 9.0


def block_size(layers: Sequence[Layer], engine: Engine) -> int:
    """Return the tokens in a block of the layers that attend, as vLLM's CUDA backends choose it, before states are aligned."""
    if engine.block:
        return engine.block
    if any(layer.block for layer in layers):
        return max(layer.block for layer in layers)
    if any(layer.role == INDEXER for layer in layers):
        return SPARSE_BLOCK
    if any(layer.kind == LATENT for layer in layers):
        family = int(engine.capability)
        if family == 10:
            return LATENT_BLOCK_BLACKWELL
        return LATENT_FP8_BLOCK_HOPPER if family == 9 and engine.fp8 else BLOCK
    return BLOCK


def page_of(layer: Layer, block: int) -> int:
    """Return the bytes of a block in one layer."""
    size = layer.block or block
    entries = max(1, size // layer.tokens_per_entry)
    return math.ceil(entries * layer.bytes / layer.alignment) * layer.alignment


def specs_of(layers: Sequence[Layer], engine: Engine) -> list[Spec]:
    """Return the specifications of a model's layers. Blocks of layers that attend grow until a state fits into one, and states are padded to it."""
    block = block_size(layers, engine)
    states = [layer for layer in layers if layer.kind == STATE]
    attending = [layer for layer in layers if layer.kind != STATE]
    state_page = max((layer.bytes for layer in states), default=0)
    if states and attending:
        whole = next((layer for layer in attending if layer.kind in (FULL, LATENT)), attending[0])
        step = max(BLOCK, block)
        if whole.kind == LATENT:
            step = max(step, HYBRID_LATENT_BLOCK)
        if engine.prefix_caching and any(layer.role == GATED_DELTA for layer in states) and checkpoints(engine):
            step = math.lcm(step, GATED_DELTA_BLOCK)
        block = max(block, step * math.ceil(state_page / (step * whole.bytes)))
        state_page = max(state_page, page_of(whole, block))
    specs = [Spec(layer.kind, layer.count, layer.block or block, page_of(layer, block), layer.window, layer.role) for layer in attending]
    return specs + [Spec(STATE, layer.count, block, state_page, role=layer.role) for layer in states]


def uniform(specs: Sequence[Spec]) -> bool:
    """Whether all layers need the same number of tokens' places, whatever their sizes (UniformTypeKVCacheSpecs.is_uniform_type)."""
    first = specs[0]
    if len({spec.block for spec in specs}) > 1:
        return False
    if first.kind in (FULL, LATENT):
        return all(spec.kind in (FULL, LATENT) for spec in specs)
    same = all(spec.kind == first.kind and spec.window == first.window for spec in specs)
    return same and (first.kind != STATE or len({spec.page for spec in specs}) == 1)


def kv_pool(layers: Sequence[Layer], engine: Engine) -> Pool:
    """Return the pool that vLLM makes for a model's layers. Raises NoPool."""
    if all(layer.kind == STATE for layer in layers):
        # Models without attention have no prefix caching (vllm/config/model.py, is_prefix_caching_supported).
        engine = replace(engine, prefix_caching=False)
    specs = specs_of(layers, engine)
    if not specs:
        return Pool((), 0, engine)
    if uniform(specs):
        return Pool((Group(specs[0], 1),), sum(spec.count * spec.page for spec in specs), engine)
    if any(spec.kind == SLIDING_LATENT for spec in specs):
        return packed(specs, engine)
    try:
        specs = one_page(specs)
    except NoPool:
        # What has a window is kept whole beside a latent (_try_get_full_allocation_fallback_groups).
        if not all(spec.kind in (FULL, LATENT, SLIDING) for spec in specs):
            raise
        whole = [replace(spec, kind=FULL if spec.kind == SLIDING else spec.kind, window=0) for spec in specs]
        if not uniform(whole):
            raise
        return Pool((Group(whole[0], 1),), sum(spec.count * spec.page for spec in whole), engine)
    return grouped(specs, engine)


def one_page(specs: Sequence[Spec]) -> list[Spec]:
    """Return the specifications with one size of a block in bytes: more tokens in the smaller ones, or padding (unify_kv_cache_spec_page_size)."""
    largest = max(spec.page for spec in specs)
    found = []
    for spec in specs:
        if spec.page == largest or spec.kind == STATE:
            found.append(replace(spec, page=largest))
        elif largest % spec.page == 0:
            found.append(replace(spec, page=largest, block=spec.block * (largest // spec.page)))
        elif spec.kind == LATENT:
            raise NoPool("blocks of its latents do not divide those of its other layers")
        else:
            found.append(replace(spec, page=largest))
    return found


def grouped(specs: Sequence[Spec], engine: Engine) -> Pool:
    """Return the pool of layers with blocks of one size in bytes: groups of equal size, the last of each kind padded."""
    kinds: dict[Spec, int] = {}
    for spec in specs:
        alike = replace(spec, count=0, role=spec.role if spec.kind == STATE else "")
        kinds[alike] = kinds.get(alike, 0) + spec.count
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < ALIKE * least else least
    groups = tuple(Group(spec, math.ceil(count / size)) for spec, count in kinds.items())
    return Pool(groups, size * specs[0].page, engine)


def packed(specs: Sequence[Spec], engine: Engine) -> Pool:
    """Return the pool of layers whose blocks lie side by side within one (_get_packed_kv_cache_groups): DeepSeek V4's latents.

    Kinds that need the same number of places form a bucket. A bucket with as many layers of each size can be parted, so that all groups have about as
    many layers; a bucket without stays whole. The widest group is the size of a block.
    """
    buckets: list[list[Spec]] = []
    for spec in specs:
        for bucket in buckets:
            if uniform([*bucket, spec]):
                bucket.append(spec)
                break
        else:
            buckets.append([spec])
    sizes = [pages_of(bucket) for bucket in buckets]
    even = [len(set(pages.values())) == 1 for pages in sizes]
    repeats = [max(pages.values()) for pages in sizes]
    floor = max((repeat for repeat, pages, balanced in zip(repeats, sizes, even, strict=True) if balanced and len(pages) > 1), default=0)
    step = least_padding([repeat for repeat, balanced in zip(repeats, even, strict=True) if balanced], floor) if floor else 0
    groups, widest = [], 0
    for bucket, pages, balanced, repeat in zip(buckets, sizes, even, repeats, strict=True):
        parts = math.ceil(repeat / step) if balanced and step else 1
        widest = max(widest, sum(math.ceil(count / parts) * page for page, count in pages.items()))
        groups.append(Group(bucket[0], parts))
    return Pool(tuple(groups), widest, engine)


def pages_of(bucket: Sequence[Spec]) -> dict[int, int]:
    """Return how many layers have blocks of each size in bytes."""
    pages: dict[int, int] = {}
    for spec in bucket:
        pages[spec.page] = pages.get(spec.page, 0) + spec.count
    return pages


def least_padding(values: Sequence[int], floor: int) -> int:
    """Return the number, from `floor` on, to whose multiples the values are rounded up with the least added; of several the largest."""
    best = max(1, floor)
    least = math.inf
    for step in range(best, max(values) + 1):
        padding = sum(-value % step for value in values)
        if padding <= least:
            best, least = step, padding
    return best


def kv_capacity(pool: Pool, memory: int, context: int) -> tuple[int, float]:
    """Return how many tokens vLLM will say that the cache holds, and how many requests of full length."""
    needed = pool.blocks(context)
    if not needed:
        return 0, 0.0
    contexts = pool.count(memory) / needed
    return int(contexts * context), contexts


def longest_context(pool: Pool, memory: int, limit: int) -> int:
    """Return the longest context, up to a limit, of which the cache holds one. One block is never given out."""
    blocks = pool.count(memory) - 1
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if pool.blocks(middle) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def bytes_per_token(layers: Sequence[Layer]) -> int:
    """Return the bytes of one token in all layers on one GPU, as long as no window has been left. States are no matter of tokens."""
    return sum(layer.count * layer.bytes // layer.tokens_per_entry for layer in layers if layer.kind != STATE and not layer.role.endswith("compressor"))
