#!/usr/bin/env bash
# Plan against truth: starts vLLM with random weights for real models' shapes and compares the size of the KV cache that it logs with the planned one.
#
#   bench/gpu_plan.sh TOKENIZER OUT [NAME[,FLAG=VALUE...] ...]
#
# Run it on a host with an NVIDIA GPU of at least 80 GB, where PYTHON (python3) imports vllm. TOKENIZER is a directory with any tokenizer
# (tokenizer.json, tokenizer_config.json); NAMEs are those of tests/unit/data/models. About a minute a shape. Logs go to OUT; the last line is JSON.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tokenizer=${1:?usage: gpu_plan.sh TOKENIZER OUT [NAME[,FLAG=VALUE...] ...]}
out=${2:?usage: gpu_plan.sh TOKENIZER OUT [NAME[,FLAG=VALUE...] ...]}
shift 2
[ $# -gt 0 ] || set -- llama-3.1-8b llama-3.1-70b-awq llama-2-7b,max_model_len=4096 llama-3.2-3b qwen2.5-7b qwen2.5-32b-awq qwen3-32b-fp8 \
  qwen3-8b,kv_cache_dtype=fp8 mistral-7b-v0.1,max_model_len=32768 gemma-2-9b gemma-3-1b
models=${MODELS:-$here/../tests/unit/data/models}
mkdir -p "$out"
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"${PYTHON:-python3}" "$here/gpu_plan_engine.py" "$models" "$tokenizer" "$out" "$@"
"${PYTHON:-python3}" "$here/gpu_plan_compare.py" "$models" "$out"
