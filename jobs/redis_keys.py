"""Every Redis name and every time to live, in one place.

RQ's own keys (`rq:…`) are RQ's; everything here starts with `wan:`.
"""

import hashlib
from typing import Final

DAY_S: Final = 24 * 60 * 60

RECORD_TTL_S: Final = 30 * DAY_S
"""A record is kept this long after its creation; its places in the indexes are swept after it."""

OFFER_TTL_S: Final = 15
"""A worker that has not repeated its offer for this long is not live. Workers repeat every 5 s."""

KNOWN_MODE_TTL_S: Final = 30 * DAY_S
"""A mode stays known this long after its last offer: down, rather than never heard of."""

TOKENIZER_TTL_S: Final = KNOWN_MODE_TTL_S
"""A tokenizer is kept this long after the last offer that names it."""

IDEMPOTENCY_TTL_S: Final = DAY_S
"""A key given with a request means the same job for this long."""

RQ_RESULT_TTL_S: Final = 60 * 60
"""RQ's bookkeeping of a job that ended; our own record holds the outcome."""

RQ_FAILURE_TTL_S: Final = 7 * DAY_S
"""RQ keeps tracebacks of crashed tasks this long, for the operator."""

INDEX_PREFIX: Final = "wan:jobs:"
"""Sorted sets of job ids, all with score 0: ids sort by time, and so do the members."""

EVENTS_PREFIX: Final = "wan:events:"
"""One stream for each job, kept as long as its record."""

EVENTS_CHANNEL: Final = "wan:events"
"""Carries the id of a job whenever its stream has grown; nothing is lost with a message."""

METRICS: Final = "wan:metrics"
"""Hash of counters; `jobs/store/counters.py` says what the fields mean."""

PACE: Final = "wan:pace"
"""Hash: a request's shape to "seconds per step" and "seconds for the rest", as measured."""

WEBHOOKS_DUE: Final = "wan:webhooks"
"""Sorted set: ids of ended jobs whose webhook is to be called, by the millisecond it is due."""

WEBHOOK_PREFIX: Final = "wan:webhook:"

DELETIONS: Final = "wan:deletions"
"""Sorted set: ids of jobs to delete now that they have ended, by the millisecond of their end."""

RETENTION_LOCK: Final = "wan:retention:lock"
"""Held by the process that deletes what is past its time."""

RETENTION_DONE: Final = "wan:retention:done"
"""When that was last done; not done again as long as it is there."""

RECOVERY: Final = "wan:recovery"
"""Hash: when somebody last looked for abandoned jobs, and when somebody first did after a gap."""

API_KEYS: Final = "wan:keys"
"""Hash: the id of an API key to its JSON, without the secret. Never expires."""

API_KEYS_USED: Final = "wan:keys:used"
"""Hash: the id of an API key to the time of its last use, a minute or so behind."""

URL_SECRET: Final = "wan:url-secret"
"""What signs video links where no secret is configured; made once, for all service processes."""

RATE_PREFIX: Final = "wan:rate"
"""Counters of requests; the rest of their names and their lifetimes are the library's."""

WORKERS: Final = "wan:workers"
"""Sorted set: worker id by the second of its last offer."""

KNOWN_MODES: Final = "wan:modes"
"""Sorted set: JSON [model, mode] by the second it was last offered."""


RECORD_PREFIX: Final = "wan:job:"


def record(job_id: str) -> str:
    return RECORD_PREFIX + job_id


def index(state: str, owner: str | None = None) -> str:
    """The ids of the jobs in one state, or in "all"; of one owner or of everybody."""
    return f"{INDEX_PREFIX}{'' if owner is None else f'owner:{owner}:'}{state}"


def events(job_id: str) -> str:
    return EVENTS_PREFIX + job_id


def webhook(job_id: str) -> str:
    """Hash: how far the calls of the job's webhook are; kept as long as the record."""
    return WEBHOOK_PREFIX + job_id


def idempotency(owner: str, key: str) -> str:
    """What an owner's key stands for. Hashed: the key is the caller's text."""
    return f"wan:idempotency:{owner}:{hashlib.sha256(key.encode()).hexdigest()}"


def tokenizer(fingerprint: str) -> str:
    """The text of a tokenizer, under the SHA-256 of that text."""
    return f"wan:tokenizer:{fingerprint}"


def worker_offer(worker_id: str) -> str:
    return f"wan:worker:{worker_id}"


def worker_status(worker_id: str) -> str:
    """How a worker is doing, beside its offer and with the same lifetime."""
    return f"wan:worker:{worker_id}:status"
