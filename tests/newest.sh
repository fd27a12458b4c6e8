#!/usr/bin/env bash
# The whole stack with the newest ansible-core, as `molecule test -s default` does it with the oldest: check, converge, idempotence.
# Then each supported core looks at the host that this made.
set -euo pipefail
cd "$(dirname "$0")/.."
host=agent-stack-newest
newest=$(python -c 'import sys; sys.path.insert(0, "tools"); import cores; print(list(cores.SUPPORTED)[-1])')
inventory=.cache/newest
mkdir -p $inventory
printf -- '---\nall:\n  hosts:\n    %s:\n      ansible_connection: community.docker.docker\n' $host > $inventory/hosts.yml
ln -sfn ../../molecule/default/inventory/group_vars $inventory/group_vars
export MOLECULE_PROJECT_DIRECTORY=$PWD

python tools/host/host.py down $host --keep-images
python tools/host/host.py up $host --images-of agent-stack-images
python -c "import sys; sys.path.insert(0, 'tools'); import cores; cores.ensure('core-$newest')"
play() {
  PATH="$PWD/.cache/core-$newest/venv/bin:$PATH" ANSIBLE_NOCOLOR=1 ansible-playbook site.yml -i $inventory -e @.cache/machine.json "$@" | tee .cache/parts/newest-play.log
}
play --check --diff
play
play
grep -Eq "^$host +: .*changed=0 .*failed=0 " .cache/parts/newest-play.log || { echo "error: the second run changed something" >&2; exit 1; }
python tools/versions.py --inventory $inventory --after-make-test
python tools/host/host.py down $host --keep-images
