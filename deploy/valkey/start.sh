#!/bin/sh
# Start Valkey with the password in VALKEY_PASSWORD, which then is in no command line: start.sh CONFIGURATION
set -eu
umask 077
[ -n "${VALKEY_PASSWORD:-}" ] || {
    echo "start.sh: VALKEY_PASSWORD is empty; make one with: openssl rand -hex 32" >&2
    exit 1
}
printf 'requirepass %s\n' "$VALKEY_PASSWORD" >/run/valkey/password.conf
unset VALKEY_PASSWORD
exec valkey-server "$1"
