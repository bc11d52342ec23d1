#!/bin/sh
# Makes the virtual environment that every make target works in: deploy/venv.sh PYTHON FOLDER
#
# Debian and Ubuntu ship a python3 without ensurepip, so a fresh machine cannot make one. Then the
# missing package is installed with apt-get where that is possible, else named in one clear line.
set -eu
python=$1
folder=$2

fail() {
    echo "error: $*" >&2
    exit 1
}

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

if ! can_make_venv; then
    package=python$version-venv
    remedy="$python cannot make virtual environments: install the package $package"
    command -v apt-get >/dev/null 2>&1 || fail "$remedy"
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif command -v sudo >/dev/null 2>&1; then
        as_root=sudo
    else
        fail "$remedy, as root: apt-get install $package"
    fi
    echo "installing $package, which $python needs to make virtual environments"
    $as_root apt-get update -q || fail "$remedy (apt-get update failed)"
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$package" ||
        fail "$remedy (apt-get install failed)"
    can_make_venv || fail "$remedy (it was installed and did not help)"
fi

"$python" -m venv --clear "$folder"
