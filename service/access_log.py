"""What the access log must not hold: query strings, because a signed link in a log opens a video.

Prompts travel in bodies only, which uvicorn does not log.
"""

import logging
from typing import Final

LOGGER: Final = "uvicorn.access"


class CutQueries(logging.Filter):
    """Shortens the path in uvicorn's access records to what stands before the question mark."""

    def filter(self, record: logging.LogRecord) -> bool:
        # uvicorn's arguments: client, method, path with query, HTTP version, status.
        if isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, path, version, status = record.args
            record.args = (client, method, str(path).partition("?")[0], version, status)
        return True
