"""Read and check calibration prompts, one per line, before hours are spent on them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quant.errors import CalibrationError

MIN_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Distinct prompts, in the order of their file.

    Attributes:
        file: their origin, for people: a relative path, or the file name of an absolute path.
    """

    prompts: tuple[str, ...]
    file: str

    def __post_init__(self) -> None:
        """Check that there are enough prompts and no repetitions.

        Raises:
            CalibrationError: there are too few prompts, or one of them occurs twice.
        """
        if len(self.prompts) < MIN_PROMPTS:
            raise CalibrationError(
                f"{self.file} holds {len(self.prompts)} prompts, calibration needs at least "
                f"{MIN_PROMPTS}: write one prompt per line"
            )
        first_number: dict[str, int] = {}
        for number, prompt in enumerate(self.prompts, start=1):
            if prompt in first_number:
                raise CalibrationError(
                    f"{self.file}: prompt {number} repeats prompt {first_number[prompt]}, "
                    f"{prompt!r}; remove one, repeated prompts add no statistics"
                )
            first_number[prompt] = number

    @classmethod
    def read(cls, path: Path) -> PromptSet:
        """Read a UTF-8 file of one prompt per line; blank lines and outer spaces are ignored.

        Raises:
            CalibrationError: there is no such file, it is not UTF-8, or the prompts are not valid.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CalibrationError(f"cannot read prompts from {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text: {error}") from error
        prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
        return cls(prompts, path.name if path.is_absolute() else path.as_posix())

    @property
    def sha256(self) -> str:
        """Return the SHA-256 over the prompts joined by newlines, in hexadecimal."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
