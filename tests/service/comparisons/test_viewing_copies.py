"""What raters see: pixels of the jobs' videos, and nothing else that tells two halves apart."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import imageio_ffmpeg
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.artifacts.folder import FolderArtifactStore
from jobs.record import now
from jobs.store.deletion import delete_job
from jobs.store.job_store import JobStore
from service.comparisons import media
from service.comparisons.model import Comparison, Pair, PairKind, PairState, ViewingCopy
from service.comparisons.store import ComparisonStore
from service.maintenance.retention import Retention
from service.schemas.expiry import RetentionPeriods
from service.settings import ServiceSettings
from tests.service.comparisons.samples import sample_comparison
from tests.support.worker_processes import ROOT

TELLING = re.compile(rb"plain|twin|x264|crf|Lavc|Lavf|comment|title|a square")
MARKS = re.compile(rb"plain|x264|comment")


@pytest.fixture
def worker(
    redis: Redis, redis_url: str, settings: ServiceSettings, tmp_path: Path
) -> Iterator[None]:
    """A worker process with the modes `plain` and `twin` of the model `fake`."""
    environment = {"REDIS_URL": redis_url, "ARTIFACTS_URL": settings.artifacts_url}
    with (tmp_path / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.comparisons.twin_worker", "0"],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: bool(catalog.read(redis).offers), 60)
        yield
    finally:
        process.kill()
        process.wait()


def frames(file: Path) -> list[str]:
    """The MD5 of each frame, with its time."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(file)]
    command += ["-f", "framemd5", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("#")]


def created(client: TestClient, **changes: object) -> str:
    body = {
        "title": "Is twin as good?",
        "reference": {"mode": "plain"},
        "candidate": {"mode": "twin"},
        "prompts": ["a square", "a square again", "fail, please"],
        "rating": {"training": 2, "gold": 1, "identical": 1},
    }
    answer = client.post("/comparisons", json=body | changes)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def wait_for_pairs(redis: Redis, name: str, *, ready: int, failed: int) -> tuple[Pair, ...]:
    comparisons = ComparisonStore(redis)

    def counts() -> tuple[int, int]:
        states = [pair.state for pair in comparisons.pairs(name)]
        return states.count(PairState.READY), states.count(PairState.FAILED)

    wait_until(lambda: counts() == (ready, failed), 90, "pairs are ready", lambda: str(counts()))
    return comparisons.pairs(name)


@pytest.mark.usefixtures("worker")
def test_a_comparison_runs_to_its_copies_which_outlive_the_jobs_videos(
    client: TestClient, redis: Redis, store: JobStore, settings: ServiceSettings
) -> None:
    name = created(client)
    pairs = wait_for_pairs(redis, name, ready=2 + 4, failed=1)
    view = client.get(f"/comparisons/{name}").json()
    assert view["problem"] is None
    assert view["counts"] == {"pairs": 3, "ready": 2, "failed": 1, "waiting": 0, "running": 0}
    jobs = store.list(limit=50).jobs
    assert len(jobs) == 6
    folder = FolderArtifactStore(Path(settings.artifacts_url.removeprefix("file://")))

    for pair in pairs:
        if pair.state is PairState.FAILED:
            assert [half.failure and half.failure.code for half in pair.halves] == [
                "generation_failed"
            ] * 2
            continue
        copies = [half.copy_ for half in pair.halves]
        assert copies[0] is not None
        assert copies[1] is not None
        files = [folder.path(copy.key) for copy in copies if copy is not None]
        assert {file.stat().st_size for file in files} == {copies[0].bytes}
        assert copies[0].model_dump(exclude={"key"}) == copies[1].model_dump(exclude={"key"})
        for file in files:
            assert re.fullmatch(r"[0-9a-f]{32}\.mp4", file.name)
            assert TELLING.findall(file.read_bytes()) == []
            assert len(frames(file)) == 9
        if pair.kind is PairKind.TEST:
            for half, file in zip(pair.halves, files, strict=True):
                video = store.get(str(half.job_id)).video
                assert video is not None
                original = folder.path(video.key)
                assert MARKS.search(original.read_bytes())  # the search finds what is there
                assert frames(file) == frames(original)
            assert pair.measures is not None
            assert pair.measures.psnr_db is not None
            assert 25 < pair.measures.psnr_db < 35  # brighter by 8 of 255: 30 dB
            assert 0.5 < pair.measures.ssim < 1
        elif pair.kind is PairKind.IDENTICAL:
            assert files[0].read_bytes() == files[1].read_bytes()
        elif pair.kind is PairKind.GOLD:
            assert media.measure(*files).ssim < 0.8

    kinds = {pair.kind: pair for pair in pairs if pair.source}
    assert set(kinds) == {PairKind.GOLD, PairKind.IDENTICAL, PairKind.TRAINING}

    # The jobs' videos go, by retention or by hand; the copies stay, and go with the comparison.
    soon = timedelta(microseconds=1)
    periods = RetentionPeriods(videos=soon, jobs=timedelta(hours=9), orphans=soon)
    done = Retention(redis, folder, periods).run(threading.Event(), now() + timedelta(seconds=9))
    assert done["videos"] == 4
    assert done["orphans"] == 0
    delete_job(store, folder, str(pairs[0].reference.job_id))
    assert len(list(folder.list("comparisons"))) == 12
    assert client.delete(f"/comparisons/{name}").status_code == 204
    assert list(folder.list("comparisons")) == []
    assert client.get(f"/comparisons/{name}").status_code == 404


