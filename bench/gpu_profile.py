#!/usr/bin/env python3
"""Where the time of one client's tokens goes: one model, one request, the GPU's kernels of a decoding step by kind. Weights are random.

    bench/gpu_profile.py MODEL [NAME=VALUE ...]

NAME=VALUE are arguments of vLLM's engine (`linear_backend=marlin`). Prints milliseconds for a token without and with the profiler's eyes on it, the
milliseconds of each kind of kernel, and the share of the memory's bandwidth at which the weights are read, as JSON in the last line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

PROMPT, TOKENS = 512, 128
KINDS = (
    # First, because these carry the names of the products that they are fused with.
    ("norms, activations, rotary embedding", r"triton_(red|poi|per)|rms|silu"),
    ("quantised matrices", r"marlin|machete|humming|awq|w4a16|GemmUniversal"),
    ("attention and KV cache", r"flash|attn|attention|reshape_and_cache"),
    ("logits and sampling", r"gemm|gemv|cublas|nvjet|splitK|argmax|softmax|sample|topk|sort|cumsum|scatter|gather|index"),
)
# Bytes/s that the vendor gives for the memory of each GPU.
BANDWIDTH = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12, "A100-SXM4-80GB": 2.04e12, "L40S": 0.864e12}


def kind(kernel: str) -> str:
    return next((name for name, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "others")


def main() -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    words = dict(word.split("=", 1) for word in sys.argv[2:])
    keywords: dict[str, Any] = {"max_model_len": 8192, "gpu_memory_utilization": 0.9} | {
        key: json.loads(value) if re.match(r"[\[{\d]|true$|false$", value) else value for key, value in words.items()
    }
    engine = LLM(model=sys.argv[1], load_format="dummy", disable_log_stats=True, enable_prefix_caching=False, **keywords)
    model = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    # A step reads every weight but the table of the vocabulary, of which it reads a row.
    read = sum(tensor.numel() * tensor.element_size() for name, tensor in [*model.named_parameters(), *model.named_buffers()] if "embed_tokens" not in name)

    def answer(tokens: int) -> float:
        began = time.perf_counter()
        prompt = {"prompt_token_ids": [(7 * at + tokens) % 40000 + 100 for at in range(PROMPT)]}
        engine.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0), use_tqdm=False)
        return time.perf_counter() - began

    def kernels(tokens: int) -> dict[str, tuple[float, int]]:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            answer(tokens)
            torch.cuda.synchronize()
        return {event.key: (event.self_device_time_total / 1000, event.count) for event in seen.key_averages() if event.self_device_time_total}

    answer(TOKENS)
    first = sorted(answer(1) for _ in range(5))[2]
    took = sorted(answer(TOKENS) for _ in range(5))[2]
    step = (took - first) / (TOKENS - 1) * 1000
    one, many = kernels(1), kernels(65)
    by_kind: dict[str, float] = defaultdict(float)
    by_kernel: list[tuple[float, float, str]] = []
    for name, (milliseconds, count) in many.items():
        before = one.get(name, (0.0, 0))
        each = (milliseconds - before[0]) / 64
        by_kind[kind(name)] += each
        by_kernel.append((each, (count - before[1]) / 64, name))
    for each, times, name in sorted(by_kernel, reverse=True)[:12]:
        print(f"{each:8.3f} ms {times:6.1f} times  {name[:150]}")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    limit = next((bandwidth for name, bandwidth in BANDWIDTH.items() if name in gpu), None)
    result: dict[str, Any] = {"model": os.path.basename(sys.argv[1].rstrip("/")), "arguments": words, "gpu": gpu, "first_token_ms": round(first * 1000, 1)}
    result |= {"token_ms": round(step, 3), "tokens_per_s": round(1000 / step, 1), "read_gb": round(read / 1e9, 2)}
    result |= {"kernels_ms": {name: round(value, 3) for name, value in sorted(by_kind.items(), key=lambda item: -item[1])}}
    result["between_kernels_ms"] = round(step - sum(by_kind.values()), 3)
    if limit:
        result["of_bandwidth"] = round(read / limit / (step / 1000), 3)
    print(json.dumps(result), flush=True)
    os._exit(0)  # the engine's threads take long to end and have nothing to keep


if __name__ == "__main__":
    main()
