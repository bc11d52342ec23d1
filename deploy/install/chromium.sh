#!/bin/sh
# Install the browser that the tests of web pages drive, unless there is one: deploy/install/chromium.sh
#
# Playwright would download a browser of its own; Debian's does the same and comes with the security
# updates of the machine. CHROMIUM names another executable.
set -eu
. "$(dirname "$0")/apt.sh"

if [ -n "${CHROMIUM:-}" ]; then
    [ -x "$CHROMIUM" ] || fail "CHROMIUM is $CHROMIUM, which is no executable file; unset it or name a browser"
    exit 0
fi
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then
        exit 0
    fi
done
apt_install "the tests of web pages need a browser" chromium fonts-dejavu-core
