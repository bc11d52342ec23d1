"""Test that only the store that belongs to this Redis is written, read, swept and deleted from."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from jobs import redis_keys
from jobs.artifacts.bucket import BucketArtifactStore
from jobs.artifacts.folder import FolderArtifactStore
from jobs.artifacts.keys import MARKER
from jobs.artifacts.known_store import CHECKED_S, KnownArtifactStore, open_known_artifacts
from jobs.artifacts.s3_url import BucketAddress
from jobs.artifacts.store import MarkedStore, artifact_key
from jobs.errors import ArtifactNotStored, ArtifactsUnavailable, WorkerUnfit
from jobs.record import StageTimings, Video
from jobs.redis_client import connect
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from tests.support.s3_server import FaultyProxy

Make = Callable[[MarkedStore], KnownArtifactStore]
Places = Callable[[str], MarkedStore]

KEY = "videos/01a2/1.mp4"
TIMINGS = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.mp4"
    path.write_bytes(b"mp4")
    return path


@pytest.fixture
def make(redis: Redis, clock: Clock) -> Make:
    return lambda store: KnownArtifactStore(store, redis, clock)


@pytest.fixture(params=["folder", "bucket"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Places:
    """Opens the store of a name, in a folder or in a bucket; puts are tried for half a second."""
    if request.param == "folder":
        return lambda name: FolderArtifactStore(tmp_path / name, retry_for_s=0.5)
    endpoint = request.getfixturevalue("s3_endpoint")
    bucket = request.getfixturevalue("bucket")
    return lambda name: BucketArtifactStore(BucketAddress(bucket, name, endpoint), retry_for_s=0.5)


def test_the_first_store_gets_a_marker_that_redis_knows(
    places: Places, make: Make, redis: Redis, source: Path
) -> None:
    raw = places("a")
    artifacts = make(raw)
    assert artifacts.is_present is None
    artifacts.probe()
    assert artifacts.is_present is True
    marker = raw.marker()
    assert marker is not None
    assert marker is not None
    assert redis.get(redis_keys.ARTIFACTS_ID) == marker.strip()
    assert redis.ttl(redis_keys.ARTIFACTS_ID) == -1
    artifacts.put(KEY, source)
    assert [each.key for each in artifacts.list()] == [KEY], "the marker is no artifact"
    make(places("a")).verify()
    assert raw.marker() == marker


def test_a_store_without_the_marker_is_missing(places: Places, make: Make, source: Path) -> None:
    """A share that is not mounted, and the folder of a worker that was set up otherwise."""
    make(places("right")).put(KEY, source)
    raw = places("wrong")
    wrong = make(raw)
    for use in (
        wrong.probe,
        lambda: wrong.size(KEY),
        lambda: list(wrong.read(KEY, 0, 3)),
        lambda: wrong.delete(KEY),
        lambda: list(wrong.list()),
        wrong.remove_leftovers,
    ):
        with pytest.raises(ArtifactsUnavailable, match=r"has no marker.*store adopt"):
            use()
    assert wrong.is_present is False
    with pytest.raises(WorkerUnfit, match="the artifact store is missing"):
        wrong.put(KEY, source)
    assert raw.size(KEY) is None
    assert raw.marker() is None


def test_a_store_with_another_id_is_missing_even_for_what_it_has(
    places: Places, make: Make, redis: Redis, source: Path
) -> None:
    right, other = make(places("right")), places("other")
    right.put(KEY, source)
    other.write_marker(b"0" * 32, replace=False)
    other.put(KEY, source)
    for use in (lambda: make(other).size(KEY), lambda: list(make(other).read(KEY, 0, 3))):
        with pytest.raises(ArtifactsUnavailable, match=r"is the store 0{32}, and Redis knows"):
            use()
    with pytest.raises(ArtifactsUnavailable):
        make(other).delete(KEY)
    assert other.size(KEY) == 3


def test_a_store_from_before_markers_and_a_redis_that_lost_its_data_know_each_other_again(
    places: Places, make: Make, redis: Redis, source: Path
) -> None:
    raw = places("a")
    raw.put(KEY, source)  # by a version that knew no markers
    assert make(raw).size(KEY) == 3
    marker = raw.marker()
    assert marker is not None
    redis.flushall()
    assert make(raw).size(KEY) == 3
    assert marker is not None
    assert raw.marker() == marker
    assert redis.get(redis_keys.ARTIFACTS_ID) == marker.strip()


def test_an_operator_can_adopt_a_moved_store(
    places: Places, make: Make, redis: Redis, source: Path
) -> None:
    make(places("old")).put(KEY, source)
    raw = places("new")
    raw.put(KEY, source)
    moved = make(raw)
    with pytest.raises(ArtifactsUnavailable):
        moved.size(KEY)
    known = moved.adopt()
    assert moved.size(KEY) == 3
    assert redis.get(redis_keys.ARTIFACTS_ID) == known.encode()
    with pytest.raises(ArtifactsUnavailable):
        make(places("old")).verify()
    assert moved.adopt() == known, "adopting it again changes nothing"


def test_a_marker_that_cannot_be_read_is_written_again_by_an_operator_only(
    places: Places, make: Make, redis: Redis
) -> None:
    raw = places("a")
    for text in (b"", b"half an i", b"\xff" * 32):
        raw.write_marker(text, replace=True)
        redis.flushall()
        with pytest.raises(ArtifactsUnavailable, match="without an id"):
            make(raw).verify()
        assert redis.get(redis_keys.ARTIFACTS_ID) is None
        make(raw).adopt()
        make(raw).verify()


def test_processes_that_start_at_once_agree(places: Places, redis_url: str) -> None:
    """Each has its own connections. Without the lock and the first marker, ids would differ."""
    start, faults = threading.Barrier(8), []

    def verify() -> None:
        with connect(redis_url) as redis:
            artifacts = KnownArtifactStore(places("a"), redis)
            start.wait()
            try:
                artifacts.verify()
            except ArtifactsUnavailable as error:
                faults.append(error)

    threads = [threading.Thread(target=verify) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_an_existing_marker_is_kept(places: Places) -> None:
    raw = places("a")
    raw.write_marker(b"first", replace=False)
    raw.write_marker(b"second", replace=False)
    assert raw.marker() == b"first"
    raw.write_marker(b"third", replace=True)
    assert raw.marker() == b"third"


class Share:
    """A folder that is a share: it can be unmounted, which leaves its empty mount point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._away = folder.with_name("unmounted")

    def unmount(self) -> None:
        self.folder.rename(self._away)
        self.folder.mkdir()

    def mount(self) -> None:
        self.folder.rmdir()  # fails if anything was written into the mount point
        self._away.rename(self.folder)


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return Share(tmp_path / "share")


