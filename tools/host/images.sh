#!/usr/bin/env bash
# The container images of the stack, made once by the roles that make them on a server, for all test hosts: each starts with a copy.
set -euo pipefail
cd "$(dirname "$0")/../.."
host=tools/host/host.py
python $host up agent-stack-images --with-docker
ansible-playbook tools/host/images.yml -i tools/host/hosts.yml -e @.cache/machine.json
python $host down agent-stack-images --keep-images --keep-volume
