#!/usr/bin/env bash
# A model that hosts share, as the role runs it (roles/vllm/files/node.py), with two halves of this machine as the hosts.
#
#   bench/nodes.sh OUT MODEL [cpu]
#
# Run it as root (it makes /run/vllm) on a host with two NVIDIA GPUs where PYTHON (python3) imports vllm, or with `cpu` where VLLM is the `vllm` of a CPU build.
# MODEL is a directory with config.json and a tokenizer; weights are random. Starts head and follower, asks through the head's socket, kills the head and sees
# the follower end, starts both again, kills the follower's vLLM and sees what the head does. Prints a line for each. About three minutes. Logs go to OUT.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: nodes.sh OUT MODEL [cpu]}
model=${2:?usage: nodes.sh OUT MODEL [cpu]}
device=${3:-cuda}
python=${PYTHON:-python3}
read -r -a vllm <<< "${VLLM:-$python -m vllm.entrypoints.cli.main}"
node=$here/../roles/vllm/files/node.py
port=29555
mkdir -p "$out" /run/vllm
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
common=("$model" --served-model-name m --load-format dummy --distributed-executor-backend mp --nnodes 2 --master-addr 127.0.0.1 --master-port "$port")
if [ "$device" = cpu ]; then
  export VLLM_CPU_KVCACHE_SPACE=1
  common+=(--tensor-parallel-size 2 --max-model-len 1024 --dtype float32 --enforce-eager)
else
  common+=(--pipeline-parallel-size 2 --max-model-len 8192 --gpu-memory-utilization 0.9)
fi
declare -A pids
trap 'for pid in "${pids[@]}"; do pkill -KILL --session "$pid" || true; for child in $(pgrep --parent "$pid"); do pkill -KILL --session "$child" || true; done; done' EXIT

run() {  # NAME GPU ARGUMENTS OF node.py ...
  local name=$1 gpu=$2; shift 2
  CUDA_VISIBLE_DEVICES=$gpu setsid "$python" "$node" "$@" >> "$out/$name.log" 2>&1 &
  pids[$name]=$!
}
head() { run head 0 serve 127.0.0.1 "${vllm[@]}" serve "${common[@]}" --node-rank 0 --uds /run/vllm/api.sock; }
follower() { run follower 1 follow 127.0.0.1 127.0.0.1 "$port" "${vllm[@]}" serve "${common[@]}" --node-rank 1 --headless; }
used() { [ "$device" = cpu ] || echo ", MiB used: $(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | tr '\n' ' ')"; }
healthy() { curl --silent --fail --max-time 2 --output /dev/null --unix-socket /run/vllm/api.sock http://head/health; }
ask() {
  curl --silent --fail --max-time "$1" --unix-socket /run/vllm/api.sock http://head/v1/chat/completions --header 'Content-Type: application/json' --data \
    '{"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 64, "ignore_eos": true}' | grep -o '"completion_tokens":[0-9]*'
}
# Fails, and shows the logs' last lines, if the command is not true within the seconds; prints how many it took.
until_true() {  # SECONDS COMMAND ...
  local limit=$1 begun; shift; begun=$(date +%s)
  until "$@"; do
    [ $(($(date +%s) - begun)) -lt "$limit" ] || { echo "not within $limit s: $*" >&2; tail -n 8 "$out"/*.log >&2; return 1; }
    sleep 0.5
  done
  echo "$(($(date +%s) - begun)) s"
}
gone() { ! kill -0 "${pids[$1]}" 2> /dev/null; }

follower; head
took=$(until_true 240 healthy); echo "first start: healthy after $took$(used)"
answer=$(ask 60); echo "asked: $answer"
grep -h -o "GPU KV cache size: [0-9,]* tokens" "$out"/*.log | sort -u || true
pkill -KILL --session "${pids[head]}"
took=$(until_true 60 gone follower); echo "head killed: the follower ended after $took"
sleep 3; echo "afterwards$(used)"
follower; head
took=$(until_true 240 healthy); echo "second start: healthy after $took"
answer=$(ask 60); echo "asked: $answer"
pkill -KILL --session "$(pgrep --parent "${pids[follower]}")"
took=$(until_true 60 gone follower); echo "the follower's vLLM killed: node.py ended after $took"
answer=$(ask 30) || answer="no answer"
echo "asked: $answer; the head $(gone head && echo has ended || echo "runs, and $(healthy && echo is || echo is not) healthy")"
