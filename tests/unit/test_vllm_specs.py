"""The caches of each architecture by formula, against what vLLM itself said of them (tools/record_plans.py), and configurations that nobody published."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import record_vllm
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_plan as plan_of
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_specs as specs_of
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_cache import Engine, Pool, kv_capacity, kv_pool
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import PlanError, UnknownArchitecture
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_specs import FULL, LATENT, SLIDING, SLIDING_LATENT, STATE, Cache, Layer
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_weights import read_quantization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parent / "data"
PLANS: dict[str, dict[str, Any]] = json.loads((DATA / "plans.json").read_text())
CONFIGS = {file.stem: json.loads(file.read_text()) for file in sorted((DATA / "models").glob("*.json"))}
GIB = plan_of.GIB
# What vLLM calls the kinds.
NAMES = {
    FULL: "FullAttention",
    SLIDING: "SlidingWindow",
    "chunked": "ChunkedLocalAttention",
    LATENT: "MLAAttention",
    STATE: "Mamba",
    SLIDING_LATENT: "SlidingWindowMLA",
}
# Parameters that no formula counts: position embeddings, encoders of images, blocks that layers share, and sizes that only the safetensors tell. Their
# files' sizes count.
ROUGH = {"opt-125m", "gemma-3-27b", "hy4", "lfm2-1.2b", "minicpm3-4b", "zamba2-2.7b", "gemma-4-e2b", "gemma-3n-e4b", "llama-4-scout"}


def shape(name: str, **change: Any) -> plan_of.Shape:
    config = {key: value for key, value in CONFIGS[name].items() if key != "quantization_config"}
    return plan_of.read_shape(config | change)


def test_the_record_is_of_the_pinned_vllm() -> None:
    """If this fails, run `make record-plans`."""
    assert {plan["by"] for plan in PLANS.values()} <= set(record_vllm.pinned().values())


def test_every_shape_has_a_source_and_each_kind_is_recorded_twice() -> None:
    assert set(json.loads((DATA / "sources.json").read_text())) == set(CONFIGS)
    assert set(PLANS) <= set(CONFIGS)
    assert len(PLANS) >= 100
    for kind in NAMES.values():
        several = [name for name, plan in PLANS.items() if any(layer["kind"] == kind for layer in plan["layers"])]
        assert len(several) >= (1 if kind in ("ChunkedLocalAttention", "SlidingWindowMLA") else 2), kind


@pytest.mark.parametrize("name", sorted(PLANS))
def test_caches_are_what_vllm_says(name: str) -> None:
    """To the byte. Blocks differ: those of vLLM's CPU backends have more tokens."""
    said = sorted(
        (
            layer["kind"],
            layer["count"],
            layer["state_bytes"] if layer["kind"] == "Mamba" else layer["bytes"] * layer.get("tokens_per_entry", 1) / layer["block"],
            layer.get("sliding_window") or layer.get("attention_chunk_size") or 0,
        )
        for layer in PLANS[name]["layers"]
    )
    found = shape(name).caches(Cache())
    assert sorted((NAMES[layer.kind], layer.count, layer.bytes, layer.window) for layer in found) == said


@pytest.mark.parametrize("name", sorted(name for name, plan in PLANS.items() if plan["groups"][0][0]))
def test_groups_are_vllms(name: str) -> None:
    groups = kv_pool(shape(name).caches(Cache()), Engine()).groups
    assert sum(group.count for group in groups) == len(PLANS[name]["groups"])


@pytest.mark.parametrize("name", sorted(set(PLANS) - ROUGH))
def test_weights_are_what_vllm_allocates(name: str) -> None:
    assert shape(name).weight_bytes() == pytest.approx(PLANS[name]["weight_bytes"], rel=0.01)


@pytest.mark.parametrize("name", sorted(name for name, plan in PLANS.items() if plan["context"]))
def test_contexts_are_vllms(name: str) -> None:
    assert shape(name).max_context == PLANS[name]["context"]


