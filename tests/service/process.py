"""The service as a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def service(**environment: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address(process: "subprocess.Popen[str]") -> str:
    """Read the log up to the line that says where the service listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            return address_in(line)
    raise AssertionError("the service ended without listening")


def address_in(line: str) -> str:
    """Read the line that says where the service listens, in either format."""
    found = re.search(r'listening on (http://[^\s"]+)', line)
    assert found, f"no address in {line!r}"
    return found.group(1)
