"""Refuse query parameters that a route does not have, as unknown fields of a body are refused.

A misspelt `?stat=queued` would otherwise list all jobs.
"""

from fastapi import Request

from jobs.errors import InvalidSpec, Violation
from jobs.violations import shown

MAX_LISTED = 20
"""How many unknown parameters an error lists."""


def refuse_unknown_parameters(request: Request) -> None:
    """Refuse parameters that the OpenAPI document does not describe.

    Health checks and metrics are not asked to: they answer whatever is appended to their address.

    Raises:
        InvalidSpec: has each unknown parameter.
    """
    if not request.scope["query_string"]:
        return
    path = request.app.openapi()["paths"].get(request.scope["route"].path, {})
    method = "get" if request.method == "HEAD" else request.method.lower()
    if method not in path:
        return  # not an address of the API
    described = path[method].get("parameters", [])
    known = [each["name"] for each in described if each["in"] == "query"]
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        names = f"the parameters are {', '.join(known)}" if known else "it takes no parameters"
        bound = f"one of {', '.join(known)}" if known else "nothing"
        raise InvalidSpec([_violation(name, bound, names) for name in unknown[:MAX_LISTED]])


def _violation(name: str, bound: str, names: str) -> Violation:
    field = str(shown(name))
    detail = f"{field or 'The empty name'} is not a query parameter of this address; {names}."
    return Violation(field, None, bound, detail)
