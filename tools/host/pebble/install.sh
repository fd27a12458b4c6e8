#!/bin/sh
# Makes Pebble the ACME CA of a test host. Run once as root while the host's image is built, with Debian's `pebble`, `openssl` and
# `python3` installed.
#
#   ACME directory     https://127.0.0.1:14000/dir     (nginx_certbot_acme_directory)
#   CA of that API     /etc/pebble/ca.pem              (nginx_certbot_acme_ca)
#   roots to trust     /var/lib/pebble/roots.pem       (curl --cacert, for the certificates that Pebble issues)
#
# Pebble keeps nothing: every start makes a new root (https://127.0.0.1:15000/roots/0) and forgets all accounts. roots.pem keeps the
# roots of all starts, so a certificate from before a reboot still verifies. To renew after a restart of Pebble, first remove
# /etc/letsencrypt/accounts/127.0.0.1:14000.
#
# Pebble looks at port 80 of the name itself, so the name must lead to the host: put it into /etc/hosts as 127.0.0.1.
set -eu
here=$(dirname "$(readlink -f "$0")")

install -d -m 0755 /etc/pebble /usr/local/lib/pebble
install -m 0644 "$here/pebble.json" /etc/pebble/pebble.json
install -m 0644 "$here/remember_root.py" /usr/local/lib/pebble/remember_root.py
install -m 0644 "$here/pebble.service" /etc/systemd/system/pebble.service

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj "/CN=Test host ACME API" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign \
    -keyout "$work/ca.key" -out /etc/pebble/ca.pem
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=127.0.0.1" \
    -keyout /etc/pebble/key.pem -out "$work/cert.csr"
printf '%s\n' subjectAltName=IP:127.0.0.1,DNS:localhost authorityKeyIdentifier=keyid extendedKeyUsage=serverAuth >"$work/cert.ext"
openssl x509 -req -in "$work/cert.csr" -CA /etc/pebble/ca.pem -CAkey "$work/ca.key" -days 3650 -extfile "$work/cert.ext" \
    -out /etc/pebble/cert.pem
# Readable by all: the unit runs under a user that exists only while it runs, and the key guards a test.
chmod 0644 /etc/pebble/*.pem
systemctl enable pebble.service
