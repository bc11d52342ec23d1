"""Which methods a path takes. The router's own 405 names those of one of its routes only."""

from fastapi import Request
from fastapi.routing import iter_route_contexts
from starlette.routing import compile_path


def allowed_methods(request: Request) -> str:
    """List the methods of every route to the request's path, for the Allow header."""
    path = request.scope["path"]
    found: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        pattern, _, _ = compile_path(route.path or "")
        if route.methods and pattern.match(path):
            found |= set(route.methods)
    return ", ".join(sorted(found))
