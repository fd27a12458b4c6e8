#!/usr/bin/env bash
# molecule test -s SCENARIO. Its output ends with the removal of the host, so what failed is said again, last.
set -euo pipefail
log=.cache/molecule-$1.log
[ -z "${DRILLS-}" ] || export PYTEST_ADDOPTS="-m '$DRILLS'"
export COLUMNS=${COLUMNS:-160}  # whole sentences, where they are not for a terminal
molecule test -s "$1" 2>&1 | tee "$log" || {
  echo "== what failed in the scenario $1:"
  sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E 'FAILED|fatal:|\[ERROR\]|msg:|[A-Za-z]+(Error|Exception):|E +assert' | tail -n 40
  exit 1
}
