"""Make what raters see: copies of the videos of a pair, which nothing tells apart but the pixels.

The copies are kept below `comparisons/`, under names that only the comparison's secret explains,
for as long as the comparison exists; the jobs' own videos may be deleted before. The same pair gets
the same names again, so a round that was interrupted leaves nothing behind.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from jobs.artifacts.store import ArtifactStore
from jobs.record import Failure, JobRecord, Video
from service.comparisons import media
from service.comparisons.model import (
    Arm,
    Comparison,
    HalfState,
    Pair,
    PairKind,
    PairState,
    PixelMeasures,
    ViewingCopy,
)

PREFIX: Final = "comparisons"


class VideoMissing(Exception):
    """The video of one half is not in the artifact store."""

    def __init__(self, arm: Arm) -> None:
        super().__init__(arm)
        self.arm = arm
        self.failure = Failure(
            code="video_gone",
            detail="The video was deleted before it was copied for raters; retry makes it again.",
        )


class CopyMaker:
    """Makes the copies of one comparison.

    Every method raises ArtifactsUnavailable or another error of the artifact store, and FfmpegAway:
    then nothing was decided, and the same may be tried again.

    Args:
        check: called while the artifact store keeps a copy waiting; what it raises ends that.
    """

    def __init__(
        self, artifacts: ArtifactStore, comparison: Comparison, check: Callable[[], None]
    ) -> None:
        self._artifacts = artifacts
        self._comparison = comparison
        self._check = check

    def of_jobs(self, pair: Pair, reference: JobRecord, candidate: JobRecord) -> Pair:
        """Return a test pair with copies of the videos of its two jobs, and with its measures.

        Raises:
            VideoMissing: a video is no longer stored.
            FfmpegRefused: ffmpeg cannot read a video.
        """
        videos = [_of_video(job.video) for job in (reference, candidate) if job.video is not None]
        assert len(videos) == len(Arm), "a job that has succeeded has a video"
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for arm, video in zip(Arm, videos, strict=True):
                original, copy = Path(folder, f"{arm}-job.mp4"), Path(folder, f"{arm}.mp4")
                self._fetch(video.key, original, arm)
                media.remux(original, copy)
                files.append(copy)
            measures = media.measure(*files) if self._comparison.pixel_measures else None
            return self._with_copies(pair, files, videos, measures)

    def of_source(self, pair: Pair, source: Pair) -> Pair:
        """Return a gold, identical or training pair with copies made from those of a test pair.

        Raises:
            VideoMissing, FfmpegRefused: as `of_jobs`.
        """
        # As often from one mode as from the other, on average.
        drawn = int(self._comparison.opaque("arm", pair.id), 16) % 2
        copy = source.halves[drawn].copy_
        assert copy is not None, "a source has copies"
        with tempfile.TemporaryDirectory() as folder:
            original = Path(folder, "source.mp4")
            files = [Path(folder, f"{arm}.mp4") for arm in Arm]
            self._fetch(copy.key, original, Arm.REFERENCE)
            for arm, file in zip(Arm, files, strict=True):
                if is_damaged(pair):
                    # The intact half is the candidate, as the statistics expect.
                    media.encode_again(original, file, copy, damaged=arm is Arm.REFERENCE)
                else:
                    media.remux(original, file)
            named = pair.model_copy(
                update={"source": source.id, "prompt_id": source.prompt_id, "seed": source.seed}
            )
            return self._with_copies(named, files, [copy, copy], None)

    def _fetch(self, key: str, target: Path, arm: Arm) -> None:
        size = self._artifacts.size(key)
        if size is None:
            raise VideoMissing(arm)
        with target.open("wb") as out:
            for chunk in self._artifacts.read(key, 0, size):
                out.write(chunk)

    def _with_copies(
        self,
        pair: Pair,
        files: list[Path],
        shapes: list[ViewingCopy],
        measures: PixelMeasures | None,
    ) -> Pair:
        length = media.pad_to_equal_length(files)
        for arm, file, shape in zip(Arm, files, shapes, strict=True):
            half = pair.half(arm)
            name = self._comparison.opaque("copy", pair.id, pair.source, arm.value, half.attempt)
            key = f"{PREFIX}/{self._comparison.id}/{name}.mp4"
            self._artifacts.put(key, file, self._check)
            copy = shape.model_copy(update={"key": key, "bytes": length})
            made = {"copy_": copy, "state": HalfState.SUCCEEDED}
            pair = pair.with_half(arm, half.model_copy(update=made))
        return pair.model_copy(update={"measures": measures, "failure": None})


def is_damaged(pair: Pair) -> bool:
    """Return whether the reference of this pair is a damaged video.

    Training pairs alternate between a difference that everybody sees and none at all.
    """
    return pair.kind is PairKind.GOLD or (pair.kind is PairKind.TRAINING and pair.number % 2 == 0)


def choose_source(comparison: Comparison, pairs: Sequence[Pair], tests: int) -> Pair | None:
    """Choose the test pair that a gold, identical or training pair is made from.

    One that was not chosen yet, or any once all videos are made; None if none is ready.
    """
    taken = {pair.source for pair in pairs}
    tested = [pair for pair in pairs if pair.kind is PairKind.TEST]
    ready = [pair for pair in tested if pair.state is PairState.READY]
    free = [pair for pair in ready if pair.id not in taken]
    have_ended = sum(pair.state in (PairState.READY, PairState.FAILED) for pair in tested) == tests
    chosen_from = free or (ready if have_ended else [])
    if not chosen_from:
        return None
    return min(chosen_from, key=lambda pair: comparison.opaque("source", len(taken), pair.id))


def delete_copies(artifacts: ArtifactStore, comparison_id: str) -> None:
    """Delete all files of a comparison. Raises ArtifactsUnavailable."""
    for stored in list(artifacts.list(f"{PREFIX}/{comparison_id}")):
        artifacts.delete(stored.key)


def _of_video(video: Video) -> ViewingCopy:
    return ViewingCopy(
        key=video.key,
        bytes=video.bytes,
        width=video.width,
        height=video.height,
        fps=video.fps,
        num_frames=video.num_frames,
    )
