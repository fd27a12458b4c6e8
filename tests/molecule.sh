#!/usr/bin/env bash
# molecule test -s SCENARIO. DRILLS chooses among its tests by their marks, KEEP_HOSTS leaves its hosts for `molecule.sh SCENARIO more`,
# which goes on with other tests on them and removes them.
set -euo pipefail
scenario=$1
# Whole sentences, where they are not for a terminal.
export COLUMNS=${COLUMNS:-160} PYTHONUNBUFFERED=1
# What an earlier run left, and molecule's memory of it: with `--destroy never` it would go on with that.
[ "${2-}" = more ] || molecule destroy -s "$scenario"
if [ "$scenario" = default ] && [ "${2-}" = uninstall ]; then
  molecule converge -s default
  python -m pytest -q -rP molecule/default/tests/test_uninstall.py
  molecule destroy -s default
  exit
fi
if [ "$scenario" = default ]; then
  molecule test -s default --destroy never
  DRILL_HOST=agent-stack-molecule python -m pytest -q -rP tests/system/test_5_recovery.py -k restarted_host
  molecule destroy -s default
  exit
fi
[ -z "${DRILLS-}" ] || export PYTEST_ADDOPTS="-m '$DRILLS'"
if [ "${2-}" = more ]; then
  molecule verify -s "$scenario"
  molecule destroy -s "$scenario"
else
  molecule test -s "$scenario" ${KEEP_HOSTS:+--destroy never}
fi
