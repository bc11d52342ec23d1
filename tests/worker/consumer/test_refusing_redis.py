"""Test that a job is run once though Redis refuses what its worker asks, at the worst moment."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.exceptions import RedisError

from jobs.artifacts.folder import FolderArtifactStore
from jobs.record import Attempt, StageTimings, Video
from jobs.redis_client import connect
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.jobs.redis_client.refusing_valkey import FAULTS, forget_scripts, running_server
from tests.support.worker_processes import QUEUE, REQUEST
from worker.consumer.rq_worker import ResidentWorker
from worker.engine.fake_engine import FakeEngine


@pytest.mark.parametrize("code", FAULTS)
def test_a_video_that_is_made_while_redis_refuses_is_kept(
    tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    begin, end = FAULTS[code]
    succeed, refused = JobStore.succeed, list[str]()

    def watched(self: JobStore, attempt: Attempt, video: Video, timings: StageTimings) -> None:
        try:
            succeed(self, attempt, video, timings)
        except RedisError as error:
            refused.append(str(error))
            if len(refused) == 3:
                end(server)
                forget_scripts(server)
            raise

    monkeypatch.setattr(JobStore, "succeed", watched)
    with running_server(tmp_path / "valkey", unused_port) as server, connect(server.url) as redis:
        job = JobStore(redis).create(REQUEST, QUEUE).job

        def on_step(step: int) -> None:
            if step == REQUEST.num_inference_steps:
                begin(server)

        artifacts = FolderArtifactStore(tmp_path / "artifacts")
        ResidentWorker(FakeEngine(on_step), redis, artifacts).work(
            max_jobs=1, logging_level="WARNING"
        )
        record = JobStore(redis).get(job.id)
    assert len(refused) >= 3
    assert (record.state, record.attempts, record.lost) == (JobState.SUCCEEDED, 1, 0)
    assert record.video is not None
    assert artifacts.path(record.video.key).is_file()
