#!/bin/sh
# Fetch the compiler of Triton's kernels for Ascend 910B: deploy/install/triton_ascend.sh VENV
#
# triton-ascend is installed under Triton's own name, so it goes into a folder of its own,
# VENV/triton-ascend-3.2, and never into the environment itself. The tests name the folder in PYTHONPATH
# for a process of their own. AscendNPU-IR is what it compiles with; only the part for the 910B is kept,
# 300 of 700 MB.
#
# Without a wheel (no network, or none for this Python) one line says so, and the tests that need it
# are skipped with the same line. The stamp VENV/.triton-ascend-3.2 is then not written, so that the next
# `make test` tries again.
set -eu
python=$1/bin/python
folder=$1/triton-ascend-3.2

rm -rf "$folder"
mkdir -p "$folder"
if ! "$python" -m pip install --disable-pip-version-check --quiet --no-deps --only-binary=:all: \
    --target "$folder" triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11==3.1.0 2>"$folder/pip.log"; then
    echo "triton-ascend 3.2.0 could not be fetched: $(tail -n 1 "$folder/pip.log" | cut -c 1-200)" >"$folder/missing"
    echo "the tests that compile for Ascend 910B will be skipped, because $(cat "$folder/missing")"
    rm -rf "$folder/triton"
    exit 0
fi
compiler=$folder/ascendnpuir
rm -f "$compiler"/bin/bishengir-opt* "$compiler"/bin/*-a5 "$compiler"/lib/*.c310.bc
touch "$1/.triton-ascend-3.2"
