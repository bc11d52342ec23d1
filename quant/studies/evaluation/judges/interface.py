"""Define what a judge is: something with a name that gives each video one number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import ClassVar, Literal, Protocol, TypeGuard, get_args

from quant.errors import StudyError
from quant.studies.evaluation.video_files import Video
from quant.studies.host import usable_cores

Needs = Literal["pair", "video"]


class Judge(Protocol):
    """Gives each video one number.

    A judge of another package needs these names and nothing of this one. A video has `prompt`,
    `seed`, `file`, `frames()` [F, H, W, 3] uint8 and `latents()`.

    Attributes:
        unit: of its number, "" for a share or an index.
        needs: "pair" compares a video with that of BF16 of the same prompt and seed; "video" looks
            at one alone, and judges BF16, too.
    """

    @property
    def name(self) -> str:
        """Return its name."""
        ...

    @property
    def unit(self) -> str:
        """Return the unit of its number."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Return whether a higher number is better."""
        ...

    @property
    def needs(self) -> Needs:
        """Return what it looks at."""
        ...

    def scores(self, videos: Sequence[Video], references: Sequence[Video]) -> Iterator[float]:
        """Yield a number for each video, in order; the i-th reference is the i-th video's."""
        ...


class EachVideo:
    """The part of a judge that looks at one video after the other.

    Attributes:
        threads: how many videos it looks at, at most, at the same time; never more than there are
            cores, because each holds its frames.
    """

    threads: ClassVar[int] = 1

    @abstractmethod
    def score(self, video: Video, reference: Video) -> float:
        """Return the number of a video."""

    def scores(self, videos: Sequence[Video], references: Sequence[Video]) -> Iterator[float]:
        """Yield the number of each video."""
        pairs = list(zip(videos, references, strict=True))
        with ThreadPoolExecutor(min(self.threads, usable_cores()), "judge") as pool:
            try:
                yield from pool.map(lambda pair: self.score(*pair), pairs)
            finally:
                pool.shutdown(cancel_futures=True)


def plug_in(text: str) -> Judge:
    """Load a judge of another package, given as "module:name".

    The name is that of a judge, or of a class or function that returns one.

    Raises:
        StudyError: there is no such name, or it is no judge.
    """
    module, _, name = text.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StudyError(f"there is no judge {text!r}: {error}") from error
    judge = found() if callable(found) else found
    if not _is_judge(judge):
        raise StudyError(
            f"{text!r} is no judge: it needs name, unit, higher_is_better, needs ('pair' or "
            "'video') and scores(videos, references)"
        )
    return judge


def _is_judge(found: object) -> TypeGuard[Judge]:
    names = ("name", "unit", "higher_is_better", "scores")
    return all(hasattr(found, name) for name in names) and (
        getattr(found, "needs", None) in get_args(Needs)
    )
