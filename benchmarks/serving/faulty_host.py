"""Give a worker of a cluster a host of its own, whose scratch folder, ffmpeg and share can fail."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg


class FaultyHost:
    """The temporary folder and the ffmpeg of one worker."""

    def __init__(self, folder: Path) -> None:
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True)
        self._ffmpeg = folder / "ffmpeg"
        self.mend()

    @property
    def environment(self) -> dict[str, str]:
        """What the worker gets in its environment."""
        return {"TMPDIR": str(self.tmp), "IMAGEIO_FFMPEG_EXE": str(self._ffmpeg)}

    def remove_scratch(self) -> int:
        """Remove the worker's scratch folder, as a cleaner of /tmp does; return how many went."""
        found = list(self.tmp.glob("wan-worker-*"))
        for each in found:
            shutil.rmtree(each, ignore_errors=True)
        return len(found)

    def break_ffmpeg(self) -> None:
        """Replace ffmpeg by `false`."""
        self._replace(shutil.which("false") or "/bin/false")

    def mend(self) -> None:
        """Put ffmpeg back."""
        self._replace(imageio_ffmpeg.get_ffmpeg_exe())

    def _replace(self, program: str) -> None:
        script = self._ffmpeg.with_suffix(".new")
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(program)} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        script.replace(self._ffmpeg)  # at once: a script must not change while it is read


class Share:
    """What one host sees of an artifact store: mounted, missing, or another in its place."""

    def __init__(self, mount_point: Path) -> None:
        self.mount_point = mount_point
        mount_point.mkdir(parents=True)

    @staticmethod
    def can_mount() -> bool:
        """Return whether this user may mount: only root."""
        return os.geteuid() == 0

    @property
    def environment(self) -> dict[str, str]:
        """What the worker gets in its environment."""
        return {"ARTIFACTS_URL": self.mount_point.as_uri()}

    def mount(self, store: Path) -> None:
        """Show `store` at the mount point."""
        subprocess.run(["mount", "--bind", store, self.mount_point], check=True)

    def unmount(self) -> None:
        """Show the latest store no more, also to processes that have files of it open."""
        self._unmount().check_returncode()

    def unmount_all(self) -> None:
        """Show nothing."""
        while self._unmount().returncode == 0:
            pass

    def _unmount(self) -> subprocess.CompletedProcess[bytes]:
        command = ["umount", "--lazy", str(self.mount_point)]
        return subprocess.run(command, capture_output=True, check=False)
