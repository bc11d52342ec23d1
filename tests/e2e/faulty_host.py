"""Give a worker of a cluster a host of its own, whose scratch folder and ffmpeg can be broken."""

from __future__ import annotations

import shlex
import shutil
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
        self._replace(imageio_ffmpeg.get_ffmpeg_exe())

    def _replace(self, program: str) -> None:
        script = self._ffmpeg.with_suffix(".new")
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(program)} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        script.replace(self._ffmpeg)  # at once: a script must not change while it is read
