"""Read from a request's headers who sends it: the key in Authorization, or the session's cookie.

The check against forged requests (`host_check.py`) and the routes (`service/api/deps.py`) use the
same function. So no request is authenticated by a cookie that the check did not see.
"""

from typing import Final

from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from service.auth.gate import Credential
from service.auth.sessions import SessionToken

COOKIE: Final = "wan_session"


def sent_credential(headers: Headers) -> Credential:
    """Return what the caller sent: a key, else a session, else None."""
    key = sent_key(headers)
    return sent_session(headers) if key is None else key


def sent_key(headers: Headers) -> str | None:
    """Return the key in the header Authorization, if there is one."""
    scheme, key = get_authorization_scheme_param(headers.get("authorization"))
    return key if key and scheme.lower() == "bearer" else None


def sent_session(headers: Headers) -> SessionToken | None:
    """Return the session in the cookie, if there is one."""
    cookies = headers.get("cookie")
    text = None if cookies is None else cookie_parser(cookies).get(COOKIE)
    return SessionToken(text) if text else None
