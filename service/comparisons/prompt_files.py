"""Read prompts from a file: TXT with a prompt on each line, or CSV with a header.

Nothing is guessed or left out in silence: a file that cannot be taken as it is, is refused, with
the line and the reason of each fault.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from jobs.errors import InvalidSpec, Violation
from jobs.spec import MAX_SEED
from jobs.violations import shown
from service.comparisons.model import MAX_PROMPTS

MAX_LINE_CHARS: Final = 10_000
"""Far above the longest prompt that any model takes."""

MAX_SEEDS: Final = 100
"""The most seeds of one prompt."""

MOST_FAULTS: Final = 20
"""A refusal names so many lines, and the number of the others."""

COLUMNS: Final = ("prompt", "negative_prompt", "seed", "seeds")
_DELIMITERS: Final = (",", ";", "\t")
_LINE_END = re.compile(r"\r\n|\r|\n")
_SEPARATOR = re.compile(r"[\s,;|]+")
_SAVE = "save the file as UTF-8"


@dataclass(frozen=True, slots=True)
class PromptLine:
    """A prompt as it was given.

    Attributes:
        line: where it begins in its file, from 1.
        negative_prompt: None if it has none of its own.
        seeds: None if it has none of its own.
    """

    line: int
    prompt: str
    negative_prompt: str | None = None
    seeds: tuple[int, ...] | None = None


class _Fault(Exception):
    """A line that is refused."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line
        self.why = why


def read_prompts(name: str, content: bytes | str) -> tuple[PromptLine, ...]:
    """Read the prompts of a file, by the ending of its name: `.csv` or `.txt`.

    Raises:
        InvalidSpec: the file is refused; each violation says the line and the reason.
    """
    ending = name.lower().rpartition(".")[2]
    if ending not in ("csv", "txt"):
        detail = f"{shown(name)} is neither CSV nor TXT; save the prompts as .csv or .txt."
        raise InvalidSpec.of("prompts_file.name", shown(name), "a name that ends so", detail)
    try:
        text = content.removeprefix("\ufeff") if isinstance(content, str) else _decoded(content)
        lines = _lines(text)
        rows = list(_csv_rows(lines) if ending == "csv" else _txt_rows(lines))
    except _Fault as fault:
        raise InvalidSpec([_violation(fault)]) from None
    if len(rows) > MAX_PROMPTS:
        line = rows[MAX_PROMPTS][0]
        why = f"is one too many: there are {len(rows)} prompts, and {MAX_PROMPTS} are the most"
        raise InvalidSpec([_violation(_Fault(line, why))])
    return _read(rows)


