"""Test that nothing a rater's client receives tells the modes apart, but the pixels.

Forty pairs of real videos go from their jobs through the copies to a rater. The jobs' videos are
made easy to tell apart: by their size, notes, encoder settings and dates. A classifier that finds
the mode in them at once has to fail on what the rater receives.
"""

import hashlib
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from jobs.artifacts.store import artifact_key, open_artifacts
from jobs.record import JobRecord, Video
from service.comparisons.model import Arm, Comparison, RatingPlan
from service.comparisons.rating.votes import VoteStore
from service.comparisons.statistics.significance import binomial_test
from service.comparisons.store import ComparisonStore
from service.comparisons.viewing_copies import CopyMaker
from service.settings import ServiceSettings
from tests.service.comparisons.rating.conftest import RaterClient, Seat
from tests.service.comparisons.samples import sample_comparison, sample_pairs

PAIRS = 40
GUESSED_RATERS = 3
"""The classifiers learn from one rater and guess of another. A leak shows with every rater. By
chance, p is at most 0.05 with the first in 1 of 20 runs, and with all three in 1 of 8,000, so the
others are asked only then."""

FOLLOWS_FROM_PIXELS = (b"stsz", b"stco", b"btrt")
"""MP4 boxes that say how long the coded frames are, where they begin, and their bit rate."""
CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
Features = dict[str, float]
Pairs = tuple[list[Features], list[bool]]
"""What was received of each pair, and whether the candidate was on the left."""


def make_video(target: Path, arm: Arm, number: int) -> None:
    """Make a job's video whose size, notes and settings all say which mode it is of."""
    is_candidate = arm is Arm.CANDIDATE
    noise = f"noise=all_seed={number}:alls={20 if is_candidate else 8}"
    source = f"testsrc2=size=96x96:rate=8:duration=0.75,hue=h={9 * number},{noise}:allf=t"
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error"),
        *("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-c:v", "libx264"),
        *("-preset", "ultrafast", "-crf", "20", "-threads", "1"),
        *("-metadata", f"title={'w8a8' if is_candidate else 'bf16'}"),
        *("-metadata", f"creation_time=2026-11-30T10:00:{30 if is_candidate else 10}Z"),
        str(target),
    ]
    subprocess.run(command, check=True, timeout=120)


