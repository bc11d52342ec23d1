#!/bin/sh
# Run a command with CANN's environment: with-cann COMMAND…
#
# Where CANN's set_env.sh is depends on its version; CANN_ENV names another. systemd's unit uses this, too.
set -eu
for file in "${CANN_ENV:-}" /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
    if [ -n "$file" ] && [ -r "$file" ]; then
        driver=/usr/local/Ascend/driver/lib64
        export LD_LIBRARY_PATH="$driver/common:$driver/driver:${LD_LIBRARY_PATH:-}"
        # It reads variables that are not set, and is written for bash.
        exec bash -c '. "$1"; shift; exec "$@"' with-cann "$file" "$@"
    fi
done
echo "with-cann: there is no set_env.sh of CANN in /usr/local/Ascend; set CANN_ENV to its path" >&2
exit 1
