"""On a GPU host with vLLM: start the engine for one model shape after another, and keep what its log says about memory.

    python3 gpu_plan_engine.py MODELS TOKENIZER OUT NAME[,FLAG=VALUE...] ...

MODELS holds one NAME.json (a model's config.json) for each shape. Weights are random (`--load-format dummy`): memory is real, text is not.
vLLM is imported once and the process forked for every shape, which spares each the seconds of importing it. An engine is stopped when it has
logged the size of its KV cache, or with the flag `then=sleep` when it has captured its graphs, slept and woken. OUT/NAME.log is the engine's
log; the line that starts with PLAN holds the settings that vLLM chose.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

DONE = "GPU KV cache size:"
LIMIT_S = int(os.environ.get("SHAPE_S", "150"))


def flags(words: list[str]) -> dict[str, Any]:
    """`max_model_len=32768` becomes a keyword of EngineArgs."""
    return {key: json.loads(value) if re.fullmatch(r"[\d.]+|true|false", value) else value for key, _, value in (word.partition("=") for word in words)}


def engine(directory: Path, keywords: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    then = keywords.pop("then", "")
    arguments = EngineArgs(model=str(directory), load_format="dummy", **{"max_model_len": 8192, "gpu_memory_utilization": 0.9} | keywords)
    # As `vllm serve` asks for them: the defaults for batches differ between the server and the library.
    config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    chosen = {
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "max_in_flight_tokens": getattr(config, "max_in_flight_tokens", None),
        "max_cudagraph_capture_size": config.compilation_config.max_cudagraph_capture_size,
        "block_size": config.cache_config.block_size,
        "max_model_len": config.model_config.max_model_len,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        "gpu": gpu(),
    }
    print("PLAN " + json.dumps(chosen), flush=True)
    running = LLMEngine.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER)
    if then == "sleep":
        for step, act in (("sleep", lambda: running.sleep(level=1)), ("wake", running.wake_up), ("sleep again", lambda: running.sleep(level=1))):
            began = time.monotonic()
            act()
            print(f"STEP {step}: {time.monotonic() - began:.1f} s, {used()} MiB used", flush=True)
    print("MEASURED", flush=True)
    time.sleep(60)


def used() -> str:
    return query("memory.used")[0]


def gpu() -> dict[str, Any]:
    name, total, reserved, capability = query("name,memory.total,memory.reserved,compute_cap")
    return {"name": name, "total_mib": int(total) - int(reserved), "capability": float(capability)}


def query(fields: str) -> list[str]:
    """Ask nvidia-smi for the first GPU. In a process of its own, because this one must not touch CUDA before it is forked."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")


def measure(name: str, words: list[str], models: Path, tokenizer: Path, out: Path) -> str:
    directory = Path(tempfile.mkdtemp())
    for file in tokenizer.iterdir():
        shutil.copy(file, directory)
    shutil.copy(models / f"{name}.json", directory / "config.json")
    log = out / ("-".join([name, *words]).replace("=", "_") + ".log")
    child = os.fork()
    if child == 0:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        try:
            engine(directory, flags(words))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    began, ended = time.monotonic(), False
    done = "MEASURED" if "then=sleep" in words else DONE
    while time.monotonic() - began < LIMIT_S and not ended and done not in log_text(log):
        time.sleep(0.3)
        ended = os.waitpid(child, os.WNOHANG)[0] != 0
    if not ended:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lines = [line for line in log_text(log).splitlines() if DONE in line or line.startswith("STEP") or re.match(r"\w*(Error|Exception):", line)]
    shutil.rmtree(directory)
    return f"{name} {' '.join(words)} [{time.monotonic() - began:.0f} s]: {' | '.join(line[-120:] for line in lines[-4:]) or 'no answer'}"


def log_text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def main() -> None:
    models, tokenizer, out = map(Path, sys.argv[1:4])
    import vllm.engine.arg_utils
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.gpu_worker  # noqa: F401

    for shape in sys.argv[4:]:
        name, *words = shape.split(",")
        print(measure(name, words, models, tokenizer, out), flush=True)


if __name__ == "__main__":
    main()
