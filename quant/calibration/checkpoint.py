"""Keep what a calibration has measured so far, so that an interrupted one goes on where it was.

The file lies beside the scales file that will be written. After each prompt it is replaced by the
statistics of all prompts up to that one, with all their bits: the scales are the same whether a
calibration was interrupted or not. It is deleted once the scales are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from quant.calibration.act_statistics import ActivationStatistics
from quant.errors import CalibrationError
from quant.weights.writer import to_bytes, write_whole


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The file of one calibration.

    Attributes:
        path: the file; it need not exist.
    """

    path: Path

    @classmethod
    def beside(cls, scales: Path) -> Checkpoint:
        """Return the checkpoint that belongs to a scales file."""
        return cls(scales.with_name(f"{scales.name}.partial"))

    def restore(self, statistics: ActivationStatistics, identity: Mapping[str, str]) -> int:
        """Put what was kept into `statistics`; return how many prompts it covers, 0 without a file.

        Args:
            identity: what the calibration depends on, by its name for people.

        Raises:
            CalibrationError: the file is damaged, or of another calibration.
        """
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                kept = json.loads((file.metadata() or {})["calibration"])
            done, of = int(kept["prompts_done"]), dict(kept["identity"])
            others = [name for name in identity if of.get(name) != identity[name]]
            if not others:
                statistics.restore(load(self.path.read_bytes()))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CalibrationError(
                f"{self.path} cannot be read, so this calibration cannot go on from it: delete it "
                f"to begin anew ({error})"
            ) from error
        if others:
            raise CalibrationError(
                f"{self.path} holds {done} prompts of a calibration with another "
                f"{' and '.join(others)}: finish that one with its own command, delete the file to "
                "begin anew, or choose another --out"
            )
        return done

    def save(
        self, statistics: ActivationStatistics, done: int, identity: Mapping[str, str]
    ) -> None:
        """Replace the file by the statistics of the first `done` prompts.

        Raises:
            CalibrationError: it cannot be written.
        """
        kept = {"prompts_done": done, "identity": dict(identity)}
        data = to_bytes(statistics.state(), {"calibration": json.dumps(kept)})
        try:
            write_whole(self.path, data)
        except OSError as error:
            raise CalibrationError(
                f"cannot write {self.path}: {error.strerror or error}; make room for it, and the "
                f"same command goes on after prompt {done - 1}"
            ) from error

    def delete(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)
