"""Test `python -m service retention` as a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from jobs import redis_keys
from jobs.artifacts.store import artifact_key
from jobs.record import StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore

TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


def retention(**environment: str) -> "subprocess.CompletedProcess[str]":
    return service("retention", **environment)


def store_command(name: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return service("store", name, **environment)


def service(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def environment(redis_url: str, tmp_path: Path) -> dict[str, str]:
    return {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "SERVICE_KEEP_VIDEOS_H": "0.000001",
    }


def test_deletes_at_once_and_says_what(
    environment: dict[str, str],
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
    tmp_path: Path,
) -> None:
    attempt = store.claim(store.create(request_for_video, "q").job.id, "w")
    key = artifact_key(attempt.job_id, attempt.label)
    file = tmp_path / "artifacts" / key
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mp4")
    video = Video(key=key, bytes=3, sha256="ab", width=96, height=96, num_frames=17, fps=8)
    store.succeed(attempt, video, TIMINGS)
    # The command runs a round even if a process did so minutes ago.
    redis.set(redis_keys.RETENTION_DONE, "a moment ago")

    done = retention(**environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Deleted videos: 1, jobs with their videos: 0")
    assert not file.exists()
    assert store.get(attempt.job_id).video_deleted_at is not None


def test_says_that_somebody_else_is_at_it(environment: dict[str, str], redis: Redis) -> None:
    with redis.lock(redis_keys.RETENTION_LOCK, timeout=60):
        done = retention(**environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "a service process is deleting" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SERVICE_KEEP_VIDEOS_H", "0"),
        ("SERVICE_KEEP_JOBS_H", "721"),
        ("SERVICE_KEEP_JOBS_H", "nan"),
        ("SERVICE_KEEP_ORPHANS_H", "0.5"),
        ("ARTIFACTS_URL", "ftp://x"),
    ],
)
def test_bad_settings_end_it_with_one_line(
    environment: dict[str, str], variable: str, value: str
) -> None:
    done = retention(**{**environment, variable: value})
    assert done.returncode == 1
    assert variable in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_store_that_was_moved_is_adopted_by_a_command(
    environment: dict[str, str], redis: Redis, tmp_path: Path
) -> None:
    assert store_command("show", **environment).returncode == 0
    (tmp_path / "artifacts").rename(tmp_path / "moved")
    done = store_command("show", **environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "service: The artifact store is missing" in done.stderr
    assert retention(**environment).returncode == 1

    moved = environment | {"ARTIFACTS_URL": (tmp_path / "moved").as_uri()}
    (tmp_path / "moved" / ".store-id").unlink()  # copied without hidden files
    assert store_command("show", **moved).returncode == 1
    done = store_command("adopt", **moved)
    assert (done.returncode, done.stderr) == (0, "")
    known = redis.get(redis_keys.ARTIFACTS_ID)
    assert isinstance(known, bytes)
    assert f"Redis knows the store {known.decode()} now; 0 of the 0" in done.stdout
    assert store_command("show", **moved).returncode == 0
    assert retention(**moved).returncode == 0
