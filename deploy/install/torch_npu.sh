#!/bin/sh
# Fetch torch_npu for the tests on a simulated Ascend card: deploy/install/torch_npu.sh VENV
#
# It goes into a folder of its own, VENV/npu-2.13, and never into the environment itself: whoever
# imports torch there would load it, too. The tests name the folder in PYTHONPATH for processes of
# their own. Of the newest version only the op schemas are kept, to hold our calls to both.
#
# Without a wheel (no network, or none for this Python) one line says so, and the tests that need it
# are skipped with the same line. The stamp VENV/.npu-2.13 is then not written, so that the next
# `make test` tries again.
set -eu
. "$(dirname "$0")/apt.sh"
python=$1/bin/python
folder=$1/npu-2.13
version=2.13.0
newest=2.14.0

pip() {
    "$python" -m pip "$@" --disable-pip-version-check --quiet --no-deps --only-binary=:all: 2>"$folder/pip.log"
}

missing() {
    echo "torch_npu $1 could not be fetched: $(tail -n 1 "$folder/pip.log" | cut -c 1-200)" >"$folder/missing"
    echo "the tests on a simulated Ascend card will be skipped, because $(cat "$folder/missing")"
    rm -rf "$folder/torch_npu"
    exit 0
}

rm -rf "$folder"
mkdir -p "$folder/wheels"
pip install --target "$folder" "torch_npu==$version" || missing "$version"
pip download --dest "$folder/wheels" "torch_npu==$newest" || missing "$newest"
"$python" - "$folder" "$newest" <<'END'
import pathlib, sys, zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,) = (folder / "wheels").glob("*.whl")
schemas = folder / f"schemas-{sys.argv[2]}"
schemas.mkdir()
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if "/csrc/aten/npu_native_functions" in name and name.endswith(".yaml"):
            (schemas / pathlib.PurePosixPath(name).name).write_bytes(archive.read(name))
END
rm -rf "$folder/wheels"

# The tests compile a stand-in for CANN's libraries.
command -v cc >/dev/null 2>&1 || apt_install "the stand-in for CANN has to be compiled" gcc libc6-dev
touch "$1/.npu-2.13"
