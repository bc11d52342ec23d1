#!/bin/sh
# Fetch Ray for `make test-ray`: deploy/install/ray.sh VENV
#
# It goes into a folder of its own, VENV/ray-2.60, with what it needs, in the versions of
# constraints.txt. Processes that need it name the folder in PYTHONPATH.
set -eu
folder=$1/ray-2.60

rm -rf "$folder"
"$1/bin/python" -m pip install --disable-pip-version-check --quiet --only-binary=:all: \
    --target "$folder" -c constraints.txt "ray==2.60.0"
