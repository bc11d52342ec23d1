"""Two API processes run comparisons at once, and are killed."""

import signal
import time
from collections import Counter

import pytest
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.catalog import WorkerOffer
from jobs.record import Failure
from jobs.state import JobState
from jobs.store.job_store import JobStore
from service.comparisons.model import HalfState
from service.comparisons.orchestrator import LOCK_S
from service.comparisons.store import ComparisonStore
from service.settings import ServiceSettings
from tests.service.comparisons.samples import sample_comparison, sample_pairs
from tests.support.http_service import address, service


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_each_half_gets_one_job_whenever_processes_are_killed(
    redis: Redis, store: JobStore, redis_url: str, settings: ServiceSettings, offer: WorkerOffer
) -> None:
    environment = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": settings.artifacts_url,
        "SERVICE_PORT": "0",
        "SERVICE_KEYS": "open",
    }
    comparisons = ComparisonStore(redis)
    comparison = sample_comparison(prompts=6)
    comparisons.create(comparison, sample_pairs(comparison))
    many = [offer.model_copy(update={"worker_id": f"worker-{n}"}) for n in range(3)]

    def work() -> bool:
        """Let every queued job fail, as workers would; return whether all halves have ended."""
        for each in many:
            catalog.publish(redis, each)
        for job in store.list(JobState.QUEUED).jobs:
            redis.lrem(f"rq:queue:{offer.queue}", 0, job.id)
            failure = Failure(code="worker_lost", detail="It was lost.")
            store.fail(store.claim(job.id, "worker-0"), failure)
        halves = [half for pair in comparisons.pairs(comparison.id) for half in pair.halves]
        return {half.state for half in halves} == {HalfState.FAILED}

    with service(**environment) as first, service(**environment) as second:
        for process in (first, second):
            address(process)
        wait_until(lambda: work() or len(store.list().jobs) > 2, 60, "jobs are submitted")
        first.send_signal(signal.SIGKILL)
        time.sleep(1)
        work()
        second.send_signal(signal.SIGKILL)  # none is left for a moment
    with service(**environment) as third, service(**environment) as fourth:
        for process in (third, fourth):
            address(process)
        # Whoever was killed in a round holds up the others until its lock expires.
        wait_until(work, LOCK_S + 120, "all halves have ended", every_s=0.2)
    jobs = store.list(limit=200).jobs
    assert Counter((job.metadata["pair"], job.request.mode) for job in jobs) == {
        (pair.id, mode): 1 for pair in comparisons.pairs(comparison.id) for mode in ("bf16", "w8a8")
    }
    assert {half.job_id for pair in comparisons.pairs(comparison.id) for half in pair.halves} == {
        job.id for job in jobs
    }
