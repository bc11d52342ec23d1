"""Read and check calibration prompts, one per line, before hours are spent on them."""

from __future__ import annotations

import codecs
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.errors import CalibrationError

MIN_PROMPTS = 8
_LINE_END = re.compile(r"\r\n|\n|\r")
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Blank, although Unicode calls them letters or symbols: Hangul fillers, empty Braille pattern."""


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
                f"{self.file} holds {len(self.prompts)} prompts, at least {MIN_PROMPTS} are "
                "needed: write one prompt per line"
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

        Only LF, CRLF and CR end a line. Other separators of Unicode (U+2028, U+2029) stay within
        their prompt, where the pipeline reads them as blanks. A byte order mark is ignored.

        Raises:
            CalibrationError: there is no such file, or it is not UTF-8; or a line, which is named,
                holds a control character or a prompt without any visible one; or the prompts are
                too few or not distinct.
        """
        try:
            text = _decoded(path.read_bytes(), path)
        except OSError as error:
            raise CalibrationError(f"cannot read prompts from {path}: {error.strerror}") from error
        lines = [line.strip(" \t") for line in _LINE_END.split(text)]
        _check_lines(lines, path)
        prompts = tuple(line.strip() for line in lines if line.strip())
        return cls(prompts, path.name if path.is_absolute() else path.as_posix())

    def first(self, count: int) -> PromptSet:
        """Return the set of the first `count` prompts, or this set if it has no more.

        Raises:
            CalibrationError: `count` is too small.
        """
        if count >= len(self.prompts):
            return self
        if count < MIN_PROMPTS:
            raise CalibrationError(
                f"{count} prompts are too few, calibration needs at least {MIN_PROMPTS}"
            )
        return PromptSet(self.prompts[:count], self.file)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 over the prompts joined by newlines, in hexadecimal."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()


def _decoded(data: bytes, path: Path) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CalibrationError(
            f"{path} is not UTF-8 text but UTF-16, as line 1 shows: save it as UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = len(_LINE_END.findall(data[: error.start].decode("latin-1"))) + 1
        raise CalibrationError(
            f"{path} is not UTF-8 text, as byte 0x{data[error.start]:02X} in line {number} shows: "
            "save it as UTF-8"
        ) from error


def _check_lines(lines: Sequence[str], path: Path) -> None:
    """Refuse what the service would refuse in a prompt, too, with the number of the line."""
    # Takes seconds to import, so it is imported only when prompts are really read.
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # noqa: PLC0415

    for number, line in enumerate(lines, start=1):
        control = next((c for c in line if unicodedata.category(c) == "Cc" and c != "\t"), None)
        if control is not None:
            raise CalibrationError(
                f"{path}: line {number} holds the control character U+{ord(control):04X}, which is "
                "not text: remove it, and end lines with a line feed only"
            )
        if line.strip() and not any(map(is_visible, prompt_clean(line))):
            raise CalibrationError(
                f"{path}: line {number}, {line!r}, is blank once the pipeline has read its HTML "
                "entities: remove it, or write what the video shows"
            )


def is_visible(character: str) -> bool:
    """Return whether a reader sees the character; the same rule as the service's."""
    return not (
        character.isspace()
        or character in _BLANKS
        or unicodedata.category(character) in ("Cc", "Cf", "Mn", "Me")
    )