@pytest.fixture
def shared(share: Share, make: Make) -> KnownArtifactStore:
    return make(FolderArtifactStore(share.folder, retry_for_s=60))


def test_a_put_waits_for_a_share_that_comes_back(
    shared: KnownArtifactStore, share: Share, source: Path
) -> None:
    shared.verify()
    share.unmount()
    looks: list[bool | None] = []

    def check() -> None:  # called while the put waits
        looks.append(shared.is_present)
        if len(looks) == 2:
            share.mount()

    shared.put(KEY, source, check)
    assert looks[:2] == [False, False]
    assert (share.folder / KEY).read_bytes() == b"mp4"
    assert shared.is_present is True


def test_what_is_not_found_is_looked_for_in_the_right_store_however_fresh_the_last_look(
    shared: KnownArtifactStore, share: Share, source: Path
) -> None:
    shared.put(KEY, source)
    assert shared.size(KEY) == 3
    share.unmount()
    with pytest.raises(ArtifactsUnavailable):
        shared.size(KEY)
    with pytest.raises(ArtifactsUnavailable):
        shared.delete(KEY)
    share.mount()
    assert shared.size(KEY) == 3
    assert shared.size("videos/01a2/2.mp4") is None, "in the right store nothing is just nothing"


def test_a_marker_that_another_process_writes_between_the_two_looks_is_found(
    share: Share, make: Make
) -> None:
    class Late(FolderArtifactStore):
        """A folder in which this process does not see the marker at its first look."""

        looks = 0

        def marker(self) -> bytes | None:
            self.looks += 1
            return None if self.looks == 1 else super().marker()

    make(FolderArtifactStore(share.folder)).verify()  # the other process
    store = make(Late(share.folder))
    store.verify()
    assert store.is_present


def test_a_list_of_a_share_that_goes_away_meanwhile_is_not_complete(
    shared: KnownArtifactStore, share: Share, source: Path
) -> None:
    """What it does not name must not count as deleted."""
    shared.put(KEY, source)
    shared.put("videos/01a3/1.mp4", source)
    listed = shared.list()
    next(listed)
    share.unmount()
    with pytest.raises(ArtifactsUnavailable):
        list(listed)


def test_reads_look_at_the_marker_now_and_then(
    shared: KnownArtifactStore, share: Share, source: Path, clock: Clock, redis: Redis
) -> None:
    shared.put(KEY, source)
    assert shared.size(KEY) == 3
    redis.set(redis_keys.ARTIFACTS_ID, "0" * 32)  # another store was adopted
    clock.now_s += CHECKED_S - 0.1
    assert list(shared.read(KEY, 0, 3)) == [b"mp4"]
    clock.now_s += 0.2
    with pytest.raises(ArtifactsUnavailable):
        shared.size(KEY)
    with pytest.raises(ArtifactsUnavailable):
        list(shared.read(KEY, 0, 3))


