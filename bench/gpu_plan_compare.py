"""Compare the KV cache that vLLM logged with the one that is planned, for every log that gpu_plan_engine.py left.

python3 gpu_plan_compare.py MODELS OUT [NAME,TOTAL_MIB,CAPABILITY]     the last for logs that do not name their GPU
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

UTILS = Path(__file__).resolve().parent.parent / "plugins" / "module_utils"
PACKAGE = "ansible_collections.selfhosted.agent_stack.plugins.module_utils"


def load_plan() -> Any:
    """Without Ansible, which a GPU host need not have: the package by the name that its modules know each other by."""
    parts = PACKAGE.split(".")
    for count in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:count]))
        package.__path__ = [str(UTILS)] if count == len(parts) else []
        sys.modules[package.__name__] = package
    return importlib.import_module(f"{PACKAGE}._vllm_plan")


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    return float(found.group(1).replace(",", "")) if found else 0.0


def main() -> None:
    planner = load_plan()
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    known = sorted((file.stem for file in models.glob("*.json")), key=len, reverse=True)
    print("| shape | weights GiB, vLLM | planned | KV cache GiB, vLLM | planned | KV tokens, vLLM | planned | difference |\n|---|---|---|---|---|---|---|---|")
    differences = {}
    for log in sorted(out.glob("*.log")):
        text = log.read_text(errors="replace")
        tokens, chosen = int(number(r"GPU KV cache size: ([\d,]+)", text)), re.search(r"^PLAN (.*)$", text, re.MULTILINE)
        name = next((name for name in known if log.stem == name or log.stem.startswith(f"{name}-")), None)
        if not (tokens and chosen and name):
            continue
        settings = json.loads(chosen.group(1))
        given = settings.get("gpu") or dict(zip(("name", "total_mib", "capability"), sys.argv[3].split(","), strict=True))
        gpu = planner.Gpu(given["name"], int(given["total_mib"]), int(given["total_mib"]), float(given["capability"]))
        shape = planner.read_shape(json.loads((models / f"{name}.json").read_text()))
        element = 1 if "kv_cache_dtype_fp8" in log.stem else 2  # bytes
        tensor, pipeline = settings.get("tensor_parallel_size", 1), settings.get("pipeline_parallel_size", 1)
        wish = planner.Wish(0.9, settings["max_model_len"], tensor, element, settings["max_num_batched_tokens"], settings["max_num_seqs"], pipeline)
        memory = planner.plan_on(planner.stage_of(shape, None, pipeline)[0], None, gpu, tensor, wish).memory
        weights, cache = number(r"Model loading took ([\d.]+)", text), number(r"Available KV cache memory: ([\d.]+)", text)
        differences[log.stem] = round(100 * (memory.kv_tokens / tokens - 1), 1)
        planned = f"{memory.weights / planner.GIB:.2f} | {cache:.2f} | {memory.kv_cache / planner.GIB:.2f}"
        print(f"| {log.stem} | {weights:.2f} | {planned} | {tokens:,} | {memory.kv_tokens:,} | {differences[log.stem]:+.1f} % |")
    if not differences:
        raise SystemExit(f"error: no log in {out} has a KV cache size and a name of {models}")
    print(json.dumps({"shapes": len(differences), "worst_percent": max(differences.values(), key=abs)}))


if __name__ == "__main__":
    main()