def parse_seeds(text: str) -> tuple[int, ...] | None:
    """Read seeds that are separated by spaces, commas, semicolons or bars; None for none.

    Raises:
        ValueError: one of them is not a seed, or is there twice; the message says which.
    """
    words = [word for word in _SEPARATOR.split(text.strip()) if word]
    for word in words:
        if not re.fullmatch(r"[0-9]{1,19}", word) or int(word) > MAX_SEED:
            raise ValueError(f"has {shown(word)}, which is no whole number from 0 to {MAX_SEED}")
    seeds = tuple(map(int, words))
    check_seeds(seeds)
    return seeds or None


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError, which says why, if the seeds of a prompt are too many or not different."""
    if len(seeds) > MAX_SEEDS:
        raise ValueError(f"has {len(seeds)} seeds, and {MAX_SEEDS} are the most for a prompt")
    twice = [seed for number, seed in enumerate(seeds) if seed in seeds[:number]]
    if twice:
        raise ValueError(f"has the seed {twice[0]} twice, which would make the same pair twice")


_Row = tuple[int, dict[str, str]]


def _read(rows: Sequence[_Row]) -> tuple[PromptLine, ...]:
    """Turn rows into prompts; all faults are reported at once."""
    if not rows:
        raise InvalidSpec([_violation(_Fault(1, "is the end: there are no prompts in the file"))])
    prompts, faults = [], []
    first: dict[tuple[str, str | None], int] = {}
    for line, cells in rows:
        try:
            prompts.append(_prompt(line, cells, first))
        except _Fault as fault:
            faults.append(fault)
    if faults:
        violations = [_violation(fault) for fault in faults[:MOST_FAULTS]]
        more = len(faults) - MOST_FAULTS
        if more > 0:
            detail = f"{more} more lines of the file are refused."
            violations.append(Violation("prompts_file", None, "lines that can be read", detail))
        raise InvalidSpec(violations)
    return tuple(prompts)


def _prompt(
    line: int, cells: dict[str, str], first: dict[tuple[str, str | None], int]
) -> PromptLine:
    prompt = cells["prompt"].strip()
    if not prompt:
        raise _Fault(line, "has no prompt; write one, or remove the line")
    negative = cells.get("negative_prompt", "").strip() or None
    known = first.setdefault((prompt, negative), line)
    if known != line:
        raise _Fault(line, f"repeats the prompt of line {known}; give that line more seeds instead")
    try:
        seeds = parse_seeds(cells.get("seeds", cells.get("seed", "")))
    except ValueError as error:
        raise _Fault(line, str(error)) from None
    if "seed" in cells and seeds is not None and len(seeds) > 1:
        raise _Fault(line, "has several seeds in the column seed; call the column seeds")
    return PromptLine(line, prompt, negative, seeds)


def _txt_rows(lines: Sequence[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        yield number, {"prompt": line}


def _csv_rows(lines: Sequence[str]) -> Iterator[_Row]:
    if not lines:
        return
    delimiter = max(_DELIMITERS, key=lines[0].count)
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            why = f"cannot be read as CSV ({error}); check its quotes: one that is part of a text "
            raise _Fault(start, why + "is written twice, inside of quotes") from None
        if cells is None:
            return
        if header is None:
            header = _checked_header(cells)
        elif len(cells) not in (0, len(header)):
            why = f"has {len(cells)} columns, and the header has {len(header)}; put a text with "
            raise _Fault(start, f"{why}{delimiter!r} in it between double quotes")
        else:
            yield start, dict(zip(header, cells or [""] * len(header), strict=True))
        start = reader.line_num + 1


def _checked_header(cells: Sequence[str]) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    known = ", ".join(COLUMNS)
    if "prompt" not in header:
        raise _Fault(1, f"has no column prompt; the first line names the columns: {known}")
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise _Fault(1, f"names the column {shown(unknown[0])}, which is none of {known}")
    if len(set(header)) < len(header) or {"seed", "seeds"} <= set(header):
        raise _Fault(1, "names a column twice; seed and seeds are the same")
    return header


def _lines(text: str) -> list[str]:
    """Split a text into lines, without the empty ones at its end; refuse overlong ones."""
    lines = _LINE_END.split(text)
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_CHARS:
            raise _Fault(number, f"has {len(line)} characters, and {MAX_LINE_CHARS} are the most")
        if "\0" in line:
            raise _Fault(number, f"has the character U+0000, so the file is no text; {_SAVE}")
    return lines


def _decoded(content: bytes) -> str:
    """Decode UTF-8, UTF-16 with its byte order mark, or Latin-1; refuse everything else."""
    for mark, codec in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if content.startswith(mark):
            try:
                return content[2:].decode(codec)
            except UnicodeDecodeError as error:
                before = content[2 : 2 + error.start].decode(codec, "replace")
                line = len(_LINE_END.split(before))
                raise _Fault(line, f"cannot be read as UTF-16 ({error.reason}); {_SAVE}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        faulty = error
    # Latin-1 gives every byte a character. It is believed only of a file that has no character in
    # UTF-8 and none of the control characters which Latin-1 has where others have quotes.
    has_utf8 = re.search(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}", content)
    control = re.search(rb"[\x80-\x9f]", content)
    if has_utf8 or control:
        at = faulty.start if has_utf8 or not control else control.start()
        line = len(_LINE_END.split(content[:at].decode("latin-1")))
        why = f"has the byte 0x{content[at]:02X}, which is neither UTF-8 nor Latin-1; {_SAVE}"
        raise _Fault(line, why)
    return content.decode("latin-1")


def _violation(fault: _Fault) -> Violation:
    bound = "TXT with a prompt on each line, or CSV with a column prompt"
    return Violation("prompts_file", None, bound, f"Line {fault.line} {fault.why}.")
