#!/bin/sh
#
# Ansible managed
#
# Starts the server as PID 1, after making the cluster on the first start. initdb works in a directory of its own and
# is renamed into place, so that a start that was killed half way leaves nothing that looks like a cluster.
set -eu
major=$(postgres --version | sed 's/.* \([0-9]*\)\..*/\1/')
cluster=/var/lib/postgresql/data/$major
# Outside the volume: which cluster this host has, so that an empty volume is not taken for a new host.
marker=/var/lib/postgresql/state/cluster
if [ ! -d "$cluster" ]; then
  for other in /var/lib/postgresql/data/[0-9]*; do
    if [ -d "$other" ]; then
      echo "$other holds a cluster of another major version and must be upgraded first; $cluster was not created." >&2
      exit 1
    fi
  done
  if [ -e "$marker" ]; then
    echo "/srv/data/postgres holds no cluster, but this host had $(cat "$marker"): restore it with playbooks/restore.yml," \
      "or remove /srv/stack/postgres/state/cluster to begin with an empty one." >&2
    exit 1
  fi
  rm -rf /var/lib/postgresql/data/new
  initdb --pgdata=/var/lib/postgresql/data/new --username=postgres --encoding=UTF8 --locale=C.UTF-8 \
    --data-checksums --auth-local=peer --auth-host=scram-sha-256
  mv /var/lib/postgresql/data/new "$cluster"
fi
pg_controldata "$cluster" | sed -n 's/^Database system identifier: *//p' > "$marker.new"
mv "$marker.new" "$marker"
exec postgres -D "$cluster" -c config_file=/etc/agent-stack/postgresql.conf
