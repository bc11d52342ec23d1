#!/bin/sh
# Sees to a C++ compiler where the development tools need one: deploy/compiler.sh VENV
#
# en_dtypes, the other implementation of HiFloat8 that the tests compare ours with, has no wheel for
# the newest Pythons; pip then builds it. Everything else comes as wheels.
set -eu
. "$(dirname "$0")/apt.sh"
python=$1/bin/python

if "$python" -m pip install --quiet --dry-run --no-deps --only-binary=:all: en_dtypes -c constraints.txt >/dev/null 2>&1; then
    exit 0
fi

can_compile() {
    command -v c++ >/dev/null 2>&1 &&
        "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
can_compile || apt_install "en_dtypes has to be compiled for Python $version" g++ "python$version-dev"
