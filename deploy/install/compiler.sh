#!/bin/sh
# Install a C++ compiler if the development tools need one: deploy/install/compiler.sh VENV
#
# en_dtypes, the HiFloat8 implementation that the tests compare ours with, has no wheel for the newest
# Python versions; pip then compiles it. All other packages have wheels.
#
# A compiler is installed only if it is certainly needed. If the package index cannot be reached, it
# is unknown whether there is a wheel; this script then does nothing, and pip, which runs next, fails
# with its own error.
set -eu
. "$(dirname "$0")/apt.sh"
python=$1/bin/python

can_compile() {
    command -v c++ >/dev/null 2>&1 &&
        "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

has_package() {
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("en_dtypes") is None)'
}

has_wheel() {
    "$python" -m pip install --quiet --dry-run --no-deps --only-binary=:all: en_dtypes -c constraints.txt >/dev/null 2>&1
}

index_answers() {
    "$python" -m pip index versions en_dtypes >/dev/null 2>&1
}

if can_compile || has_package || has_wheel || ! index_answers; then
    exit 0
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
apt_install "en_dtypes has to be compiled for Python $version" g++ "python$version-dev"
