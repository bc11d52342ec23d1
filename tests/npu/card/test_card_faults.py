"""Break the simulated card while a worker runs jobs: what the worker promises then holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.errors import OutOfDeviceMemory
from jobs.state import JobState
from tests.npu.card.conftest import Worker
from tests.npu.stand_in import control, simulated
from worker.consumer.serve import serve
from worker.errors import EXIT_DEVICE_LOST
from worker.process.logs import WorkerIds
from worker.settings import WorkerSettings

pytestmark = pytest.mark.npu

SMALL: dict[str, object] = {"num_frames": 1, "num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(autouse=True)
def sound_afterwards() -> Iterator[None]:
    yield
    control.reset()


def test_a_full_card_fails_the_job_and_the_next_one_has_the_memory_again(on_card: Worker) -> None:
    assert on_card.run(**SMALL).state is JobState.SUCCEEDED
    on_card.engine.device.empty_cache()
    before = control.live_bytes()
    control.set_bytes(before)
    failed = on_card.run(**SMALL)
    assert failed.state is JobState.FAILED
    assert failed.failure is not None
    assert failed.failure.code == OutOfDeviceMemory.code
    assert "1 frames of 96x96" in failed.failure.detail
    assert on_card.stats.exit_status is None, "one such job may be the job's fault"
    assert control.live_bytes() <= before, "the job still holds memory"
    control.reset()
    assert on_card.run(**SMALL).state is JobState.SUCCEEDED


def queued_again(worker: Worker) -> str:
    """Serve a job while the card is lost, as a process of its own would; it ends with status 83."""
    job_id = worker.submit(**SMALL)
    settings = WorkerSettings.model_validate({"ARTIFACTS_URL": "file:///unused"})
    assert serve(worker.context, settings, WorkerIds()) == EXIT_DEVICE_LOST
    record = worker.store.get(job_id)
    assert record.state is JobState.QUEUED, record
    return job_id


def test_a_card_that_is_lost_within_a_step_ends_the_process_and_the_job_runs_elsewhere(
    on_card: Worker,
) -> None:
    card = simulated.active
    assert card is not None
    before = sum(card.ops.values())
    assert on_card.run(**SMALL).state is JobState.SUCCEEDED
    card.lose_after((sum(card.ops.values()) - before) // 2)  # nearly all of them denoise
    job_id = queued_again(on_card)
    control.reset()
    assert on_card.work(job_id).state is JobState.SUCCEEDED


def test_a_wait_that_fails_ends_the_process_and_the_job_runs_elsewhere(on_card: Worker) -> None:
    control.lose_in_synchronize(1)
    job_id = queued_again(on_card)
    control.reset()
    assert on_card.work(job_id).state is JobState.SUCCEEDED
