"""Remember, outside of Redis, that a service once had API keys.

An open service closes when its first key is made. Redis alone cannot keep it closed: after a flush,
an empty restore, or with the number of another database in REDIS_URL, it holds no keys, as if none
had ever been made. So the first process that sees a key leaves an empty file on its machine, under
a name made of ARTIFACTS_URL, which stays the same when Redis is lost. Only a service on loopback
can be open, and its processes are on one machine.
"""

import hashlib
import logging
from enum import StrEnum
from pathlib import Path

logger = logging.getLogger(__name__)


class KeyPolicy(StrEnum):
    """The values of SERVICE_KEYS: when callers of a service on loopback need a key.

    `required`: always. `auto`: unless no key was ever made and the service has no public URL.
    `open`: only while Redis holds a key, revoked ones included, whatever was before.
    """

    REQUIRED = "required"
    AUTO = "auto"
    OPEN = "open"


class KeyMemory:
    """The file that says that the service at this ARTIFACTS_URL had keys."""

    def __init__(self, folder: Path, artifacts_url: str) -> None:
        digest = hashlib.sha256(artifacts_url.encode()).hexdigest()
        self.path = folder / f"had-keys-{digest[:16]}"
        self._is_noted = False

    def had_keys(self) -> bool:
        """Return whether a process has left the file; False if its folder cannot be read."""
        try:
            return self.path.exists()
        except OSError:
            return False

    def note(self) -> None:
        """Leave the file, once. What prevents it is logged, and no reason to refuse a request."""
        if self._is_noted:
            return
        self._is_noted = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            logger.warning(
                "That there are API keys could not be noted at %s (%s), so the service would be "
                "open if Redis lost them. Set SERVICE_STATE_DIR to a folder that can be written, "
                "or SERVICE_KEYS=required.",
                self.path,
                error.strerror,
            )
