#!/usr/bin/env bash
# What the README says of a real GPU: the collection's flags against the guide's at 1, 16 and 64 clients, the seconds of sleep, wake-up, swap and rollback, and
# predicted against actual KV tokens (bench/gpu_plan.sh, which `plan` calls).
#
#   bench/gpu.sh OUT SMALL LARGE [guide|throughput|latency|marlin|profile|swap|plan|nodes ...]
#
# Run it on a host with an NVIDIA GPU of 80 GB, where PYTHON (python3) imports vllm. SMALL and LARGE are directories with config.json and a tokenizer, such as
# those of Llama 3.1 8B and of Llama 3.1 70B in AWQ; weights are random, so none are needed: speed and memory are real, text is not. Logs go to OUT.
# The first four take about five minutes each, `profile` about seven, `swap` about six, `plan` about twelve. `latency` needs the distribution humming-kernels,
# which vLLM asks for itself. `nodes` is about five minutes, needs two GPUs, and is run only if it is named.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: gpu.sh OUT SMALL LARGE [guide|throughput|latency|marlin|profile|swap|plan|nodes ...]}
small=${2:?usage: gpu.sh OUT SMALL LARGE [guide|throughput|latency|marlin|profile|swap|plan|nodes ...]}
large=${3:?usage: gpu.sh OUT SMALL LARGE [guide|throughput|latency|marlin|profile|swap|plan|nodes ...]}
shift 3
[ $# -gt 0 ] || set -- guide throughput latency marlin profile swap plan
python=${PYTHON:-python3}
seconds=${SECONDS_EACH:-20}
mkdir -p "$out"
collections=$(mktemp -d)
trap 'rm -rf "$collections"' EXIT
mkdir -p "$collections/ansible_collections/selfhosted"
ln -s "$here/.." "$collections/ansible_collections/selfhosted/agent_stack"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

serve() {  # NAME [NAME=VALUE ...] -- FLAGS: start, measure at 1, 16 and 64 clients, stop
  local name=$1 pid begun; shift
  local environment=()
  while [ "$1" != -- ]; do environment+=("$1"); shift; done
  shift
  begun=$(date +%s)
  setsid env "${environment[@]}" "$python" -m vllm.entrypoints.openai.api_server --model "$large" --served-model-name m --port 8100 --load-format dummy "$@" \
    > "$out/$name.log" 2>&1 &
  pid=$!
  until curl --silent --fail --output /dev/null http://127.0.0.1:8100/health; do
    kill -0 "$pid" 2> /dev/null || { tail -20 "$out/$name.log"; return 1; }
    sleep 1
  done
  echo "{\"flags\": \"$name\", \"start_seconds\": $(($(date +%s) - begun))}"
  for clients in 1 16 64; do
    echo "{\"flags\": \"$name\", \"result\": $("$python" "$here/gpu_client.py" http://127.0.0.1:8100 m "$clients" "$seconds")}"
  done
  kill -TERM -- "-$pid"
  wait "$pid" || true
}

for part in "$@"; do
  case $part in
    # The guide's flags, except for an option that vLLM has dropped.
    guide) serve guide -- --quantization awq --max-model-len 8192 --gpu-memory-utilization 0.90 --enforce-eager --dtype half ;;
    # The role's arguments for CUDA.
    throughput) serve throughput -- --max-model-len 8192 --gpu-memory-utilization 0.9 ;;
    # The same with what vllm_plan returns for this model on this GPU (vllm_optimize_for: latency).
    latency) serve latency HUMMING_CACHE_DIR="$out/humming" -- --max-model-len 8192 --gpu-memory-utilization 0.9 --linear-backend humming ;;
    # Another kernel that vLLM has for it.
    marlin) serve marlin -- --max-model-len 8192 --gpu-memory-utilization 0.9 --linear-backend marlin ;;
    # Where one client's time goes, with either.
    profile)
      for backend in humming marlin; do
        "$python" "$here/gpu_profile.py" "$large" "linear_backend=$backend" 'compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]}' \
          2> "$out/profile-$backend.log"
      done
      ;;
    swap)
      PYTHONPATH="$collections${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/gpu_swap.py" "$out/swap" "$small" "$python"
      ;;
    plan) "$here/gpu_plan.sh" "$small" "$out/plan" ;;
    # On two GPUs.
    nodes)
      "$here/nodes.sh" "$out/nodes" "$small"
      "$here/gpu_plan.sh" "$small" "$out/plan-of-two" llama-3.1-8b,tensor_parallel_size=2 llama-3.1-8b,pipeline_parallel_size=2
      ;;
    *) echo "gpu.sh: $part is none of guide, throughput, latency, marlin, profile, swap, plan, nodes" >&2; exit 2 ;;
  esac
done
