#!/usr/bin/env bash
# The whole stack on a server with a real GPU and no network: converge, second run, swaps, rollback, the agent's share, watchdog, reboot, a lost GPU, a new image.
#
#   bench/gpu_host.sh KIT OUT PHASE...
#
#   stage      make the server ready, and look at its GPU and vLLM                                    the kit decides
#   converge   the play                                                                               4 minutes
#   second     the play again                                                                         1 minute
#   swaps      under load: to a model never loaded, back, between two that have slept, rollback       5 minutes
#   share      tokens/s and time to the first token at 1, 16, 64 and 256 streams: vLLM, then agent    4 minutes
#   watchdog   the engine stops moving                                                                3 minutes
#   gpu        the container loses its GPU; then the host does, while a swap is asked for             4 minutes
#   reboot     of the server                                                                          3 minutes
#   upgrade    another image of vLLM                                                                  3 minutes
#
# Each phase may be repeated, and leaves its logs in OUT. Then
#
#   bench/gpu_host.py record OUT [--baseline OUT]    one machine's figures, into docs/measurements/gpu.json
#   bench/gpu_host.py render                         the section of docs/measurements/gpu.md, from that
#
# KIT is a directory with a file `server.sh`, which is sourced. It says what only the machine knows, as Bash:
#
#   in_server COMMAND...   runs a command on the server as root; without it, this machine is the server
#   stage                  what is to be done before the play: image archives, model directories, Pebble. Without it, nothing
#   reboot_server          restarts the server, and returns when it may be asked again
#   take_gpu, return_gpu   take the GPU's device from the server, and give it back
#   project                directory of this collection on the server
#   inventory              path of the inventory on the server; its playbook is `playbook` (site.yml)
#   models                 array of two directories on the server: the inventory's model, and another one of the same size
#   next_image             reference of another image of vLLM, for `upgrade`
#   login, domain, ca      `USER:PASSWORD` and name of nginx, and the file with the root of its certificate
#   processes              that the load's clients are spread over (8)
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage="usage: gpu_host.sh KIT OUT stage|converge|second|swaps|share|watchdog|gpu|reboot|upgrade ..."
kit=${1:?$usage} out=${2:?$usage}
shift 2
[ $# -gt 0 ] || { echo "$usage" >&2; exit 2; }
[ -f "$kit/server.sh" ] || { echo "gpu_host.sh: KIT is $kit; it must hold a file server.sh." >&2; exit 2; }

in_server() { "$@"; }
stage() { :; }
playbook=site.yml login=agent: domain=localhost ca=/etc/ssl/certs/ca-certificates.crt processes=8 next_image=
models=()
# shellcheck source=/dev/null
. "$kit/server.sh"
: "${project:?server.sh must set project}" "${inventory:?server.sh must set inventory}"
mkdir -p "$out"
failures=0

say() { echo "[$SECONDS s] $*"; }
now() { date +%s.%N; }
since() { python3 -c 'import sys, time; print(round(time.time() - float(sys.argv[1]), 1))' "$1"; }
note() { echo "{\"$1\": $2}" >> "$out/notes.jsonl"; }  # KEY JSON; the last one of a key counts
fail() { say "FAILED: $*"; failures=$((failures + 1)); }

play() {  # NAME PLAYBOOK [arguments]: its log is OUT/NAME.log
  local name=$1 book=$2 begun status; shift 2
  begun=$(now)
  in_server bash -c 'cd "$1" && shift && exec timeout 540 python3 -m ansible playbook "$@"' play "$project" -i "$inventory" "$book" "$@" > "$out/$name.log" 2>&1
  status=$?
  echo "gpu_host: $(since "$begun") s, status $status" >> "$out/$name.log"
  say "$name: status $status; $(grep -oE 'ok=[0-9]+ +changed=[0-9]+|held for [0-9.]+ s' "$out/$name.log" | tr '\n' ' ')"
  return $status
}

client() { in_server python3 "$project/bench/gpu_client.py" "$@"; }
slot() { in_server python3 -c 'import json; print(json.load(open("/var/lib/agent-stack/vllm/swap.json"))["active"])'; }
server() { echo "agent-stack-vllm-$(slot)-server-1"; }
address() { in_server docker inspect --format '{{range $name, $network := .NetworkSettings.Networks}}{{println $name $network.IPAddress}}{{end}}' "$1" | awk -v n="$2" '$1 == n {print $2}'; }
vllm_url() { echo "http://$(address "$(server)" agent-stack-model):8000"; }
gateway_url() { echo "http://$(address agent-stack-vllm-gateway-1 agent-stack-inference):8000"; }
started() { in_server docker inspect --format '{{.Id}} {{.State.StartedAt}}' "$(server)"; }

turn() {  # one turn of the agent, through nginx; says the status
  in_server curl --silent --show-error --max-time 320 --cacert "$ca" --user "$login" --header 'Content-Type: application/json' \
    --data '{"message": "One word, please."}' --output /dev/null --write-out '%{http_code}' "https://$domain/chat"
}

until_turn() {  # BEGUN: waits until a turn is answered, at most 400 s; prints the seconds since BEGUN
  for _ in $(seq 400); do
    [ "$(turn 2> /dev/null)" = 200 ] && { since "$1"; return 0; }
    sleep 1
  done
  return 1
}

logs() {  # NAME: what both model servers have said, with times
  for one in blue green; do in_server docker logs --timestamps "agent-stack-vllm-$one-server-1" > "$out/$1.$one.txt" 2>&1; done
}

do_stage() {
  stage || { fail "stage"; return; }
  note gpu "\"$(in_server nvidia-smi --query-gpu=name --format=csv,noheader | head -1)\""
  note gpus "$(in_server nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)"
  note driver "\"$(in_server nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)\""
  note cores "$(nproc)"
  note date "\"$(date -u +%F)\""
}

do_converge() {
  play converge "$playbook" || { fail "the first play"; tail -40 "$out/converge.log"; return; }
  note vllm "\"$(in_server docker exec "$(server)" python3 -c 'from importlib.metadata import version; print(version("vllm"))')\""
}

do_second() { play second "$playbook" || fail "the second play"; }

do_swaps() {
  local stop=/run/gpu-host-stop load
  in_server rm -f $stop
  client "$(gateway_url)" agent-model 8 500 64 100 --until $stop --seed 1 > "$out/swaps.json" 2> "$out/swaps.stderr" &
  load=$!
  sleep 3
  play swap-never "$playbook" --tags vllm -e "vllm_model=${models[1]}" || fail "the swap to a model never loaded"
  sleep 3
  play swap-back "$playbook" --tags vllm || fail "the swap back"
  play swap-loaded "$playbook" --tags vllm -e "vllm_model=${models[1]}" || fail "the swap between two that have slept"
  play rollback playbooks/rollback.yml || fail "the rollback"
  in_server touch $stop
  wait $load || fail "the load"
  cat "$out/swaps.json"
  logs swaps
}

cpu() {  # microseconds of processor time, as JSON: each container, and nginx
  in_server bash -c 'for name in $(docker ps --format "{{.Names}}"); do
      group=$(cut -d: -f3 "/proc/$(docker inspect --format "{{.State.Pid}}" "$name")/cgroup")
      echo "$name $(awk "/^usage_usec/ {print \$2}" "/sys/fs/cgroup$group/cpu.stat")"
    done; echo "nginx $(awk "/^usage_usec/ {print \$2}" /sys/fs/cgroup/system.slice/nginx.service/cpu.stat)"' \
    | python3 -c 'import json, sys; print(json.dumps({name: int(value) for name, value in (line.split() for line in sys.stdin if len(line.split()) == 2)}))'
}

share() {  # THROUGH CLIENTS SEED URL MODEL [options]: one line of OUT/share.jsonl
  local through=$1 clients=$2 seed=$3 before result; shift 3
  local url=$1 model=$2; shift 2
  before=$(cpu)
  result=$(client "$url" "$model" "$clients" "${SHARE_SECONDS:-15}" 128 350 --seed "$seed" --processes "$processes" "$@" 2> "$out/share.stderr")
  [ -n "$result" ] || { fail "load through $through: $(tail -1 "$out/share.stderr")"; return; }
  say "$through $result"
  [[ $result == *'"failed": 0'* ]] || fail "requests through $through failed"
  echo "{\"through\": \"$through\", \"result\": $result, \"cpu_before\": $before, \"cpu_after\": $(cpu)}" >> "$out/share.jsonl"
}

do_share() {
  local clients seed=100
  : > "$out/share.jsonl"
  for clients in ${SHARE_CLIENTS:-1 16 64 256}; do
    share vllm "$clients" $((seed += 1)) "$(vllm_url)" agent-model
    share agent "$clients" $((seed += 1)) "https://$domain" agent --path /openai/v1/chat/completions --plain --ca "$ca" \
      --header "Authorization: Basic $(printf %s "$login" | base64 -w 0)"
  done
}

do_watchdog() {
  local before begun
  before=$(started)
  in_server bash -c 'group=$(cut -d: -f3 "/proc/$(docker inspect --format "{{.State.Pid}}" "$1")/cgroup")
    for pid in $(cat "/sys/fs/cgroup$group/cgroup.procs"); do grep -aq EngineCore "/proc/$pid/cmdline" && kill -STOP "$pid" && echo "stopped $pid"; done' stop "$(server)" \
    | grep -q stopped || { fail "there is no process EngineCore to stop"; return; }
  begun=$(now)
  turn > "$out/watchdog-turn.txt" 2>&1 &
  for _ in $(seq 400); do [ "$(started)" = "$before" ] || break; sleep 1; done
  [ "$(started)" != "$before" ] || { fail "the watchdog restarted nothing within 400 s"; return; }
  note watchdog_restart_seconds "$(since "$begun")"
  note watchdog_answer_seconds "$(until_turn "$begun" || echo null)"
  say "the turn that hung: $(cat "$out/watchdog-turn.txt")"
  in_server journalctl --no-pager -u agent-stack-vllm-watchdog > "$out/watchdog.txt" 2>&1
}

do_gpu() {
  local before begun
  # As after a reload of systemd's units: what is open stays open, and nothing else opens.
  before=$(started)
  in_server bash -c 'nsenter -t "$(docker inspect --format "{{.State.Pid}}" "$1")" -m bash -c "chmod 000 /dev/nvidia*"' take "$(server)" || { fail "the container keeps its GPU"; return; }
  begun=$(now)
  in_server docker exec "$(server)" nvidia-smi -L > "$out/gpu-container.txt" 2>&1
  for _ in $(seq 120); do [ "$(started)" = "$before" ] || break; sleep 1; done
  if [ "$(started)" != "$before" ]; then
    note gpu_recreated_seconds "$(since "$begun")"
    note gpu_answer_seconds "$(until_turn "$begun" || echo null)"
  else
    fail "a container without its GPU was not made again within 120 s: $(cat "$out/gpu-container.txt")"
  fi
  declare -F take_gpu > /dev/null || { say "server.sh cannot take the GPU from the server"; return; }
  take_gpu
  if in_server nvidia-smi -L > "$out/gpu-host.txt" 2>&1; then
    return_gpu
    fail "take_gpu took no GPU: $(cat "$out/gpu-host.txt")"
    return
  fi
  play gpu-away "$playbook" --tags vllm -e "vllm_model=${models[1]}" && fail "a swap on a server without its GPU"
  note gpu_away_turn "\"$(turn)\""
  return_gpu
  play gpu-back "$playbook" --tags vllm || fail "the play after the GPU came back"
  note gpu_back_turn "\"$(turn)\""
}

do_reboot() {
  local begun
  declare -F reboot_server > /dev/null || { say "server.sh cannot restart the server"; return; }
  begun=$(now)
  reboot_server || { fail "the server did not come back"; return; }
  note reboot_up_seconds "$(since "$begun")"
  note reboot_answer_seconds "$(until_turn "$begun" || echo null)"
  in_server docker ps --format '{{.Names}} {{.Status}}' > "$out/reboot.txt" 2>&1
  in_server systemctl --failed --plain --no-legend >> "$out/reboot.txt" 2>&1
}

do_upgrade() {
  [ -n "$next_image" ] || { say "server.sh names no next_image"; return; }
  play upgrade "$playbook" --tags vllm -e "{\"agent_stack_image_overrides\": {\"vllm-cuda\": \"$next_image\"}}" || fail "the new image"
  play upgrade-rollback playbooks/rollback.yml || fail "the rollback of the image"
}

for phase in "$@"; do
  case $phase in
    stage | converge | second | swaps | share | watchdog | gpu | reboot | upgrade) say "== $phase"; "do_$phase" ;;
    *) echo "gpu_host.sh: $phase is no phase. $usage" >&2; exit 2 ;;
  esac
done
[ $failures -eq 0 ]
