"""The Lua scripts through which every change of a job goes.

Each lies in `jobs/store/lua/` and begins with what `prelude.lua` defines; Redis names and lifetimes
are put in here, so that `jobs/redis_keys.py` stays the only place that knows them. The prelude says
what holds for all of them.

The scripts reach keys they were not given (indexes, records of other jobs), so one Redis or Valkey
server, with replicas or without, is what they need; a sharded cluster will not do.
"""

import re
from collections.abc import Callable
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
"""About as many events of one job are kept; a job of 50 steps has some hundred."""

Script = Callable[..., Any]


def load(redis: Redis, name: str) -> Script:
    """Prepare the script `jobs/store/lua/{name}.lua`; call it with `args`. Nothing is sent yet."""
    folder = files("jobs.store") / "lua"
    text = "\n".join(
        (folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("prelude", name)
    )
    script = cast("Script", redis.register_script(re.sub(r"@(\w+)@", _put_in, text)))
    return lambda *args: script(args=args)


def _put_in(match: re.Match[str]) -> str:
    return str(_NAMES[match.group(1)])


_NAMES: Final = {
    "BOUNDS": ", ".join(map(str, counters.BOUNDS_S)),
    "CHANNEL": redis_keys.EVENTS_CHANNEL,
    "DELETIONS": redis_keys.DELETIONS,
    "EVENTS": redis_keys.EVENTS_PREFIX,
    "EVENTS_KEPT": EVENTS_KEPT,
    "IDEMPOTENCY_TTL_S": redis_keys.IDEMPOTENCY_TTL_S,
    "INDEX": redis_keys.INDEX_PREFIX,
    "METRICS": redis_keys.METRICS,
    "PACE": redis_keys.PACE,
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
    "WEBHOOK": redis_keys.WEBHOOK_PREFIX,
    "WEBHOOKS_DUE": redis_keys.WEBHOOKS_DUE,
}