@pytest.mark.usefixtures("worker")
def test_a_video_that_is_gone_before_it_was_copied_is_made_again_on_demand(
    client: TestClient, redis: Redis, store: JobStore, settings: ServiceSettings
) -> None:
    comparisons = ComparisonStore(redis)
    name = created(client, prompts=["a square"], rating={"gold": 0, "identical": 0, "training": 0})
    (pair,) = wait_for_pairs(redis, name, ready=1, failed=0)
    folder = FolderArtifactStore(Path(settings.artifacts_url.removeprefix("file://")))
    delete_job(store, folder, str(pair.candidate.job_id))

    def uncopied(found: Pair) -> Pair:
        for arm, half in zip(("reference", "candidate"), found.halves, strict=True):
            found = found.model_copy(update={arm: half.model_copy(update={"copy_": None})})
        return found

    comparisons.update_pair(name, pair.id, uncopied)
    (pair,) = wait_for_pairs(redis, name, ready=0, failed=1)
    assert pair.candidate.failure is not None
    assert pair.candidate.failure.code == "video_gone"
    assert client.post(f"/comparisons/{name}/retry").status_code == 200
    (again,) = wait_for_pairs(redis, name, ready=1, failed=0)
    assert again.reference.job_id == pair.reference.job_id
    assert again.candidate.job_id != pair.candidate.job_id


def made_video(path: Path) -> ViewingCopy:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi"]
    command += ["-i", "testsrc2=s=96x64:r=8", "-frames:v", "17", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, check=True)
    return ViewingCopy(key="a", bytes=1, width=96, height=64, fps=8, num_frames=17)


def test_damage_is_seen_keeps_the_shape_and_follows_from_the_video(tmp_path: Path) -> None:
    source = tmp_path / "source.mp4"
    video = made_video(source)
    intact, damaged, again = (tmp_path / f"{name}.mp4" for name in ("intact", "damaged", "again"))
    media.encode_again(source, intact, video, damaged=False)
    media.encode_again(source, damaged, video, damaged=True)
    media.encode_again(source, again, video, damaged=True)
    assert media.measure(source, intact).ssim > 0.98
    assert media.measure(intact, damaged).ssim < 0.5
    assert damaged.read_bytes() == again.read_bytes()
    hashes = [line.rpartition(",")[2] for line in frames(damaged)]
    assert len(hashes) == 17
    assert len(set(hashes)) < 9  # two of three frames stand still, but for traces of the encoder
    assert [line.split(",")[2] for line in frames(damaged)] == [
        line.split(",")[2] for line in frames(source)
    ]


def test_the_measures_of_a_video_with_itself_are_those_of_identical_pixels(tmp_path: Path) -> None:
    source, copy = tmp_path / "source.mp4", tmp_path / "copy.mp4"
    made_video(source)
    media.remux(source, copy)
    measures = media.measure(source, copy)
    assert (measures.psnr_db, measures.ssim) == (None, 1)


@pytest.mark.parametrize("longer", [0, 8, 9, 15, 5000])
def test_padding_makes_files_equally_long_and_players_skip_it(tmp_path: Path, longer: int) -> None:
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for file in files:
        made_video(file)
    if longer:
        with files[1].open("ab") as out:
            out.write(longer.to_bytes(4, "big") + b"free" + bytes(longer - 8))
    before = [frames(file) for file in files]
    length = media.pad_to_equal_length(files)
    assert {file.stat().st_size for file in files} == {length}
    assert [frames(file) for file in files] == before


def test_ffmpegs_refusal_says_no_path_and_its_absence_is_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(media.FfmpegRefused) as refused:
        media.remux(broken, tmp_path / "copy.mp4")
    assert str(tmp_path) not in str(refused.value)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(media.FfmpegAway, match="no ffmpeg"):
        media.remux(broken, tmp_path / "copy.mp4")


def test_copies_of_a_comparison_that_is_gone_are_orphans(redis: Redis, tmp_path: Path) -> None:
    folder = FolderArtifactStore(tmp_path / "artifacts")
    comparison: Comparison = sample_comparison()
    ComparisonStore(redis).create(comparison, [Pair(id="0" * 16, number=1)])
    (tmp_path / "file").write_bytes(b"x")
    kept, orphan = f"comparisons/{comparison.id}/a.mp4", "comparisons/gone/a.mp4"
    for key in (kept, orphan):
        folder.put(key, tmp_path / "file")
    redis.zadd("wan:jobs:all", {"a": 0})  # a Redis that knows jobs
    hour = timedelta(hours=1)
    retention = Retention(redis, folder, RetentionPeriods(videos=hour, jobs=hour, orphans=hour))
    assert retention.run(threading.Event(), now()).total() == 0
    assert retention.run(threading.Event(), now() + 2 * hour)["orphans"] == 1
    assert [stored.key for stored in folder.list("comparisons")] == [kept]
