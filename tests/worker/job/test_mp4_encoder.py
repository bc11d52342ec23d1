"""Test that frames become a file that every player takes, and that failures are clear."""

import hashlib
import itertools
import json
import os
import re
import shlex
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from jobs.errors import GenerationFailed, WorkerUnfit
from worker.interface import Frame
from worker.job import mp4_encoder
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
    # ffmpeg names one standard if matrix, primaries and transfer are of the same, else all three.
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709(, progressive)?\)", output), output
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


def boxes(data: bytes) -> dict[bytes, bytes]:
    """The bodies of the boxes that lie side by side in a part of an MP4, by their types."""
    found, at = {}, 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        found[name] = data[at + 8 : at + size]
        at += size
    return found


def sample_entry(path: Path) -> dict[bytes, bytes]:
    """The boxes in the description of the video's samples: its decoder, colours and ratio."""
    data = path.read_bytes()
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        data = boxes(data)[name]
    # The entries follow a version and their number; boxes follow 78 bytes of fields.
    return boxes(boxes(data[8:])[b"avc1"][78:])


def test_the_container_has_all_three_colour_tags_and_limited_range(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    encode_mp4(gradient(17), path, FORMAT, "a title", {}, never_stop)
    # ISO 14496-12: nclx, then primaries, transfer and matrix (1 is BT.709), and full range.
    assert sample_entry(path)[b"colr"] == struct.pack(">4sHHHB", b"nclx", 1, 1, 1, 0)


def test_the_stream_itself_has_the_tags(tmp_path: Path) -> None:
    """Some players read the stream and not the container."""
    path, stream = tmp_path / "video.mp4", tmp_path / "video.h264"
    encode_mp4(gradient(17), path, FORMAT, "a title", {}, never_stop)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-c", "copy"]
    subprocess.run([*command, "-f", "h264", str(stream)], check=True)
    output = ffmpeg_output(stream)
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709(, progressive)?\)", output), output


PATCH_PX = 16


def colour_chart() -> tuple[Frame, list[tuple[int, ...]]]:
    """Patches of flat colours, eight a row: all combinations of four levels."""
    colours = list(itertools.product((0, 85, 170, 255), repeat=3))
    rows = np.array(colours, np.uint8).reshape(8, 8, 3)
    return np.repeat(np.repeat(rows, PATCH_PX, 0), PATCH_PX, 1), colours