def test_a_put_looks_once_at_the_marker(
    shared: KnownArtifactStore, source: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.verify()
    reads: list[int] = []
    real = FolderArtifactStore.marker

    def marker(store: FolderArtifactStore) -> bytes | None:
        reads.append(1)
        return real(store)

    monkeypatch.setattr(FolderArtifactStore, "marker", marker)
    before = redis.info("commandstats")["cmdstat_get"]["calls"]
    shared.put(KEY, source)
    assert len(reads) == 1
    assert redis.info("commandstats")["cmdstat_get"]["calls"] - before == 1


def test_a_redis_that_is_away_does_not_keep_a_video_out_of_its_store(
    redis: Redis, share: Share, source: Path, unused_port: int
) -> None:
    class Away:
        """The client of a process that has lost its Redis."""

        def get(self, name: str) -> bytes:
            raise RedisConnectionError("away")

    artifacts = KnownArtifactStore(FolderArtifactStore(share.folder, retry_for_s=0.1), redis)
    artifacts.verify()
    artifacts._redis = Away()  # type: ignore[assignment]
    artifacts.put(KEY, source)
    assert artifacts.size(KEY) == 3
    share.unmount()
    with pytest.raises(WorkerUnfit, match="is missing"):
        artifacts.put(KEY, source)
    share.mount()


def test_a_redis_that_hangs_does_not_hold_a_video_up(
    redis: Redis, share: Share, source: Path
) -> None:
    answers = threading.Event()

    class Hanging:
        """The client of a process whose Redis was stopped."""

        def get(self, name: str) -> bytes:
            answers.wait(60)
            raise RedisConnectionError("timed out")

    artifacts = KnownArtifactStore(FolderArtifactStore(share.folder, retry_for_s=0.1), redis)
    artifacts.verify()
    artifacts._redis = Hanging()  # type: ignore[assignment]
    artifacts.put(KEY, source)
    assert not answers.is_set(), "it was stored while Redis still hung"
    answers.set()
    assert artifacts.size(KEY) == 3


def test_an_upgrade_while_the_share_is_away_gives_its_mount_point_no_marker(
    redis: Redis,
    store: JobStore,
    request_for_video: GenerationRequest,
    share: Share,
    source: Path,
    shared: KnownArtifactStore,
) -> None:
    """A version without markers made videos; this one starts first while the share is away."""
    raw = FolderArtifactStore(share.folder)
    broken = store.claim(store.create(request_for_video, "q").job.id, "w")
    attempt = store.claim(store.create(request_for_video, "q").job.id, "w")
    key = artifact_key(attempt.job_id, attempt.label)
    raw.put(key, source)
    video = Video(key=key, bytes=3, sha256="ab", width=96, height=96, num_frames=17, fps=8)
    for each in (broken, attempt):
        store.succeed(each, video, TIMINGS)
    redis.hset(redis_keys.record(broken.job_id), "video", "no JSON")

    share.unmount()
    with pytest.raises(ArtifactsUnavailable, match="none of the 1 latest videos"):
        shared.verify()
    share.mount()
    shared.verify()
    assert shared.latest_videos() == (1, 1)


def test_a_store_that_does_not_respond_is_not_missing(
    redis: Redis, bucket: str, s3_endpoint: str, source: Path
) -> None:
    """A worker is not at fault for it: no other would be better off."""
    proxy = FaultyProxy(s3_endpoint)
    address = BucketAddress(bucket, "wan", proxy.endpoint)
    artifacts = KnownArtifactStore(BucketArtifactStore(address, retry_for_s=0.1), redis)
    artifacts.verify()
    proxy.answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(ArtifactNotStored, match="does not respond"):
        artifacts.put(KEY, source)
    proxy.close()


def test_a_url_is_signed_while_the_store_hangs(
    make: Make, bucket: str, s3_endpoint: str, clock: Clock, redis: Redis
) -> None:
    proxy = FaultyProxy(s3_endpoint)
    artifacts = make(BucketArtifactStore(BucketAddress(bucket, "wan", proxy.endpoint)))
    assert artifacts.signed_url(KEY, "GET", 60) is not None  # the first one looks
    clock.now_s += 10 * CHECKED_S
    proxy.passes.clear()
    threads = ThreadPoolExecutor(1)
    signed = threads.submit(artifacts.signed_url, KEY, "GET", 60)
    try:
        assert signed.result(20)  # below the time after which a request is given up
    finally:
        proxy.passes.set()
        threads.shutdown()
        proxy.close()
    redis.set(redis_keys.ARTIFACTS_ID, "0" * 32)  # another store was adopted
    for look in (artifacts.verify, lambda: artifacts.signed_url(KEY, "GET", 60)):
        with pytest.raises(ArtifactsUnavailable):
            look()


def test_no_request_is_sent_when_a_store_is_opened(unused_port: int, bucket: str) -> None:
    away = f"127.0.0.1:{unused_port}"
    with connect(f"redis://{away}") as redis:
        artifacts = open_known_artifacts(f"s3://{bucket}/wan?endpoint=http://{away}", redis)
    assert artifacts.is_present is None


def test_a_folder_on_a_share_without_second_names_keeps_its_marker(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exFAT and many FUSE file systems refuse hard links."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    raw = FolderArtifactStore(share.folder)
    raw.write_marker(b"first", replace=False)
    raw.write_marker(b"second", replace=False)
    assert raw.marker() == b"first"
    assert [path.name for path in share.folder.iterdir()] == [MARKER]
