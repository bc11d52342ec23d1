"""Files read straight into a CUDA device's memory, by a library's threads.

Python's own threads hold each other up at the interpreter's lock, the more so the more of them
there are and the more else the process does. The threads of fastsafetensors never take it: each
reads into one of its two pinned buffers while the other travels (docs/decisions/013).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

THREADS = 12
BUFFER_BYTES = 4 << 20
"""Of each of a thread's two: all of them together stay in the processor's cache on the way."""


class FileReader:
    """Fills parts of a device's memory with parts of files, whichever thread of its own is free."""

    def __init__(self, device: torch.device) -> None:
        """Pin the buffers and start the threads, which takes some 50 ms.

        Args:
            device: an NVIDIA card with an index, or the host, where the library has threads, too.

        Raises:
            ImportError: fastsafetensors is not installed, or not for this Python.
            RuntimeError: it does not find CUDA.
        """
        # Of the extra `cuda`: elsewhere it need not be installed.
        from fastsafetensors import cpp  # noqa: PLC0415

        self._library: Any = cpp
        self._on_card = device.type == "cuda"
        if self._on_card:
            version = (torch.version.cuda or "").partition(".")[0]
            cpp.load_library_functions(f"libcudart.so.{version}")  # the one that torch has loaded
            if not cpp.is_cuda_found():
                raise RuntimeError(f"fastsafetensors does not find libcudart.so.{version}")
        cpp.set_gil_release(True)
        size = 2 * THREADS * BUFFER_BYTES >> 10
        index = device.index if self._on_card else -1
        self._reader = cpp.nogds_file_reader(False, size, THREADS, self._on_card, index)

    def begin(self, file: int, start: int, nbytes: int, address: int) -> int:
        """Have bytes of an open file read, from `start` on, and return the number to wait for.

        Before, whatever the device has to do with the memory so far is waited for.

        Args:
            address: of the device's memory for them, to be kept until `wait` has returned.
        """
        memory = self._library.gds_device_buffer(address, nbytes, self._on_card)
        number: int = self._reader.submit_read(file, memory, start, nbytes, 0)
        return number

    def wait(self, number: int) -> bool:
        """Wait until the bytes have arrived; False if they have not."""
        return bool(self._reader.wait_read(number))


@lru_cache(maxsize=8)
def file_reader(device: torch.device) -> FileReader | None:
    """The process' reader for a device, made once; None where there is none for it."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        return FileReader(device)
    except (ImportError, RuntimeError) as error:
        logger.info("%s: weights are read by Python's threads, which takes longer", error)
        return None
