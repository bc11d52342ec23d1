"""Test that the pages explain every code with which a job can fail."""

import re
from collections.abc import Iterator
from importlib.resources import files

from jobs import errors


def failure_codes() -> Iterator[str]:
    yield errors.AppError.code  # an unexpected error in a worker
    yield errors.RecordUnreadable.code
    pending = [errors.GenerationFailed]
    while pending:
        each = pending.pop()
        pending += each.__subclasses__()
        if each.__module__ == errors.__name__:
            yield each.code


def test_every_code_of_a_failure_is_explained() -> None:
    script = (files("service.pages") / "static" / "demo" / "job_view.js").read_text(
        encoding="utf-8"
    )
    table = re.search(r"const FAILURES = {(.*?)\n};", script, re.DOTALL)
    assert table, "job_view.js has no table of failures"
    explained = re.findall(r'^  (\w+): \["[^"]+", "[^"]+"\],$', table.group(1), re.MULTILINE)
    assert sorted(explained) == sorted(failure_codes())