@pytest.fixture
def blind(
    settings: ServiceSettings, comparisons: ComparisonStore, tmp_path: Path
) -> tuple[Comparison, dict[str, dict[Arm, bytes]], list[str]]:
    """A comparison with copies of real videos; the jobs' videos by pair, and what is secret."""
    rating = RatingPlan(training=0, repeat_share=0, gold=0, identical=0)
    comparison = sample_comparison(PAIRS, seeds=(987_654_321,), rating=rating)
    comparison = comparison.model_copy(update={"pixel_measures": False, "criteria": ("overall",)})
    artifacts = open_artifacts(settings.artifacts_url)
    maker = CopyMaker(artifacts, comparison, lambda: None)
    originals: dict[str, dict[Arm, bytes]] = {}
    secrets = ["bf16", "w8a8", "987654321", "wan-mini", comparison.id, comparison.secret]
    secrets += ["x264", "lavf", "creation_time", "reference", "candidate", "comparisons/"]
    pairs = []
    for number, pair in enumerate(sample_pairs(comparison)):
        jobs = {}
        originals[pair.id] = {}
        for arm in Arm:
            job_id = hashlib.sha256(f"{number}{arm}".encode()).hexdigest()[:32]
            made = tmp_path / "job.mp4"
            make_video(made, arm, number)
            data = made.read_bytes()
            originals[pair.id][arm] = data
            key, sha256 = artifact_key(job_id, "1"), hashlib.sha256(data).hexdigest()
            artifacts.put(key, made)
            shape = {"width": 96, "height": 96, "num_frames": 6, "fps": 8}
            video = Video(key=key, bytes=len(data), sha256=sha256, **shape)
            now = datetime.now(UTC)
            known = {"id": job_id, "video": video, "created_at": now}
            jobs[arm] = JobRecord.model_construct(**known)  # type: ignore[arg-type]
            secrets += [job_id, sha256, sha256[:16]]
        copied = maker.of_jobs(pair, jobs[Arm.REFERENCE], jobs[Arm.CANDIDATE])
        secrets += [
            pair.id,
            *(half.copy_.key.split("/")[-1] for half in copied.halves if half.copy_),
        ]
        pairs.append(copied)
    comparisons.create(comparison, pairs)
    return comparison, originals, secrets


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and end of the payload of each MP4 box, those in containers, too."""
    end = len(data) if end is None else end
    while start < end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        yield kind, start + 8, start + size
        if kind in CONTAINERS:
            yield from boxes(data, start + 8, start + size)
        if kind == b"stsd":  # a header, then one video sample entry with boxes after its fields
            yield from boxes(data, start + 8 + 8 + 86, start + size)
        start += size


def without_payload(data: bytes) -> bytes:
    """The file without coded video, and without what follows from the length of coded frames."""
    left = bytearray(data)
    cut: list[tuple[int, int]] = []
    for kind, start, end in boxes(data):
        if kind in (b"mdat", b"free"):
            cut.append((start - 8, end))  # their sizes add up to what is left of the length
            if kind == b"free":
                assert not any(data[start:end]), "padding is empty"
        elif kind in FOLLOWS_FROM_PIXELS:
            left[start:end] = bytes(end - start)
    for start, end in reversed(cut):
        del left[start:end]
    return bytes(left)


def text_numbers(prefix: str, text: str) -> Features:
    """Numbers that a classifier may find something in: the digits of an opaque text."""
    digits = re.sub("[^0-9a-f]", "", text.lower())[:32].ljust(32, "0")
    return {f"{prefix}{at}": float(int(digit, 16)) for at, digit in enumerate(digits)}


def received(ada: RaterClient, item: dict[str, Any]) -> tuple[dict[str, Features], list[bytes]]:
    """Everything that a rater's client learns of one pair, by side, and all bytes to search."""
    features: dict[str, Features] = {}
    seen: list[bytes] = []
    files: list[bytes] = []
    for side in ("left", "right"):
        started = time.perf_counter()
        whole = ada.get(item[side]["url"])
        took = time.perf_counter() - started
        part = ada.get(item[side]["url"], Range="bytes=0-99")
        head = ada.client.head(item[side]["url"], headers=ada.headers)
        found: Features = {"seconds": took, "bytes": float(len(whole.content))}
        for answer in (whole, part, head):
            names = " ".join(name for name, _ in answer.headers.multi_items())
            found |= {f"{answer.status_code} {names}": 1.0}
            seen.append(repr(answer.headers.multi_items()).encode())
        found |= text_numbers("etag", whole.headers["etag"])
        found["length"] = float(whole.headers["content-length"])
        found |= {name: float(value) for name, value in item[side].items() if name != "url"}
        features[side] = found
        files.append(whole.content)
    assert len(files[0]) == len(files[1])
    assert files[0] != files[1]
    assert without_payload(files[0]) == without_payload(files[1])
    return features, [*seen, *files, repr(item).encode()]


def differences(features: dict[str, Features], shared: Features) -> Features:
    left, right = features["left"], features["right"]
    names = left.keys() | right.keys()
    return shared | {name: left.get(name, 0.0) - right.get(name, 0.0) for name in names}


def guessed(seen: Pairs, asked: Pairs) -> int:
    """How many pairs of a rater two classifiers guess right, the better one; `seen` is another's.

    One takes the threshold of the single feature that separates the seen pairs best; one is a ridge
    regression on all features. Nothing is learned from the pairs that are guessed: among so many
    features one always separates forty pairs well by chance, and leaving out one pair at a time
    does not change which.
    """
    names = sorted(set().union(*seen[0], *asked[0]))
    x, asked_x = (
        np.array([[row.get(name, 0.0) for name in names] for row in rows])
        for rows in (seen[0], asked[0])
    )
    mean, spread = x.mean(axis=0), np.where(x.std(axis=0) == 0, 1, x.std(axis=0))
    x, asked_x = (x - mean) / spread, (asked_x - mean) / spread
    y, truth = (np.where(sides, 1.0, -1.0) for sides in (seen[1], asked[1]))
    agreement = (np.sign(x) * y[:, None]).mean(axis=0)
    best = int(np.abs(agreement).argmax())
    weights = x.T @ np.linalg.solve(x @ x.T + 10 * np.eye(len(y)), y)
    stump = np.sign(asked_x[:, best]) * np.sign(agreement[best])
    return max(int((guess == truth).sum()) for guess in (stump, np.sign(asked_x @ weights)))