def test_architectures_are_recorded_or_said_to_be_from_the_source() -> None:
    """Each rule is held to at least one record, and what is not is named."""
    recorded = {specs_of.BY_ARCHITECTURE.get(plan["architecture"]) for plan in PLANS.values()}
    from_source = {specs_of.BY_ARCHITECTURE[name] for name in specs_of.BY_SOURCE}
    assert set(specs_of.RULES) - recorded <= from_source


# Tokens, contexts or refusals that other people's vLLM logged; GPU totals are what torch sees.
H200, H100 = plan_of.Gpu("NVIDIA H200", int(139.8 * 1024), 10**6, 9.0), plan_of.Gpu("NVIDIA H100", int(79.1 * 1024), 10**6, 9.0)
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def test_an_indexer_beside_a_latent() -> None:
    """GLM-5-FP8 on eight H200 logged 344,192 tokens in 32.11 GiB: 78 x (576 x 2 + 132) bytes a token."""
    glm = plan_of.read_shape(CONFIGS["glm-5"] | FP8)
    assert glm.kv_bytes_per_token(8, 2) == 78 * (576 * 2 + 132)
    assert plan_of.make_plan(glm, None, [H200] * 8, plan_of.Wish(0.9, 202752, 8)).memory.kv_tokens == pytest.approx(344_192, rel=0.06)


def test_two_geometries() -> None:
    """Gemma 4 31B in 4 bits on an A100 80 GB logged about 525,000 tokens."""
    gemma = plan_of.read_shape(CONFIGS["gemma-4-31b"] | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})
    gpu = plan_of.Gpu("NVIDIA A100-SXM4-80GB", int(79.14 * 1024), 10**6, 8.0)
    assert plan_of.make_plan(gemma, None, [gpu], plan_of.Wish(0.9, 262144)).memory.kv_tokens == pytest.approx(525_000, rel=0.1)


def test_a_state_is_a_part_of_every_request() -> None:
    """Qwen3.5-35B-A3B logged 113.57 contexts of 4,096 tokens in 16.03 GiB, before vLLM kept a second state for its prefix cache."""
    layers = shape("qwen3.5-35b-a3b").caches(Cache())
    assert kv_capacity(kv_pool(layers, Engine(8.0, prefix_caching=False)), int(16.03 * GIB), 4096)[1] == pytest.approx(113.57, rel=0.005)
    ampere, hopper = (kv_pool(layers, Engine(capability)).blocks(4096) for capability in (8.0, 9.0))
    # Four groups: one attends, three keep two states each, and three where FlashInfer computes them.
    assert (ampere, hopper) == (math.ceil(4096 / 1056) + 3 * 2, math.ceil(4096 / 1088) + 3 * 3)


def test_deepseek_v4_is_packed() -> None:
    """Refused on two GH200 for 30,000 tokens: 6.66 GiB were needed, and 5.44 left, which hold at most 13,528."""
    v4 = plan_of.read_shape(CONFIGS["deepseek-v4-flash"])
    gpu = plan_of.Gpu("NVIDIA GH200", int(94.5 * 1024), 10**6, 9.0)
    plan = plan_of.make_plan(v4, int(148.16 * GIB), [gpu] * 2, plan_of.Wish(0.95, 30_000, 2))
    assert not plan.fits
    assert plan.memory.longest_context == pytest.approx(13_528, rel=0.1)
    assert plan.memory.request / GIB == pytest.approx(6.66, rel=0.1)


