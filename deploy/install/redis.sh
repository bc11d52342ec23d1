#!/bin/sh
# Put a Redis with TLS into the environment, for tests: deploy/install/redis.sh VENV
#
# The embedded Valkey is built without TLS. Debian's redis-tools has the server, too, under another
# name: the package redis-server only adds a link to it, and a service that would start at once.
set -eu
. "$(dirname "$0")/apt.sh"
program=$1/bin/redis-server

find_server() {
    command -v redis-server || command -v redis-check-rdb
}

find_server >/dev/null 2>&1 || apt_install "tests of TLS need a Redis" redis-tools
found=$(find_server) || fail "redis-tools is installed, and there is no redis-check-rdb in PATH"
ln -sf "$found" "$program"
"$program" --version >/dev/null || fail "$found does not run as a Redis server; install redis-server"
