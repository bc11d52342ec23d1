"""Define every Redis key and every time to live.

All keys here start with `wan:`. RQ's own keys start with `rq:` and are defined by RQ.
"""

import hashlib
from typing import Final

FORMAT: Final = 1
"""The format of records and offers. Readers ignore fields that they do not know. What they would
misunderstand takes the next number, which its writer puts into a field `format`, as text; without
that field it is 1."""

DAY_S: Final = 24 * 60 * 60

RECORD_TTL_S: Final = 30 * DAY_S
"""A record is kept this long after its creation; its index entries are removed afterwards."""

LEASE_S: Final = 15.0
"""A running attempt whose lease was not renewed for this long counts as lost."""

OFFER_TTL_S: Final = 15
"""A worker that has not renewed its offer for this long is not live. Workers renew every 5 s."""

DRAIN_TTL_S: Final = 60
"""An order to drain lives this long; its worker renews it every second."""

KNOWN_MODE_TTL_S: Final = 30 * DAY_S
"""A mode stays known this long after its last offer: it is then down, not unknown."""

TOKENIZER_TTL_S: Final = KNOWN_MODE_TTL_S
"""A tokenizer is kept this long after the last offer that names it."""

IDEMPOTENCY_TTL_S: Final = DAY_S
"""An Idempotency-Key refers to the same job for this long."""

SESSION_IDLE_S: Final = 12 * 60 * 60
"""A session ends when it was not used for this long."""

SESSION_LONGEST_S: Final = 7 * DAY_S
"""A session ends this long after the sign-in, however much it is used."""

SESSION_RENEWED_EVERY_S: Final = 5 * 60
"""A use renews a session only this long after the last renewal, so that few requests write."""

PREVIEW_TTL_S: Final = DAY_S
"""A preview is deleted when its attempt ends; it lasts longer than any step of one."""

RQ_RESULT_TTL_S: Final = 60 * 60
"""RQ keeps its hash of an ended job this long; our own record holds the outcome."""

RQ_FAILURE_TTL_S: Final = 7 * DAY_S
"""RQ keeps tracebacks of crashed tasks this long, for operators."""

INDEX_PREFIX: Final = "wan:jobs:"
"""Sorted sets of job ids, all with score 0: ids sort by time, and so do the members."""

EVENTS_PREFIX: Final = "wan:events:"
"""One stream per job, kept as long as its record."""

EVENTS_CHANNEL: Final = "wan:events"
"""Pub/sub channel: the id of each job whose stream has grown.

A lost message loses no event, because readers read the stream."""

PREVIEW_PREFIX: Final = "wan:preview:"
"""One animated WebP per running job: its newest preview (`jobs/store/live/previews.py`)."""

METRICS: Final = "wan:metrics"
"""Hash of counters; `jobs/store/counters.py` defines the fields."""

SERIES_PREFIX: Final = "wan:series:"
"""One hash for each hour since 1970: what ended in its minutes (`jobs/store/counters.py`)."""

SERIES_TTL_S: Final = 7 * DAY_S
"""An hour's series is kept this long after its last job."""

FAILURES: Final = "wan:failures"
"""Sorted set: ids of the jobs that failed in the last week; scores are their ends in ms."""

FAILURES_TTL_S: Final = SERIES_TTL_S

MOST_FAILURES: Final = 10_000
"""So many failures are kept at most, the latest."""

DURATIONS: Final = "wan:pace"
"""Hash: a request's shape to its measured durations (`jobs/durations.py`)."""

WEBHOOKS_DUE: Final = "wan:webhooks"
"""Sorted set: ids of ended jobs whose webhook is to be called; scores are due times in ms."""

WEBHOOK_PREFIX: Final = "wan:webhook:"
"""One hash per job with a webhook: the state of its calls."""

DELETIONS: Final = "wan:deletions"
"""Sorted set: ids of ended jobs that are to be deleted; scores are the times of ending in ms."""

RETENTION_LOCK: Final = "wan:retention:lock"
"""Lock of the process that deletes expired jobs and videos."""

RETENTION_DONE: Final = "wan:retention:done"
"""When the last round was done; no other round starts while this key exists."""

CONFIRMED: Final = "wan:confirmed"
"""The job whose creation was confirmed last; a write to wait for (`jobs/store/durability.py`)."""

ARTIFACTS_ID: Final = "wan:artifacts:id"
"""The id in the marker of the artifact store that belongs to this Redis. It never expires."""

ARTIFACTS_LOCK: Final = "wan:artifacts:lock"
"""Lock of the process that gives a store its marker, or takes over the one it has."""

