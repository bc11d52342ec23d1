"""Load the Lua scripts that make every change of a job.

The scripts are in `jobs/store/lua/`. Each is prefixed with `prelude.lua`, which defines what they
share and says what holds for all of them. Redis keys and lifetimes are substituted here, so that
`jobs/redis_keys.py` is the only place that defines them.

The scripts access keys that are not passed to them (indexes, records of other jobs). So they need a
single Redis or Valkey server, with or without replicas; a sharded cluster does not work.
"""

import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, Final, cast

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.results import Result

from jobs import redis_keys
from jobs.store import counters

EVENTS_KEPT: Final = 500
"""About this many events of one job are kept; a job of 50 steps has at most 150."""

Script = Callable[..., Any]


def load(redis: Redis, name: str) -> Script:
    """Return a function that runs `jobs/store/lua/{name}.lua` with its arguments as ARGV.

    Nothing is sent to Redis before the first call.
    """
    script = cast("Script", redis.register_script(_text(name)))
    return lambda *args: script(args=args)


@cache
def _text(name: str) -> str:
    folder = files("jobs.store") / "lua"
    text = "\n".join(
        (folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("prelude", name)
    )
    return re.sub(r"@(\w+)@", _substitute, text)


def _substitute(match: re.Match[str]) -> str:
    return str(_NAMES[match.group(1)])


_NAMES: Final = {
    "BOUNDS": ", ".join(map(str, counters.BOUNDS_S)),
    "CHANNEL": redis_keys.EVENTS_CHANNEL,
    "DELETIONS": redis_keys.DELETIONS,
    "DURATIONS": redis_keys.DURATIONS,
    "EVENTS": redis_keys.EVENTS_PREFIX,
    "EVENTS_KEPT": EVENTS_KEPT,
    "FAILURES": redis_keys.FAILURES,
    "FAILURES_TTL_S": redis_keys.FAILURES_TTL_S,
    "IDEMPOTENCY_TTL_S": redis_keys.IDEMPOTENCY_TTL_S,
    "FORMAT": redis_keys.FORMAT,
    "INDEX": redis_keys.INDEX_PREFIX,
    "LEASE_MS": int(redis_keys.LEASE_S * 1000),
    "MAX_TAKEN": 31,  # of the oldest waiting jobs, so many are looked at besides the first
    "METRICS": redis_keys.METRICS,
    "MOST_FAILURES": redis_keys.MOST_FAILURES,
    "PREVIEW": redis_keys.PREVIEW_PREFIX,
    "PREVIEW_TTL_S": redis_keys.PREVIEW_TTL_S,
    "RECORD": redis_keys.RECORD_PREFIX,
    "RECORD_TTL_S": redis_keys.RECORD_TTL_S,
    "RECOVERY": redis_keys.RECOVERY,
    "RQ_FAILED": FailedJobRegistry.key_template.format(""),
    "RQ_FINISHED": FinishedJobRegistry.key_template.format(""),
    "RQ_JOB": Job.redis_job_namespace_prefix,
    "RQ_QUEUE": Queue.redis_queue_namespace_prefix,
    "RQ_QUEUES": Queue.redis_queues_keys,
    "RQ_RESULT_TTL_S": redis_keys.RQ_RESULT_TTL_S,
    "RQ_RESULTS": Result.get_key(""),
    "SERIES": redis_keys.SERIES_PREFIX,
    "SERIES_TTL_S": redis_keys.SERIES_TTL_S,
    "WEBHOOK": redis_keys.WEBHOOK_PREFIX,
    "WEBHOOKS_DUE": redis_keys.WEBHOOKS_DUE,
}
