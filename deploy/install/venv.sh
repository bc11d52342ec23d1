#!/bin/sh
# Create the virtual environment of all make targets: deploy/install/venv.sh PYTHON FOLDER
#
# Debian and Ubuntu ship a python3 without ensurepip, so a new machine cannot create one. The missing
# package is then installed with apt-get if possible, and otherwise named in a one-line error.
set -eu
. "$(dirname "$0")/apt.sh"
python=$1
folder=$2

command -v "$python" >/dev/null 2>&1 ||
    fail "$python was not found: install Python 3.11 or newer, or name one, as in: make PYTHON=/path/to/python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is Python $version and 3.11 or newer is needed; name one, as in: make PYTHON=/path/to/python3.12"

# Keep a working environment: creating it again would mean installing everything again.
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
