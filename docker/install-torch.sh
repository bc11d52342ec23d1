#!/bin/sh
# Install one torch without CUDA: docker/install-torch.sh PYTHON VERSION
#
# It comes from TORCH_INDEX, because PyPI's own for x86-64 brings several GB for GPUs. Its hash is not in requirements/:
# that index has other files than PyPI. TORCH_SHA256, if it is not empty, is the digest that the file must have.
set -eu
python=$1
version=$2
wanted="torch==$version"
options=--no-deps
if [ -n "${TORCH_SHA256:-}" ]; then
    wanted="$wanted --hash=sha256:$TORCH_SHA256"
    options="$options --require-hashes"
fi
# pip takes hashes in files only.
printf '%s\n' "$wanted" >/tmp/torch.txt
# shellcheck disable=SC2086  # options are words
"$python" -m pip install --no-cache-dir --only-binary=:all: $options --index-url "$TORCH_INDEX" -r /tmp/torch.txt
rm /tmp/torch.txt
"$python" -c 'import sys, torch; sys.exit("this torch is built for CUDA" if torch.version.cuda else 0)'
