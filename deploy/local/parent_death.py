"""Runs a command that the kernel kills when the launcher dies: parent_death.py LAUNCHER_PID
COMMAND…

A launcher that ends in order stops its children itself. One that is killed outright cannot, and
Valkey and the worker would live on. On Linux a process can ask for a signal at its parent's
death, and the request survives exec but not fork, so it is made here, between the two.
Elsewhere the command simply runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the request was made
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
