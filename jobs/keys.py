"""Every Redis name and every time to live, in one place.

RQ's own keys (`rq:…`) are RQ's; everything here starts with `wan:`.
"""

from typing import Final

DAY_S: Final = 24 * 60 * 60

RECORD_TTL_S: Final = 30 * DAY_S
"""A record is kept this long after its creation; its place in the indexes ends with it."""

OFFER_TTL_S: Final = 15
"""A worker that has not repeated its offer for this long is not live. Workers repeat every 5 s."""

KNOWN_MODE_TTL_S: Final = 30 * DAY_S
"""A mode stays known this long after its last offer: down, rather than never heard of."""

TOKENIZER_TTL_S: Final = KNOWN_MODE_TTL_S
"""A tokenizer is kept this long after the last offer that names it."""

RQ_RESULT_TTL_S: Final = 60 * 60
"""RQ's bookkeeping of a job that ended; our own record holds the outcome."""

RQ_FAILURE_TTL_S: Final = 7 * DAY_S
"""RQ keeps tracebacks of crashed tasks this long, for the operator."""

INDEX_PREFIX: Final = "wan:jobs:"
"""Sorted sets of job ids, all with score 0: ids sort by time, and so do the members."""

INDEX_ALL: Final = INDEX_PREFIX + "all"

WORKERS: Final = "wan:workers"
"""Sorted set: worker id by the second of its last offer."""

KNOWN_MODES: Final = "wan:modes"
"""Sorted set: JSON [model, mode] by the second it was last offered."""


def record(job_id: str) -> str:
    return f"wan:job:{job_id}"


def index(state: str) -> str:
    """The ids of the jobs in one state."""
    return INDEX_PREFIX + state


def tokenizer(fingerprint: str) -> str:
    """The text of a tokenizer, under the SHA-256 of that text."""
    return f"wan:tokenizer:{fingerprint}"


def worker_offer(worker_id: str) -> str:
    return f"wan:worker:{worker_id}"
