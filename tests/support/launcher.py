"""Run the launcher for end-to-end tests, in a separate process as a user would.

Every process of a run has a mark in its environment, so that one left behind is found.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from deploy.local.child_process import MARK, marked_processes
from deploy.local.stack import ROOT
from deploy.local.waiting import wait_until


class Launcher:
    """`python -m deploy.local …` running in the background; killed at the end of the block."""

    def __init__(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", *arguments],
            cwd=ROOT,
            env=os.environ | {MARK: self.mark, "WORKER_THREADS": "2"},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def read_until(self, text: str) -> str:
        """Return the output up to the line with `text`; fail when the output ends before it."""
        assert self.process.stdout is not None
        output = ""
        for line in self.process.stdout:
            output += line
            if text in line:
                return output
        raise AssertionError(f"ended with {self.process.wait()} before {text!r}:\n{output}")

    def finish(self, limit_s: float = 120) -> tuple[int, str]:
        """Wait for the end; return the exit code and the rest of the output."""
        rest, _ = self.process.communicate(timeout=limit_s)
        return self.process.returncode, rest

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def processes(self) -> dict[int, str]:
        """Find every live process of this run, the launcher included: command lines by pid."""
        return marked_processes(self.mark)

    def wait_until_nothing_is_left(self, limit_s: float = 10) -> None:
        wait_until(
            lambda: not self.processes(),
            limit_s,
            "nothing is left behind",
            lambda: str(self.processes()),
            every_s=0.05,
        )


def run(*arguments: str, limit_s: float = 240) -> tuple[int, str]:
    """Run the launcher and check that no process is left; return its exit code and output."""
    with Launcher(*arguments) as launcher:
        result = launcher.finish(limit_s)
        launcher.wait_until_nothing_is_left()
        return result


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def describe_video(path: Path) -> tuple[str, int]:
    """Return ffmpeg's description of the video stream, and the number of frames it decodes."""
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "null", "-"],
        capture_output=True,
        text=True,
        check=True,
    )
    stream = re.search(r"Stream #0:0.*?: Video: (.*)", done.stderr)
    frames = re.findall(r"frame=\s*(\d+)", done.stderr)
    assert stream is not None
    return stream.group(1), int(frames[-1])


def decode_video(path: Path, width: int = 96, height: int = 96) -> NDArray[np.uint8]:
    """Decode the frames of a video file: [F, H, W, 3] uint8."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    arguments = ["-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([ffmpeg, *arguments], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
