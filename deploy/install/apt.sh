# Install Debian packages if possible, otherwise name them; sourced by the other scripts here.

fail() {
    echo "error: $*" >&2
    exit 1
}

# apt_install REASON PACKAGE…   exits with a one-line error if it cannot install them
apt_install() {
    reason=$1
    shift
    remedy="$reason: install the packages $*"
    command -v apt-get >/dev/null 2>&1 || fail "$remedy"
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif command -v sudo >/dev/null 2>&1; then
        as_root=sudo
    else
        fail "$remedy, as root: apt-get install $*"
    fi
    echo "$reason; installing $*"
    # Scripts that make runs at the same time wait for each other here.
    exec 9<"$(dirname "$0")/apt.sh"
    command -v flock >/dev/null 2>&1 && flock 9
    $as_root apt-get update -q || fail "$remedy (apt-get update failed)"
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" ||
        fail "$remedy (apt-get install failed)"
}
