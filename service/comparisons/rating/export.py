"""Export every answer with its provenance: CSV with a row for each criterion, or JSON lines.

Spreadsheets run a cell that begins like a formula. Such text gets an apostrophe in front in CSV,
which they take for "this is text"; JSON lines have it as it is.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from service.comparisons.model import Arm, Comparison
from service.comparisons.rating.report import Ballot, outcome_of

Json = dict[str, Any]

FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r", "\n")

ANSWER: Final = (
    *("comparison", "rater_id", "rater", "item", "number", "answered_at", "kind", "is_repeat"),
    *("pair_id", "prompt_id", "prompt", "seed", "reference_job", "candidate_job"),
    *("candidate_side", "skipped", "skip_reason", "left_out"),
)
CHOICE: Final = ("criterion", "choice", "outcome")
PROVENANCE: Final = (
    *("seconds_watched", "frames_seen_left", "frames_seen_right", "replays", "viewport_width"),
    *("viewport_height", "dropped_frames", "speed", "further"),
)
COLUMNS: Final = (*ANSWER, *CHOICE, *PROVENANCE)


def as_csv(comparison: Comparison, given: Iterable[Ballot]) -> Iterator[str]:
    """Yield the lines of a CSV file, the header first, with CRLF as RFC 4180 has it."""
    yield _line(COLUMNS)
    for ballot in given:
        shared = _answer(comparison, ballot) | _provenance(ballot)
        for row in _choices(ballot) or [{}]:
            cells = shared | row
            yield _line(_cell(cells.get(name)) for name in COLUMNS)


def as_jsonl(comparison: Comparison, given: Iterable[Ballot]) -> Iterator[str]:
    """Yield one JSON object for each answer, in a line of its own."""
    for ballot in given:
        record = _answer(comparison, ballot) | {
            "choices": ballot.answer.choices,
            "outcomes": {row["criterion"]: row["outcome"] for row in _choices(ballot)},
            "provenance": ballot.answer.provenance.model_dump(mode="json"),
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _answer(comparison: Comparison, ballot: Ballot) -> Json:
    answer, pair = ballot.answer, ballot.pair
    return {
        "comparison": comparison.id,
        "rater_id": ballot.rater.id,
        "rater": ballot.rater.name,
        "item": answer.item,
        "number": answer.number,
        "answered_at": answer.at.isoformat(),
        "kind": answer.kind.value,
        "is_repeat": answer.is_repeat,
        "pair_id": pair.id,
        "prompt_id": pair.prompt_id,
        "prompt": comparison.prompt(pair.prompt_id).prompt if pair.prompt_id else None,
        "seed": pair.seed,
        "reference_job": pair.half(Arm.REFERENCE).job_id,
        "candidate_job": pair.half(Arm.CANDIDATE).job_id,
        "candidate_side": "left" if answer.candidate_left else "right",
        "skipped": answer.skipped,
        "skip_reason": answer.reason,
        "left_out": ballot.left_out,
    }


def _choices(ballot: Ballot) -> list[Json]:
    answer = ballot.answer
    return [
        {"criterion": name, "choice": choice, "outcome": outcome_of(answer, name).value}
        for name, choice in answer.choices.items()
    ]


def _provenance(ballot: Ballot) -> Json:
    provenance = ballot.answer.provenance
    frames = provenance.frames_seen or (None, None)
    viewport = provenance.viewport or (None, None)
    return {
        "seconds_watched": provenance.seconds_watched,
        "frames_seen_left": frames[0],
        "frames_seen_right": frames[1],
        "replays": provenance.replays,
        "viewport_width": viewport[0],
        "viewport_height": viewport[1],
        "dropped_frames": provenance.dropped_frames,
        "speed": provenance.speed,
        "further": json.dumps(provenance.further) if provenance.further else None,
    }


def _cell(value: object) -> str:
    """Write a value into a cell; text that a spreadsheet would run is marked as text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    is_formula = isinstance(value, str) and text.lstrip(" ").startswith(FORMULA_STARTS)
    return f"'{text}" if is_formula else text


def _line(cells: Iterable[str]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()
