"""Define the miniature's world: its scenes, their captions, and the split of scenes into sets.

A `Scene` contains discrete facts only. `mini/world/render.py` draws the continuous values
(positions, speeds, radii) from a random generator and renders the frames. `caption` expresses the
facts in several wordings. `parse_caption` inverts every wording, so a caption has exactly one
scene. `split_of` assigns each scene, and thereby each caption, to exactly one of the training,
calibration and evaluation sets.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

BACKGROUNDS = {
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "navy": (20, 25, 80),
}
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 240),
    "yellow": (245, 215, 40),
    "orange": (245, 140, 30),
    "purple": (150, 60, 200),
    "cyan": (60, 210, 225),
    "pink": (250, 130, 190),
}
SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "five-pointed star"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
MOTIONS = {
    "still": ("staying still", "standing still", "not moving"),
    "right": ("moving right", "moving to the right", "sliding right"),
    "left": ("moving left", "moving to the left", "sliding left"),
    "up": ("moving up", "moving upwards", "rising"),
    "down": ("moving down", "moving downwards", "sinking"),
    "circling": ("circling", "moving in a circle", "going round in a circle"),
    "bouncing": ("bouncing", "bouncing up and down", "hopping"),
    "swaying": ("swaying", "swaying from side to side", "swinging left and right"),
    "growing": ("growing", "getting bigger", "expanding"),
    "shrinking": ("shrinking", "getting smaller", "contracting"),
}
# Two things share one motion, which must keep them apart and inside the frame.
PAIR_MOTIONS = ("still", "right", "left", "up", "down")
# Relations of (first, second): wordings that name the first thing first, then the second first.
RELATIONS = {
    "left": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "over"), ("below", "under")),
}
PAIR_SHARE = 0.3


class Split(StrEnum):
    """The set that a scene belongs to: 90 %, 5 % and 5 % of all scenes."""

    TRAIN = "train"
    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """The facts of one object: keys of SIZES, COLOURS and SHAPES."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Scene:
    """The facts of one video.

    Attributes:
        things: one thing, or two of different colours.
        relation: "left" or "above", of the first thing with respect to the second; None exactly if
            there is one thing.
    """

    things: tuple[Thing, ...]
    motion: str
    background: str
    relation: str | None = None

    @property
    def key(self) -> str:
        """Return the facts as one line, equal for equal scenes."""
        things = "+".join(f"{t.size} {t.colour} {t.shape}" for t in self.things)
        return f"{things}|{self.relation}|{self.motion}|{self.background}"


def split_of(scene: Scene) -> Split:
    """Return the set that a scene belongs to, from a hash of its facts."""
    bucket = int.from_bytes(hashlib.sha256(scene.key.encode()).digest()[:8], "big") % 100
    if bucket < 5:
        return Split.EVALUATION
    return Split.CALIBRATION if bucket < 10 else Split.TRAIN


def sample_scene(rng: random.Random, split: Split, pair_share: float = PAIR_SHARE) -> Scene:
    """Draw a scene of `split`; with probability `pair_share` it has two things."""
    while True:
        scene = _any_scene(rng, pair=rng.random() < pair_share)
        if split_of(scene) is split:
            return scene


def _any_scene(rng: random.Random, pair: bool) -> Scene:
    colours = rng.sample(list(COLOURS), 2 if pair else 1)
    things = tuple(
        Thing(rng.choice(list(SIZES)), colour, rng.choice(list(SHAPES))) for colour in colours
    )
    motion = rng.choice(PAIR_MOTIONS if pair else list(MOTIONS))
    relation = rng.choice(list(RELATIONS)) if pair else None
    return Scene(things, motion, rng.choice(list(BACKGROUNDS)), relation)


def caption(scene: Scene, rng: random.Random) -> str:
    """Return a random wording of the scene."""
    subject = _subject(scene, rng)
    motion = rng.choice(MOTIONS[scene.motion])
    if scene.relation:
        motion = rng.choice((f"both {motion}", f"together {motion}"))
    ground = rng.choice((f"a {scene.background} background", f"a {scene.background} backdrop"))
    return rng.choice(
        (
            f"{subject} {motion} on {ground}",
            f"{subject}, {motion}, against {ground}",
            f"on {ground}, {subject} {motion}",
        )
    )


