#!/bin/sh
# Makes the virtual environment that every make target works in: deploy/install/venv.sh PYTHON FOLDER
#
# Debian and Ubuntu ship a python3 without ensurepip, so a fresh machine cannot make one. Then the
# missing package is installed with apt-get where that is possible, else named in one clear line.
set -eu
. "$(dirname "$0")/apt.sh"
python=$1
folder=$2

command -v "$python" >/dev/null 2>&1 ||
    fail "$python was not found: install Python 3.11 or newer, or name one, as in: make PYTHON=/path/to/python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is Python $version and 3.11 or newer is needed; name one, as in: make PYTHON=/path/to/python3.12"

# An environment that works is kept: making it again would mean installing everything again.
if "$folder/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    exit 0
fi

can_make_venv() {
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1
}

reason="$python cannot make virtual environments"
can_make_venv || apt_install "$reason" "python$version-venv"
can_make_venv || fail "$reason, though python$version-venv is installed"
"$python" -m venv --clear "$folder"
