"""Test the error tree: distinct codes, details and context."""

import re
from collections.abc import Iterator

import pytest

from jobs import errors
from jobs.errors import AppError, InvalidSpec, Violation


def tree(root: type[AppError] = AppError) -> Iterator[type[AppError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_codes_are_distinct_names() -> None:
    codes = [each.code for each in tree()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_docstring_lists_every_error() -> None:
    assert all(each.__name__ in (errors.__doc__ or "") for each in tree())


def test_context_and_detail() -> None:
    error = errors.JobNotFound("There is no job x.", job_id="x")
    assert (str(error), error.detail, error.context) == (error.detail, str(error), {"job_id": "x"})


def test_invalid_spec_holds_every_violation() -> None:
    found = [Violation(name, 1, "2", f"{name} is 1.") for name in ("a", "b")]
    assert InvalidSpec(found).violations == tuple(found)
    assert str(InvalidSpec(found)) == "a is 1. b is 1."
    assert InvalidSpec.of("a", 1, "2", "a is 1.").violations == (found[0],)
    with pytest.raises(AssertionError):
        InvalidSpec([])
