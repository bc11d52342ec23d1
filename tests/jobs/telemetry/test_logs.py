"""Test the log lines that a process writes to stderr."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs.telemetry.logs import LogFormat

PROGRAM = """
import logging, sys
from jobs.telemetry.logs import LogFormat, configure

ids = {"worker_id": "w-1", "job_id": "01a2"}
configure(LogFormat(sys.argv[1]), lambda: ids, quiet=("noisy",))
configure(LogFormat(sys.argv[1]), lambda: ids, quiet=("noisy",))  # not doubled
logging.getLogger("a.b").info("ünder %d way\\nand more", 3, extra={"status": 202})
logging.getLogger("a.b").debug("too fine")
logging.getLogger("noisy").info("chatter")
logging.getLogger("noisy").warning("trouble", extra={"color_message": "red"})
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("a.b").exception("odd")
ids.clear()
logging.getLogger("a.b").info("outside of any job")
"""


def lines(log_format: LogFormat) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(LogFormat.JSON)]


def test_json_is_one_object_per_line(objects: list[dict[str, Any]]) -> None:
    assert [each["message"] for each in objects] == [
        "ünder 3 way\nand more",
        "trouble",
        "odd",
        "outside of any job",
    ]
    assert [each["level"] for each in objects] == ["INFO", "WARNING", "ERROR", "INFO"]
    assert [each["logger"] for each in objects] == ["a.b", "noisy", "a.b", "a.b"]


def test_json_has_time_ids_and_extra_fields(objects: list[dict[str, Any]]) -> None:
    first, _, _, last = objects
    assert set(first) == {"time", "level", "logger", "message", "worker_id", "job_id", "status"}
    assert (first["worker_id"], first["job_id"], first["status"]) == ("w-1", "01a2", 202)
    at = datetime.fromisoformat(first["time"])
    assert at.utcoffset() == timedelta()
    assert datetime.now(UTC) - at < timedelta(minutes=2)
    assert set(last) == {"time", "level", "logger", "message"}, "no ids where there are none"


def test_json_keeps_tracebacks_and_drops_what_is_for_terminals(
    objects: list[dict[str, Any]],
) -> None:
    _, trouble, odd, _ = objects
    assert odd["exception"].endswith("ZeroDivisionError: division by zero")
    assert "color_message" not in trouble


def test_text_format() -> None:
    first, rest, trouble, *traceback, last = lines(LogFormat.TEXT)
    assert first.endswith(" INFO a.b [w-1 01a2] ünder 3 way")
    assert rest == "and more"
    assert trouble.endswith(" WARNING noisy [w-1 01a2] trouble")
    assert traceback[-1] == "ZeroDivisionError: division by zero"
    assert last.endswith(" INFO a.b [-] outside of any job")


FORGED = "203.0.113.9\n2026-11-30 00:00:00 INFO forged\r\x1b[2J\x7f\x85\u2028\u202e\ud800\x00\x08"


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_values_from_outside_cannot_break_a_line_or_move_a_cursor(log_format: LogFormat) -> None:
    program = f"""
import logging, sys
from jobs.telemetry.logs import LogFormat, configure
configure(LogFormat(sys.argv[1]), dict)
logging.getLogger("a").warning("from %s, %(x)s".replace("%(x)s", "%r"), {FORGED!r}, {FORGED!r})
logging.getLogger("a").warning("from %(who)s", {{"who": {FORGED!r}}})
"""
    done = subprocess.run(
        [sys.executable, "-c", program, log_format], capture_output=True, check=True, timeout=60
    )
    text = done.stderr.decode()
    assert len(text.splitlines()) == 2
    assert all(line.isprintable() for line in text.splitlines())
    assert text.count("203.0.113.9") == 3
    if log_format is LogFormat.TEXT:
        assert (
            r"\n2026-11-30 00:00:00 INFO forged\r\x1b[2J\x7f\x85\u2028\u202e\ud800\x00\x08" in text
        )