def p_value(right: int) -> float:
    """Of as many right guesses or more, or as many wrong ones, doubled for two classifiers."""
    return min(1.0, 2 * binomial_test(right, PAIRS)) if right > PAIRS / 2 else 1.0


@pytest.mark.timeout(900)  # 160 runs of ffmpeg
def test_nothing_but_the_pixels_tells_the_modes_apart(
    blind: tuple[Comparison, dict[str, dict[Arm, bytes]], list[str]],
    seat: Seat,
    votes: VoteStore,
) -> None:
    comparison, originals, secrets = blind
    seen: list[bytes] = []

    def rated(name: str) -> tuple[Pairs, Pairs]:
        """Rate all pairs; return what the rater received, and what a leak would look like."""
        ada = seat(comparison, name)
        rows, control, truth = [], [], []
        for _ in range(PAIRS):
            item = ada.next()
            features, texts = received(ada, item)
            seen.extend(texts)
            known = votes.find(comparison.id, item["item"])
            assert known is not None
            truth.append(known[1].item.candidate_left)
            shared = {
                "number": float(item["number"]),
                "parity": float(item["number"] % 2),
                "prompt": float(item["prompt"].split()[-1]),
                **text_numbers("item", item["item"]),
            }
            rows.append(differences(features, shared))
            sizes = {
                side: {
                    "bytes": float(len(originals[known[1].item.pair_id][known[1].item.arm(side)]))
                }
                for side in ("left", "right")
            }
            control.append(differences(sizes, {}))
            vote = ada.post(f"/rating/items/{item['item']}/vote", {"answers": {"overall": "tie"}})
            assert vote.status_code == 201
            seen.append(repr((vote.text, vote.headers.multi_items())).encode())
        assert ada.get("/rating/next").status_code == 204
        for path in ("/rating", "/session"):
            answer = ada.get(path)
            # The title is what operators write for raters to read.
            shown = answer.text.replace(comparison.title, "")
            seen.append(repr((shown, answer.headers.multi_items())).encode())
        assert sum(truth) == PAIRS / 2
        return (rows, truth), (control, truth)

    learned, learned_control = rated("rater 0")
    found_p = []
    for number in range(GUESSED_RATERS):
        asked, asked_control = rated(f"rater {number + 1}")
        there = p_value(guessed(learned_control, asked_control))
        assert there < 1e-6, "the classifier finds what is there to find"
        found_p.append(p_value(guessed(learned, asked)))
        if found_p[-1] > 0.05:
            break
    assert found_p[-1] > 0.05, found_p
    for secret in secrets:
        for text in seen:
            assert not tells(text, secret), secret


def tells(text: bytes, secret: str) -> bool:
    """Whether a text holds a secret, written or as bytes.

    Opaque ids hold a short secret of hexadecimal digits, such as "bf16", by chance: they do not
    count.
    """
    is_hex = re.fullmatch("([0-9a-f]{2})+", secret) is not None
    if is_hex and len(secret) >= 16:
        return secret.encode() in text.lower() or bytes.fromhex(secret) in text
    return secret.lower().encode() in re.sub(b"[0-9a-f]{16,}", b"", text.lower())


def test_a_short_secret_is_found_but_not_inside_an_id() -> None:
    assert tells(b"mode=BF16;", "bf16")
    assert tells(b"x/bf16.mp4", "bf16")
    assert tells(b"42e882e910bf163d91daa188-bf16", "bf16")
    assert not tells(b"/items/bf163d9142e882e910daa188/left.mp4", "bf16")


def test_the_originals_could_be_told_apart(tmp_path: Path) -> None:
    """The search and the comparison of bytes find what the copies must not have."""
    files = []
    for arm in Arm:
        make_video(tmp_path / "job.mp4", arm, 3)
        files.append((tmp_path / "job.mp4").read_bytes())
    assert b"bf16" in files[0]
    assert b"w8a8" in files[1]
    assert b"x264" in files[0]
    assert without_payload(files[0]) != without_payload(files[1])


@pytest.fixture
def votes(redis: Any) -> VoteStore:
    return VoteStore(redis)
