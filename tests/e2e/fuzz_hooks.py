"""Keep a fuzzing run's own key alive: schemathesis loads this (tests/e2e/test_contract.py).

It learns names of keys from answers, and then rotates and revokes them. With its own key gone, all
that follows would be 401, and the run would pass without having tested anything.
"""

from typing import Any

import schemathesis

KEY = "fuzz"
"""The name of the key that the run uses."""


@schemathesis.hook
def before_call(_context: object, case: schemathesis.Case[Any], _kwargs: dict[str, Any]) -> None:
    """Let what is about the run's own key be about another one."""
    if case.path.startswith("/keys/") and case.path_parameters.get("name") == KEY:
        case.path_parameters["name"] = "bob"
