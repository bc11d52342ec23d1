"""Keep what a fuzzing run lives on: schemathesis loads this (tests/e2e/test_contract.py).

It learns names of keys and ids of workers from answers, and then rotates, revokes and drains them.
With its own key gone, all that follows would be 401, and the run would pass without having tested
anything. With every worker drained, jobs would be refused with 503, which is right, and which it
would report as a server error.
"""

import os
from typing import Any

import schemathesis

KEY = "fuzz"
"""The name of the key that the run uses."""

KEPT_WORKER = "FUZZ_KEPT_WORKER"
"""The environment variable with the id of the worker that is not drained; others are."""


@schemathesis.hook
def before_call(_context: object, case: schemathesis.Case[Any], _kwargs: dict[str, Any]) -> None:
    """Let what is about the run's own key, or the worker that it keeps, be about another one."""
    if case.path.startswith("/keys/") and case.path_parameters.get("name") == KEY:
        case.path_parameters["name"] = "bob"
    worker = case.path_parameters.get("worker_id")
    if case.path.startswith("/workers/") and worker == os.environ[KEPT_WORKER]:
        case.path_parameters["worker_id"] = "fake.0123456789ab"