RETENTION_CLOCK: Final = "wan:retention:clock"
"""Hash: when, on Redis' clock, a process last looked whether a round is due, and until when no
round is run because the clock had jumped; both in ms."""

RETENTION_REFUSED: Final = "wan:retention:refused"
"""Why no round is run although one is due; missing if nothing is wrong."""

RECOVERY: Final = "wan:recovery"
"""Hash: when a process last looked for abandoned jobs, and when one first did after a gap."""

COMPARISONS: Final = "wan:comparisons"
"""Sorted set of the ids of comparisons, all with score 0: ids sort by time, and so do the members.
Comparisons never expire; operators delete them."""

COMPARISONS_OPEN: Final = "wan:comparisons:open"
"""Set: ids of the comparisons that may still have something to submit, to notice or to prepare."""

COMPARISONS_LOCK: Final = "wan:comparisons:lock"
"""Lock of the process that runs a round over the open comparisons."""

API_KEYS: Final = "wan:keys"
"""Hash: the id of an API key to its JSON, without the secret. It never expires."""

API_KEYS_USED: Final = "wan:keys:used"
"""Hash: the id of an API key to the time of its last use, accurate to about a minute."""

URL_SECRET: Final = "wan:url-secret"
"""The secret that signs video links if none is configured; created once, for all processes."""

RATE_PREFIX: Final = "wan:rate"
"""Prefix of the request counters; the `limits` library adds the rest and sets their lifetimes."""

WORKERS: Final = "wan:workers"
"""Sorted set: worker ids; scores are the Unix seconds of their last offers, by Redis' clock."""

KNOWN_MODES: Final = "wan:modes"
"""Sorted set: JSON [model, mode]; scores are the Unix seconds of the last offers."""

RECORD_PREFIX: Final = "wan:job:"
"""One hash per job (`jobs/record.py`)."""


def record(job_id: str) -> str:
    """Return the key of a job's hash."""
    return RECORD_PREFIX + job_id


def index(state: str, owner: str | None = None) -> str:
    """Return the index of the jobs in one state or in "all", of one owner or of everybody."""
    return f"{INDEX_PREFIX}{'' if owner is None else f'owner:{owner}:'}{state}"


def events(job_id: str) -> str:
    """Return the key of a job's event stream."""
    return EVENTS_PREFIX + job_id


def preview(job_id: str) -> str:
    """Return the key of a running job's newest preview."""
    return PREVIEW_PREFIX + job_id


def webhook(job_id: str) -> str:
    """Return the key of the hash with the state of a job's webhook; kept as long as the record."""
    return WEBHOOK_PREFIX + job_id


def idempotency(owner: str, key: str) -> str:
    """Return the Redis key of an Idempotency-Key, hashed because it is the caller's text."""
    return f"wan:idempotency:{owner}:{hashlib.sha256(key.encode()).hexdigest()}"


def comparison(comparison_id: str) -> str:
    """Return the key of the hash of a comparison (`service/comparisons/store.py`)."""
    return f"wan:comparison:{comparison_id}"


def comparison_part(comparison_id: str, part: str) -> str:
    """Return the key of something else about a comparison, such as its "pairs".

    It is deleted with the comparison, because its name starts with the comparison's key.
    """
    return f"{comparison(comparison_id)}:{part}"


def rater_seats(key_owner: str) -> str:
    """Return the sorted set of the seats that keys of role rater open, "comparison:rater"; scores
    are the Unix seconds when the owner last went there.
    """
    return f"wan:rater-seats:{key_owner}"


def session(digest: str) -> str:
    """Return the key of a session; `digest` is the SHA-256 of its id, which is stored nowhere."""
    return f"wan:session:{digest}"


def sessions_of(key_id: str) -> str:
    """Return the sorted set of an API key's sessions: digests; scores are their latest ends in ms.

    Some may have ended earlier. It is kept as long as its latest session may last.
    """
    return f"wan:sessions:{key_id}"


def tokenizer(fingerprint: str) -> str:
    """Return the key of a tokenizer's text; `fingerprint` is the SHA-256 of that text."""
    return f"wan:tokenizer:{fingerprint}"


def worker_offer(worker_id: str) -> str:
    """Return the key of a worker's offer."""
    return f"wan:worker:{worker_id}"


def worker_status(worker_id: str) -> str:
    """Return the key of a worker's status, which has the same lifetime as its offer."""
    return f"wan:worker:{worker_id}:status"


def worker_drain(worker_id: str) -> str:
    """Return the key of the order to drain that a worker is under (`jobs/store/workers.py`)."""
    return f"wan:worker:{worker_id}:drain"


def series(hour: int) -> str:
    """Return the key of an hour's series; hours are counted from 1970."""
    return f"{SERIES_PREFIX}{hour}"