def captions_of(split: Split, count: int, seed: int = 0) -> list[str]:
    """Draw `count` different captions of one split; the same seed gives the same captions."""
    rng = random.Random(f"{split} prompts {seed}")
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[caption(sample_scene(rng, split), rng)] = None
    return list(captions)


def plain_caption(scene: Scene) -> str:
    """Return the first wording of the scene, the same every time."""
    if scene.relation is None:
        subject = _thing(scene.things[0], None)
        motion = MOTIONS[scene.motion][0]
    else:
        first, second = (_thing(thing, None) for thing in scene.things)
        subject = f"{first} {RELATIONS[scene.relation][0][0]} {second}"
        motion = f"both {MOTIONS[scene.motion][0]}"
    return f"{subject} {motion} on a {scene.background} background"


def _subject(scene: Scene, rng: random.Random) -> str:
    if scene.relation is None:
        return _thing(scene.things[0], rng)
    direct, inverse = RELATIONS[scene.relation]
    first, second = (_thing(thing, rng) for thing in scene.things)
    if rng.random() < 0.5:
        return f"{first} {rng.choice(direct)} {second}"
    return f"{second} {rng.choice(inverse)} {first}"


def _thing(thing: Thing, rng: random.Random | None) -> str:
    size, shape = SIZES[thing.size], SHAPES[thing.shape]
    if rng is None:
        return f"a {size[0]} {thing.colour} {shape[0]}"
    return f"a {rng.choice(size)} {thing.colour} {rng.choice(shape)}"


def _alternatives(wordings: Mapping[str, tuple[str, ...]]) -> str:
    phrases = sorted(itertools.chain.from_iterable(wordings.values()), key=len, reverse=True)
    return "|".join(re.escape(phrase) for phrase in phrases)


def _meaning(phrase: str, wordings: Mapping[str, tuple[str, ...]]) -> str:
    return next(fact for fact, phrases in wordings.items() if phrase in phrases)


_THING = rf"a ({_alternatives(SIZES)}) ({'|'.join(COLOURS)}) ({_alternatives(SHAPES)})"
_MOTION = rf"(?:(?:both|together) )?({_alternatives(MOTIONS)})"
_GROUND = rf"a ({'|'.join(BACKGROUNDS)}) (?:background|backdrop)"
_DIRECT = {fact: phrases for fact, (phrases, _) in RELATIONS.items()}
_INVERSE = {fact: phrases for fact, (_, phrases) in RELATIONS.items()}
_RELATION = f"({_alternatives(_DIRECT)}|{_alternatives(_INVERSE)})"
_SUBJECT = rf"{_THING}(?: {_RELATION} {_THING})?"
_BACKGROUND_LAST = re.compile(rf"{_SUBJECT},? {_MOTION},? (?:on|against) {_GROUND}")
_BACKGROUND_FIRST = re.compile(rf"on {_GROUND}, {_SUBJECT} {_MOTION}")


def parse_caption(text: str) -> Scene:
    """Return the scene that a caption describes.

    Raises:
        ValueError: the text is not a caption of this world.
    """
    if match := _BACKGROUND_LAST.fullmatch(text):
        *subject, motion, background = match.groups()
    elif match := _BACKGROUND_FIRST.fullmatch(text):
        background, *subject, motion = match.groups()
    else:
        raise ValueError(
            f"{text!r} is not a caption of the miniature's world; "
            f"an example is {plain_caption(EXAMPLE)!r}"
        )
    first = _parse_thing(subject[:3])
    motion = _meaning(motion, MOTIONS)
    if subject[3] is None:
        return Scene((first,), motion, background)
    second = _parse_thing(subject[4:])
    if any(subject[3] in phrases for phrases in _DIRECT.values()):
        return Scene((first, second), motion, background, _meaning(subject[3], _DIRECT))
    return Scene((second, first), motion, background, _meaning(subject[3], _INVERSE))


def _parse_thing(words: list[str]) -> Thing:
    size, colour, shape = words
    return Thing(_meaning(size, SIZES), colour, _meaning(shape, SHAPES))


EXAMPLE = Scene((Thing("small", "red", "circle"),), "right", "black")
