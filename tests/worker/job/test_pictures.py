"""Test that thumbnails and spritesheets show the frames, and that their failure is harmless."""

import gc
import hashlib
import subprocess
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.launcher import decode_video
from worker.interface import Frame
from worker.job.mp4_encoder import VideoFormat
from worker.job.pictures import (
    AreaScaler,
    EncodedPicture,
    EncodedPictures,
    PictureCollector,
    SheetLayout,
    fitted,
)

FORMAT = VideoFormat(width=96, height=64, num_frames=17, fps=8)


def coloured(video: VideoFormat) -> Iterator[Frame]:
    """Frames of one colour each: dark green at first, light red at last, with a blue right half."""
    for index in range(video.num_frames):
        share = index / max(1, video.num_frames - 1)
        frame = np.zeros((video.height, video.width, 3), np.uint8)
        frame[..., 0] = round(40 + 180 * share)
        frame[..., 1] = round(120 - 80 * share)
        frame[:, video.width // 2 :, 2] = 150
        yield frame


def made(video: VideoFormat, folder: Path) -> EncodedPictures:
    collector = PictureCollector(video)
    for _ in collector.watch(coloured(video)):
        pass
    pictures = collector.encode(folder)
    assert pictures is not None
    return pictures


def decoded(picture: EncodedPicture) -> Frame:
    assert picture.bytes == picture.path.stat().st_size
    assert picture.sha256 == hashlib.sha256(picture.path.read_bytes()).hexdigest()
    (only,) = decode_video(picture.path, picture.width, picture.height)
    return np.asarray(only)


def decoded_alpha(picture: EncodedPicture) -> NDArray[np.uint8]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(picture.path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgba", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(picture.height, picture.width, 4)[..., 3]


def assert_alike(got: Frame, wanted: Frame) -> None:
    """Compare the means of both halves; WebP blurs the colours of the edge between them."""
    middle = got.shape[1] // 2
    for half in (np.s_[:, : middle - 4], np.s_[:, middle + 4 :]):
        means = got[half].reshape(-1, 3).mean(0)
        assert means == pytest.approx(wanted[half].reshape(-1, 3).mean(0), abs=4)


@pytest.mark.parametrize(
    ("video", "thumbnail", "cell", "grid"),
    [
        (VideoFormat(96, 96, 17, 8), (96, 96), (96, 96), (5, 4, 17)),
        (VideoFormat(64, 32, 1, 8), (64, 32), (64, 32), (1, 1, 1)),
        (VideoFormat(64, 96, 5, 8), (64, 96), (64, 96), (3, 2, 5)),
        (VideoFormat(832, 480, 81, 16), (320, 184), (160, 92), (5, 5, 25)),
        (VideoFormat(480, 832, 81, 16), (184, 320), (92, 160), (5, 5, 25)),
        (VideoFormat(1280, 720, 33, 16), (320, 180), (160, 90), (5, 5, 25)),
    ],
    ids=lambda value: (
        "x".join(map(str, (value.width, value.height, value.num_frames)))
        if isinstance(value, VideoFormat)
        else None
    ),
)
def test_pictures_have_their_size_and_show_the_frames(
    tmp_path: Path,
    video: VideoFormat,
    thumbnail: tuple[int, int],
    cell: tuple[int, int],
    grid: tuple[int, int, int],
) -> None:
    pictures, frames = made(video, tmp_path), list(coloured(video))
    assert (pictures.thumbnail.width, pictures.thumbnail.height) == thumbnail
    middle = frames[video.num_frames // 2]
    assert_alike(
        decoded(pictures.thumbnail),
        AreaScaler(video, thumbnail).scale(middle),
    )
    layout = pictures.layout
    assert (layout.frame_width, layout.frame_height) == cell
    assert (layout.columns, layout.rows, len(layout.frames)) == grid
    sheet = decoded(pictures.spritesheet)
    assert sheet.shape[:2] == (layout.rows * cell[1], layout.columns * cell[0])
    alpha = decoded_alpha(pictures.spritesheet)
    scaler = AreaScaler(video, cell)
    for place in range(layout.columns * layout.rows):
        row, column = divmod(place, layout.columns)
        part, opacity = (
            each[row * cell[1] :, column * cell[0] :][: cell[1], : cell[0]]
            for each in (sheet, alpha)
        )
        is_frame = place < len(layout.frames)
        assert set(opacity.flat) == {255 if is_frame else 0}
        if is_frame:
            assert_alike(part, scaler.scale(frames[layout.frames[place]]))


@pytest.mark.parametrize("num_frames", [1, 5, 17, 24, 25, 26, 29, 81, 121])
def test_frames_are_evenly_spaced_from_the_first_to_the_last(num_frames: int) -> None:
    layout = SheetLayout.of(VideoFormat(832, 480, num_frames, 16))
    assert layout.frames[0] == 0
    assert layout.frames[-1] == num_frames - 1
    assert len(layout.frames) == min(25, num_frames)
    assert max(layout.columns, layout.rows) <= 5
    gaps = set(np.diff(layout.frames).tolist())
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_scaling_takes_the_mean_of_the_area() -> None:
    frame = np.zeros((4, 6, 3), np.uint8)
    frame[:2, :3] = (200, 100, 50)
    frame[0, 0] = (0, 0, 0)
    small = AreaScaler(VideoFormat(6, 4, 1, 8), (2, 2)).scale(frame)
    assert small[0, 0].tolist() == [round(200 * 5 / 6), round(100 * 5 / 6), round(50 * 5 / 6)]
    assert small[1].max() == small[0, 1].max() == 0
    thirds = AreaScaler(VideoFormat(3, 2, 1, 8), (2, 2))
    row = np.array([[[0] * 3, [91] * 3, [240] * 3]] * 2, np.uint8)
    assert thirds.scale(row)[0, :, 0].tolist() == [46, 240]
    white = np.full((480, 832, 3), 255, np.uint8)
    assert AreaScaler(VideoFormat(832, 480, 1, 8), (160, 92)).scale(white).min() == 255


@pytest.mark.parametrize(("width", "height"), [(832, 480), (1280, 720), (720, 1280), (16, 4096)])
def test_sides_are_even_and_bounded(width: int, height: int) -> None:
    for longest in (160, 320):
        size = fitted(width, height, longest)
        assert max(size) == longest
        assert min(size) >= 2
        assert not any(side % 2 for side in size)


def test_no_frame_is_kept(tmp_path: Path) -> None:
    """Whole frames pass through: at most the latest one is alive beside the one being made."""
    video = VideoFormat(832, 480, 81, 16)
    seen: list[weakref.ref[Frame]] = []
    most = 0

    def alive() -> int:
        return sum(each() is not None for each in seen)

    def frames() -> Iterator[Frame]:
        nonlocal most
        for frame in coloured(video):
            seen.append(weakref.ref(frame))
            most = max(most, alive())
            yield frame

    collector = PictureCollector(video)
    for _ in collector.watch(frames()):
        pass
    del _
    gc.collect()
    assert most <= 3
    assert alive() == 0
    assert collector.encode(tmp_path) is not None


def test_a_frame_whose_memory_is_used_again_does_no_harm(tmp_path: Path) -> None:
    def reused() -> Iterator[Frame]:
        buffer = np.zeros((FORMAT.height, FORMAT.width, 3), np.uint8)
        for frame in coloured(FORMAT):
            buffer[:] = frame
            yield buffer

    collector = PictureCollector(FORMAT)
    for _ in collector.watch(reused()):
        pass
    pictures = collector.encode(tmp_path)
    assert pictures is not None
    assert_alike(decoded(pictures.thumbnail), list(coloured(FORMAT))[8])


FAULTS = {
    "without libwebp": ("echo \"Unknown encoder 'libwebp'\" >&2; exit 8", "Unknown encoder"),
    "hangs": ("exec sleep 60", "not finished a picture within 0.3 s"),
    "writes nothing": ('for last; do :; done; : > "$last"', "left thumbnail.webp empty"),
    "dies": ("kill -9 $$", "ffmpeg ended with status -9: it said nothing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_ffmpeg_that_fails_gives_no_pictures_and_one_line_in_the_log(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script, said = FAULTS[fault]
    broken = tmp_path / "ffmpeg"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    collector = PictureCollector(FORMAT, timeout_s=0.3 if fault == "hangs" else 10)
    for _ in collector.watch(coloured(FORMAT)):
        pass
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    started = time.monotonic()
    assert collector.encode(tmp_path) is None
    assert time.monotonic() - started < 10
    (line,) = caplog.messages
    assert line.startswith("the video has no pictures: ")
    assert said in line


def test_pictures_name_nobody_and_nothing(tmp_path: Path) -> None:
    """They hold no time, no path and no encoder: equal frames give equal bytes."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = made(FORMAT, tmp_path / "one"), made(FORMAT, tmp_path / "two")
    assert one.thumbnail.sha256 == two.thumbnail.sha256
    assert one.spritesheet.sha256 == two.spritesheet.sha256
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(one.spritesheet.path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "Metadata" not in told
