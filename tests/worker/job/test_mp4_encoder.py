"""Test that frames become a file that every player takes, and that failures are clear."""

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from jobs.errors import GenerationFailed
from worker.interface import Frame
from worker.job.mp4_encoder import VideoFormat, encode_mp4

FORMAT = VideoFormat(width=96, height=64, num_frames=17, fps=8)


def never_stop() -> None:
    """A check of a job that is not stopped."""


def gradient(count: int, width: int = 96, height: int = 64) -> Iterator[Frame]:
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    for index in range(count):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[..., 0] = ramp
        frame[..., 1] = index * 10 % 256
        yield frame


def ffmpeg_output(path: Path) -> str:
    """What `ffmpeg -i` prints about a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def comment_of(path: Path) -> dict[str, object]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.search(r"^comment=(.*)$", text, re.MULTILINE)
    assert line is not None, text
    metadata: dict[str, object] = json.loads(re.sub(r"\\(.)", r"\1", line.group(1)))
    return metadata


def decoded(path: Path) -> list[Frame]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return list(np.frombuffer(data, np.uint8).reshape(-1, FORMAT.height, FORMAT.width, 3))


def test_file_is_h264_yuv420p_with_every_frame_at_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    done = encode_mp4(gradient(17), path, FORMAT, "a title", {}, never_stop)
    output = ffmpeg_output(path)
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709", output), output
    assert re.search(r"96x64.* 8 fps", output), output
    assert imageio_ffmpeg.count_frames_and_secs(str(path)) == (17, pytest.approx(17 / 8, abs=0.01))
    assert done.bytes == path.stat().st_size
    assert done.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert done.waited_s > 0


def test_pictures_survive_the_encoding(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    encode_mp4(gradient(17), path, FORMAT, "a title", {}, never_stop)
    for got, sent in zip(decoded(path), gradient(17), strict=True):
        assert np.abs(got.astype(int) - sent.astype(int)).mean() < 4


def test_playback_can_start_before_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    encode_mp4(gradient(17), path, FORMAT, "a title", {}, never_stop)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_metadata_and_title_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    metadata = {"seed": 7, "mode": "w8a8", "odd": 'a "quoted" = value; # ü', "recipe": None}
    encode_mp4(gradient(17), path, FORMAT, "wan-mini w8a8 seed 7", metadata, never_stop)
    assert comment_of(path) == metadata
    assert re.search(r"title +: wan-mini w8a8 seed 7$", ffmpeg_output(path), re.MULTILINE)


def test_frames_are_taken_one_by_one(tmp_path: Path) -> None:
    """Each frame is taken before the next is asked for: nothing waits for the whole clip."""
    alive: list[int] = []

    def frames() -> Iterator[Frame]:
        for index, frame in enumerate(gradient(17)):
            alive.append(index)
            yield frame

    encode_mp4(frames(), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop)
    assert alive == list(range(17))


@pytest.mark.parametrize("count", [0, 16, 18])
def test_another_number_of_frames_is_a_failure(tmp_path: Path, count: int) -> None:
    with pytest.raises(GenerationFailed, match="17"):
        encode_mp4(gradient(count), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop)


def test_no_frame_is_asked_for_after_one_too_many(tmp_path: Path) -> None:
    """Each costs the device's time, and an engine that never ends must not fill the disk."""
    asked: list[int] = []

    def frames() -> Iterator[Frame]:
        for index, frame in enumerate(gradient(40)):
            asked.append(index)
            yield frame

    with pytest.raises(GenerationFailed, match="announced were 17 frames"):
        encode_mp4(frames(), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop)
    assert asked == list(range(18))


def test_another_shape_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(GenerationFailed, match=r"\(64, 48, 3\).*\(64, 96, 3\)"):
        encode_mp4(
            gradient(17, width=48), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop
        )


def test_a_file_that_cannot_be_written_says_why_and_asks_for_no_more_frames(
    tmp_path: Path,
) -> None:
    taken = 0

    def frames() -> Iterator[Frame]:
        nonlocal taken
        for frame in gradient(1000, 640, 480):
            taken += 1
            yield frame

    format_ = VideoFormat(640, 480, 1000, 8)
    with pytest.raises(GenerationFailed, match="No such file or directory"):
        encode_mp4(frames(), tmp_path / "missing" / "video.mp4", format_, "a title", {}, never_stop)
    assert taken < 1000


def test_a_job_can_be_stopped_while_ffmpeg_is_busy(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    # A frame is forty times what a pipe holds, so writing waits for ffmpeg.
    format_ = VideoFormat(1280, 720, 1000, 8)
    with pytest.raises(Stop):
        encode_mp4(gradient(1000, 1280, 720), tmp_path / "video.mp4", format_, "", {}, stop)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in listed.stdout


def test_a_job_can_be_stopped_while_the_file_is_finished(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    came = 0

    def frames() -> Iterator[Frame]:
        nonlocal came
        for frame in gradient(60, 1280, 720):
            yield frame
            came += 1

    def stop() -> None:
        if came == 60:
            raise Stop

    # Some dozen frames are still inside the encoder when the last has been taken.
    format_ = VideoFormat(1280, 720, 60, 8)
    with pytest.raises(Stop):
        encode_mp4(frames(), tmp_path / "video.mp4", format_, "", {}, stop)


def test_ffmpeg_ends_with_a_cancelled_job(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def frames() -> Iterator[Frame]:
        yield from gradient(3)
        raise Stop

    with pytest.raises(Stop):
        encode_mp4(frames(), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in listed.stdout
