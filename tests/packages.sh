#!/bin/sh
# Installs the Debian packages that the tests run for real, where they are missing: Postgres, pgBackRest, Redis, nginx, HAProxy, Prometheus,
# Alertmanager and exporters, Chromium, Node, nftables, iptables, iproute2 and curl, and a compiler for the driver of the scenario `nvidia`.
# Nothing is started: the tests start servers of their own, on free loopback ports.
set -eu
missing=
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgresql"
command -v pgbackrest >/dev/null || missing="$missing pgbackrest"
command -v redis-server >/dev/null || missing="$missing redis-server"
PATH="$PATH:/usr/sbin" command -v nginx >/dev/null || missing="$missing nginx"
PATH="$PATH:/usr/sbin" command -v haproxy >/dev/null || missing="$missing haproxy"
command -v promtool >/dev/null || missing="$missing prometheus"
for name in alertmanager blackbox-exporter node-exporter postgres-exporter redis-exporter; do
  command -v "prometheus-$name" >/dev/null || missing="$missing prometheus-$name"
done
command -v chromium >/dev/null || missing="$missing chromium fonts-dejavu-core"
{ command -v gcc && [ -e /usr/include/stdlib.h ]; } >/dev/null || missing="$missing gcc libc6-dev"
PATH="$PATH:/usr/sbin" command -v nft >/dev/null || missing="$missing nftables"
PATH="$PATH:/usr/sbin" command -v iptables >/dev/null || missing="$missing iptables"
command -v ip >/dev/null || missing="$missing iproute2"
command -v curl >/dev/null || missing="$missing curl"
command -v node >/dev/null || missing="$missing nodejs"
command -v chromedriver >/dev/null || missing="$missing chromium-driver"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "The tests need these Debian packages:$missing. Install them, or run this as root on Debian or Ubuntu." >&2
  exit 1
fi
echo "== packages:$missing"
if [ ! -e /usr/sbin/policy-rc.d ]; then
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
  chmod 0755 /usr/sbin/policy-rc.d
fi
apt-get update -q >/dev/null
# shellcheck disable=SC2086  # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >/dev/null
