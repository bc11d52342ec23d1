#!/bin/sh
# Make a certificate for Valkey, and the authority that signs it: certificates.sh FOLDER NAME…
#
# FOLDER is for these files alone: it is closed to everybody but you. NAME is what clients call the server; `valkey` in
# compose.yaml. authority.key signs further certificates: keep it elsewhere, or delete it. An authority that is there
# is kept. The certificate is valid for two years; run this again, and restart Valkey.
set -eu
umask 077
[ $# -ge 2 ] || {
    echo "usage: certificates.sh FOLDER NAME…" >&2
    exit 1
}
mkdir -p "$1"
chmod 0700 "$1"
cd "$1"
shift
names=
for name in "$@"; do
    names="$names,DNS:$name"
done
new_key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
# shellcheck disable=SC2086  # words
[ -f authority.pem ] ||
    openssl req -x509 $new_key -keyout authority.key -out authority.pem -days 3650 -subj "/CN=Authority of Valkey" \
        -addext keyUsage=critical,keyCertSign,cRLSign
# shellcheck disable=SC2086
openssl req $new_key -keyout valkey.key -out valkey.csr -subj "/CN=$1"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\nbasicConstraints=critical,CA:FALSE\n' "${names#,}" >valkey.ext
openssl x509 -req -in valkey.csr -CA authority.pem -CAkey authority.key -CAcreateserial -days 730 -extfile valkey.ext \
    -out valkey.pem
rm valkey.csr valkey.ext
# Containers read these as users of their own; the folder keeps others of this machine out.
chmod 0644 authority.pem valkey.pem valkey.key
