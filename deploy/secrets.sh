#!/bin/sh
# Makes what compose.yaml mounts from deploy/secrets:
#
#   deploy/secrets.sh CRITICAL_URL WARNING_URL
#
# Passwords and the key of Prometheus are random; the URLs are the webhooks that alerts go to. What
# is there already stays as it is, so to renew a secret, remove its file and run this again; but
# PostgreSQL takes its password once, when its volume is made, and a container that runs has a new
# file when it is made anew (`up --force-recreate alertmanager`). A client gets its key with
# `hedged keys add deploy/secrets/keys/keys.json NAME --role predict,labels`.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: $0 CRITICAL_URL WARNING_URL" >&2
    exit 2
fi
for url in "$1" "$2"; do
    case $url in
        http://?* | https://?*) ;;
        *)
            echo "$0: $url is no http:// or https:// address" >&2
            exit 2
            ;;
    esac
done

cd "$(dirname "$0")"
umask 022 # containers run as users of their own; the folder is closed to others instead
mkdir -p secrets/keys
chmod 700 secrets
cd secrets

# Write standard input to a file that is not there yet, whole or not at all.
keep() {
    if [ -e "$1" ]; then
        cat >/dev/null
        echo "kept  secrets/$1" >&2
    else
        cat >".$1"
        mv ".$1" "$1"
        echo "made  secrets/$1" >&2
    fi
}

# The same for what the caller gives: where it is not what is there, that must be said.
keep_given() {
    if [ -e "$1" ] && [ "$(cat "$1")" != "$2" ]; then
        echo "kept secrets/$1, which differs: remove it to change it" >&2
    else
        printf '%s\n' "$2" | keep "$1"
    fi
}

random() {
    head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'
}

random | keep postgres-password
random | keep grafana-password
keep_given alerts-critical "$1"
keep_given alerts-warning "$2"
# PostgreSQL's connection service file: what postgresql:///hedged?service=hedged stands for.
keep ledger.conf <<END
[hedged]
host=postgres
port=5432
dbname=hedged
user=hedged
password=$(cat postgres-password)
END
if [ -e prometheus-key ]; then
    echo "kept  secrets/prometheus-key" >&2
else
    # A key that was made before, and whose text is gone, is of no use any more.
    if [ -e keys/keys.json ] &&
        hedged keys list keys/keys.json --json | grep -q '"prometheus"'; then
        hedged keys revoke keys/keys.json prometheus >/dev/null
    fi
    key=$(hedged keys add keys/keys.json prometheus --role metrics 2>/dev/null)
    printf '%s\n' "$key" | keep prometheus-key
fi
chmod 644 keys/keys.json # names, roles and hashes
