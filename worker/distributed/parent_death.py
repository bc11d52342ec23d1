"""Let a rank end with the torchrun that started it.

torchrun ends its ranks when it ends itself, but not when it is killed: each rank leads a session of
its own, so no signal to torchrun's group reaches it. Rank 0 would go on taking jobs, on cards that
somebody else already uses. On Linux a process can ask for a signal at the death of its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

VARIABLE: Final = "TORCHELASTIC_RUN_ID"
"""Set in each rank by torchrun, whose main thread starts the ranks and waits for them. Another
launcher may start them in a thread that ends, which the kernel takes for the death of the parent.
"""

_PR_SET_PDEATHSIG: Final = 1


def end_with_torchrun() -> None:
    """Have the kernel kill this process when its torchrun dies; do nothing without torchrun.

    A torchrun that is dead already has taken the store along through which ranks find each other,
    so this rank ends at its start.
    """
    if sys.platform == "linux" and VARIABLE in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
