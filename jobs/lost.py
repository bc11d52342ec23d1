"""Attempts that vanish: how many a job may lose, and what it ends with then."""

from typing import Final

from jobs.errors import WorkerLost
from jobs.record import Failure

MAX_LOST: Final = 2
"""A job whose attempts vanished this often (its worker crashed, hung or was killed) is failed."""

WORKER_LOST = Failure(
    code=WorkerLost.code,
    detail=f"The worker was lost {MAX_LOST} times while it ran this job, so the job was given up. "
    "Send it again; if that fails, too, the request itself may be what ends the worker, and its "
    "log has the reason.",
)


def when_lost() -> tuple[int, str, str]:
    """What `jobs/lua/put_back.lua` needs to know of it."""
    return MAX_LOST, WORKER_LOST.model_dump_json(), WORKER_LOST.code
