"""Log what operators change over HTTP: who, with which key, did what. Never a secret."""

import logging

from service.auth.gate import Principal

logger = logging.getLogger("service.audit")


def note(principal: Principal, did: str) -> None:
    """Write a line like `alice (key 0123456789ab) revoked the key of bob`."""
    logger.info("%s (key %s) %s", principal.name, principal.id, did)