def in_rgb(planes: Frame, width: int, height: int) -> np.ndarray:
    """Convert a frame in yuv420p by BT.709's own formulas, [H/2, W/2, 3] in levels of 0 to 255."""
    luma, rest = np.split(planes.astype(float), [width * height])
    y = luma.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    y = (y - 16) / 219
    blue, red = (rest.reshape(2, height // 2, width // 2) - 128) / 224
    r, b = y + 1.5748 * red, y + 1.8556 * blue
    return np.stack([r, (y - 0.2126 * r - 0.0722 * b) / 0.7152, b], -1) * 255


def test_colours_come_back_within_two_levels(tmp_path: Path) -> None:
    chart, colours = colour_chart()
    width = height = 8 * PATCH_PX
    path = tmp_path / "video.mp4"
    video = VideoFormat(width, height, 5, 8)
    encode_mp4([chart] * 5, path, video, "a title", {}, never_stop)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    for planes in np.frombuffer(data, np.uint8).reshape(5, -1):
        shown = in_rgb(planes, width, height)
        # Without the edges, where chroma at half the resolution mixes two patches.
        patches = shown.reshape(8, PATCH_PX // 2, 8, PATCH_PX // 2, 3)[:, 2:-2, :, 2:-2]
        means = patches.mean((1, 3)).reshape(-1, 3)
        assert np.abs(means - colours).max() <= 2


def test_the_same_frames_give_the_same_bytes_on_any_number_of_cores(tmp_path: Path) -> None:
    paths = [tmp_path / "one.mp4", tmp_path / "two.mp4"]
    cores = os.sched_getaffinity(0)
    format_ = VideoFormat(320, 240, 17, 8)
    try:
        for path, used in zip(paths, (cores, {min(cores)}), strict=True):
            os.sched_setaffinity(0, used)  # ffmpeg inherits it, and x264 counts these
            encode_mp4(gradient(17, 320, 240), path, format_, "a title", {"seed": 7}, never_stop)
    finally:
        os.sched_setaffinity(0, cores)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_nothing_names_the_version_of_ffmpegs_libraries_or_the_time(tmp_path: Path) -> None:
    """Another ffmpeg with the same x264 gives the same bytes."""
    path = tmp_path / "video.mp4"
    encode_mp4(gradient(17), path, FORMAT, "a title", {}, never_stop)
    data = path.read_bytes()
    assert not re.findall(rb"Lav[a-z]+\d", data)
    header = boxes(boxes(data)[b"moov"])[b"mvhd"]
    assert header[4:12] == bytes(8), "when it was made, and when changed"


def test_the_hash_of_the_frames_is_that_of_their_shape_and_bytes(tmp_path: Path) -> None:
    done = encode_mp4(gradient(17), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop)
    data = b"rgb24 17 64 96\n" + b"".join(frame.tobytes() for frame in gradient(17))
    assert done.frames_sha256 == hashlib.sha256(data).hexdigest()


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


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that replaces ffmpeg by a shell script; `$REAL` is the real one."""
    path, real = tmp_path / "ffmpeg", imageio_ffmpeg.get_ffmpeg_exe()

    def replace(script: str) -> None:
        path.write_text(f"#!/bin/sh\nREAL={shlex.quote(real)}\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    return replace


@pytest.mark.parametrize("status", [1, 228, 255])
def test_a_failure_after_the_last_frame_is_a_failure(
    tmp_path: Path, ffmpeg: Callable[[str], None], status: int
) -> None:
    """Though the file is there, and whole."""
    ffmpeg(f'"$REAL" "$@"; echo "Error writing {tmp_path}/a-b/video.mp4" >&2; exit {status}')
    path = tmp_path / "video.mp4"
    with pytest.raises(WorkerUnfit) as caught:
        encode_mp4(gradient(17), path, FORMAT, "a title", {}, never_stop)
    ffmpeg('exec "$REAL" "$@"')
    assert len(decoded(path)) == 17
    assert str(caught.value) == f"ffmpeg ended with status {status}: Error writing video.mp4."


def test_a_killed_ffmpeg_is_named_by_its_signal(
    tmp_path: Path, ffmpeg: Callable[[str], None]
) -> None:
    ffmpeg("kill -9 $$")
    with pytest.raises(WorkerUnfit, match="killed by signal 9"):
        encode_mp4(gradient(17), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exec sleep 600", "taken no frames for 0.3 s"),
        ("head -c 100000 > /dev/null; exec sleep 600", "taken no frames for 0.3 s"),
        ("exec 0<&-; exec sleep 600", "not ended within 0.3 s"),
        ("cat > /dev/null; exec sleep 600", "not ended within 0.3 s"),
    ],
    ids=["never-reads", "stops-reading", "closes-its-input", "never-ends"],
)
def test_an_ffmpeg_that_hangs_is_given_up_and_ended(
    tmp_path: Path,
    ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    said: str,
) -> None:
    monkeypatch.setattr(mp4_encoder, "STALLED_S", 0.3)
    ffmpeg(f"echo $$ > {tmp_path}/pid; {script}")
    format_ = VideoFormat(640, 480, 17, 8)  # more than a pipe holds
    with pytest.raises(WorkerUnfit, match=said):
        encode_mp4(
            gradient(17, 640, 480), tmp_path / "video.mp4", format_, "a title", {}, never_stop
        )
    pid = (tmp_path / "pid").read_text().strip()
    listed = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, check=False)
    assert not listed.stdout.strip(), "it has ended and was waited for"


def test_an_ffmpeg_that_is_slow_is_not_given_up(
    tmp_path: Path, ffmpeg: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit counts from the last byte that was taken, not from the first."""
    monkeypatch.setattr(mp4_encoder, "STALLED_S", 1.0)
    pieces = "; ".join("head -c 200000 > /dev/null; sleep 0.2" for _ in range(8))
    ffmpeg(f"({pieces}; cat > /dev/null); exit 7")
    format_ = VideoFormat(640, 480, 17, 8)
    with pytest.raises(WorkerUnfit, match="status 7"):
        encode_mp4(
            gradient(17, 640, 480), tmp_path / "video.mp4", format_, "a title", {}, never_stop
        )


@pytest.mark.parametrize("name", ["missing", "not-executable", "no-program"])
def test_an_ffmpeg_that_does_not_start_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    if name != "missing":
        path.write_text("neither a script nor a program")
        path.chmod(0o755 if name == "no-program" else 0o644)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    with pytest.raises(WorkerUnfit, match=r"ffmpeg does not start: .* IMAGEIO_FFMPEG_EXE"):
        encode_mp4(gradient(17), tmp_path / "video.mp4", FORMAT, "a title", {}, never_stop)