@pytest.mark.parametrize(
    ("layers", "engine", "bytes_per_block", "groups"),
    [
        # Alike: one group of all.
        ([Layer(FULL, 32, 4096)], Engine(), 32 * 16 * 4096, 1),
        # A window layer's block is twice as large, so that of the others holds twice the tokens.
        ([Layer(SLIDING, 50, 16384, 1024), Layer(FULL, 10, 8192)], Engine(), 10 * 16 * 16384, 6),
        # 13 are not much more than 12, so that the smaller group is padded.
        ([Layer(FULL, 13, 1024), Layer(SLIDING, 12, 1024, 128)], Engine(), 13 * 16 * 1024, 2),
        # A block of a latent grows until the state fits: 2,146,304 / 1,152 is 1,863.1 tokens, in steps of 128.
        ([Layer(STATE, 3, 2_146_304), Layer(LATENT, 1, 1152)], Engine(), 1920 * 1152, 4),
        # What has another size and does not divide is padded.
        ([Layer(SLIDING, 4, 3000, 128), Layer(FULL, 4, 4096)], Engine(), 4 * 16 * 4096, 2),
        # A latent's blocks cannot be padded, so that windows beside it are kept whole.
        ([Layer(LATENT, 10, 1152), Layer(SLIDING, 2, 1536, 128)], Engine(), 16 * (10 * 1152 + 2 * 1536), 1),
        ([Layer(STATE, 64, 1000)], Engine(), 64_000, 1),
        ([], Engine(), 0, 0),
    ],
)
def test_pools(layers: list[Layer], engine: Engine, bytes_per_block: int, groups: int) -> None:
    pool: Pool = kv_pool(layers, engine)
    assert (pool.bytes_per_block, sum(group.count for group in pool.groups)) == (bytes_per_block, groups)


