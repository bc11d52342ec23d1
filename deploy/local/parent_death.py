"""Run a command that the kernel kills when the launcher dies.

Usage: parent_death.py LAUNCHER_PID COMMAND…

A launcher that exits normally stops its children itself. If it is killed with SIGKILL, it cannot,
and Valkey and the worker would keep running. On Linux, a process can request a signal for the death
of its parent (PR_SET_PDEATHSIG). That survives exec but not fork, so it is requested here, between
the two. On other systems the command simply runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Request the signal, then replace this process with the command."""
    launcher, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # the launcher died before the request was made
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