@pytest.mark.parametrize(
    ("layers", "capability", "fp8", "block"),
    [
        ([Layer(LATENT, 2, 1152)], 9.0, False, 16),
        ([Layer(LATENT, 2, 576)], 9.0, True, 64),
        ([Layer(LATENT, 2, 1152)], 10.0, False, 32),
        ([Layer(LATENT, 2, 1152), Layer(LATENT, 2, 132, role="indexer")], 9.0, False, 64),
        ([Layer(SLIDING_LATENT, 2, 584, 128, block=64)], 9.0, False, 64),
        ([Layer(FULL, 2, 4096)], 12.0, True, 16),
    ],
)
def test_blocks_are_those_of_cudas_backends(layers: list[Layer], capability: float, fp8: bool, block: int) -> None:
    pool = kv_pool(layers, Engine(capability, fp8=fp8))
    assert {group.spec.block for group in pool.groups} == {block}


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "state"),
    [
        # Groups that do not divide are kept by each GPU.
        ("granite-4-h-small", 2, (8192 + 2 * 2 * 128) // 2 * 3 * 2 + 64 * 64 * 128 * 2),
        ("qwen3-next-80b", 4, 8192 // 4 * 3 * 2 + 8 * 128 * 128 * 2),
        ("lfm2-8b-a1b", 2, 1024 * 2 * 2),
    ],
)
def test_states_are_shared_out(name: str, tensor_parallel: int, state: int) -> None:
    assert [layer.bytes for layer in shape(name).caches(Cache(tensor_parallel)) if layer.kind == STATE] == [state]


def test_an_unknown_architecture_is_refused_and_served_all_the_same() -> None:
    config = CONFIGS["llama-3.1-8b"] | {"architectures": ["BrandNewForCausalLM"]}
    with pytest.raises(UnknownArchitecture, match="no formula is known for the caches of BrandNewForCausalLM"):
        plan_of.read_shape(config, {"BrandNewForCausalLM"})
    served = plan_of.read_shape(config, {"BrandNewForCausalLM"}, serve_unknown=True)
    assert (served.known, [(layer.kind, layer.count) for layer in served.caches(Cache())]) == (False, [(FULL, 32)])


@pytest.mark.parametrize(
    ("described", "name"),
    [
        ({"quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}}, "nvfp4"),
    ],
)
def test_quantisations(described: dict[str, Any], name: str) -> None:
    assert read_quantization(described).name == name


def test_a_quantisation_that_only_files_can_size() -> None:
    """vLLM serves it, and the sizes of the files are enough; without them nothing is guessed."""
    quark = plan_of.read_shape(CONFIGS["llama-3.1-8b"] | {"quantization_config": {"quant_method": "quark"}}, methods=frozenset({"quark"}))
    assert plan_of.make_plan(quark, 5 * GIB, [H100], plan_of.Wish(0.9, 8192)).fits
    with pytest.raises(PlanError, match="the sizes of the model's files are not known, and what the quantisation quark takes cannot be told without them"):
        plan_of.make_plan(quark, None, [H100], plan_of.Wish(0.9, 8192))
    with pytest.raises(PlanError, match="'exl3', which the pinned vLLM does not serve; it serves quark"):
        plan_of.read_shape(CONFIGS["llama-3.1-8b"] | {"quantization_config": {"quant_method": "exl3"}}, methods=frozenset({"quark"}))


def test_the_checkpoint_says_how_keys_and_values_are_kept() -> None:
    scheme = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
    told = plan_of.read_shape(CONFIGS["llama-3.1-70b"] | {"quantization_config": scheme})
    assert plan_of.make_plan(told, None, [H100] * 2, plan_of.Wish(0.9, 8192, 2)).memory.kv_bytes_per_token == 80 * 4 * 2 * 128


def test_experts_in_mxfp4_are_padded() -> None:
    """gpt-oss-120b: 60.77 GiB of files, 65.97 GiB once vLLM 0.33 has loaded them on an H100."""
    loaded = plan_of.loaded_bytes(plan_of.read_shape(CONFIGS["gpt-oss-120b"]), int(60.77 * GIB), H100)
    assert loaded / GIB == pytest.approx(65.97, rel=0.01)


# ------------------------------------------------------------------------------------------------- configurations that nobody published

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([0, 1, 2, 3, 8, 4096, 10**9, 10**12]),
    st.floats(),
    st.sampled_from(["", "fp8", "float32", "full_attention", "M*-", "yarn", "x" * 500]),
    st.lists(st.one_of(st.none(), st.integers(-2, 10**12), st.text(max_size=3), st.floats()), max_size=5),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", "linear_attention", "mamba", "deepseek_sparse_attention"]), min_size=1, max_size=100),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "weights", "num_bits", "quant_method"]), st.one_of(st.none(), st.integers(), st.text(max_size=4)), max_size=3
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in entries for place in ((*path, key), *places(inner, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A published configuration with some of its values lost, of another type or size, or put where they do not belong."""
    config = copy.deepcopy(CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))])
    if draw(st.integers(0, 3)) == 0:
        config = {"architectures": config["architectures"], "model_type": config["model_type"], "text_config": config}
    for _ in range(draw(st.integers(1, 4))):
        found = places(config)
        if not found:
            break
        *path, last = found[draw(st.integers(0, len(found) - 1))]
        inner = config
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and draw(st.booleans()):
            del inner[last]
        else:
            inner[last] = draw(VALUES)
    return config


def plan_it(config: Any) -> None:
    """A plan or one sentence, never a traceback."""
    said = "It fits or does not."
    try:
        read = plan_of.read_shape(config, serve_unknown=True)
        plan_of.make_plan(read, None, [H100] * 2, plan_of.Wish(0.9, 0, 0))
        plan_of.make_plan(read, 10**10, [H100] * 4, plan_of.Wish(0.9, 1, 2, pipeline=1, drafts=2))
        specs_of.describe(read.caches(Cache()))
    except PlanError as error:
        said = str(error)
    assert re.fullmatch(r"[^\n]{10,900}\.", said), said


EASY: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=200, **EASY)
@given(mutated())
def test_no_configuration_ends_in_a_traceback(config: Any) -> None:
    plan_it(config)


@settings(max_examples=60, **EASY)
@given(st.recursive(VALUES, lambda inner: st.dictionaries(st.text(max_size=12), inner, max_size=4), max_leaves=8))
def test_nor_does_anything_else_that_json_holds(config: Any) -> None:
    plan_it(config)


@pytest.mark.long
@settings(max_examples=5000, **EASY)
@given(mutated())
def test_nor_do_five_thousand(config: Any) -> None:
    plan_it(config)
