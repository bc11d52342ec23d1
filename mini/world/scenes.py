"""The miniature's world: what a scene is, how it is said, and which scenes may be trained on.

A `Scene` is facts only. `layout` draws the continuous rest (places, speeds, radii) from a random
generator, `mini/world/render.py` paints it, and `captions` says the facts in several wordings.
`parse_caption` inverts every wording, so a caption has exactly one scene, and `split_of` sends each
scene (hence each caption) to exactly one of the training, calibration and evaluation sets.
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
# Two things share one motion, and only such as keep them apart and inside the frame.
PAIR_MOTIONS = ("still", "right", "left", "up", "down")
# Said of (first, second); the inverse wording names the second thing first.
RELATIONS = {
    "left": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "over"), ("below", "under")),
}
PAIR_SHARE = 0.3


class Split(StrEnum):
    """Which captions may be used for what. 90 %, 5 % and 5 % of all scenes."""

    TRAIN = "train"
    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One object's facts; keys of SIZES, COLOURS and SHAPES."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Scene:
    """The facts of one video.

    things: one, or two of different colours; `relation` ("left" or "above", said of the first
    with respect to the second) is None exactly when there is one.
    """

    things: tuple[Thing, ...]
    motion: str
    background: str
    relation: str | None = None

    @property
    def key(self) -> str:
        """The facts as one line: equal for equal scenes, whatever the wording."""
        things = "+".join(f"{t.size} {t.colour} {t.shape}" for t in self.things)
        return f"{things}|{self.relation}|{self.motion}|{self.background}"


def split_of(scene: Scene) -> Split:
    """The set this scene belongs to, from a hash of its facts."""
    bucket = int.from_bytes(hashlib.sha256(scene.key.encode()).digest()[:8], "big") % 100
    if bucket < 5:
        return Split.EVALUATION
    return Split.CALIBRATION if bucket < 10 else Split.TRAIN


def sample_scene(rng: random.Random, split: Split, pair_share: float = PAIR_SHARE) -> Scene:
    """A scene of `split`; with probability `pair_share` it has two things."""
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
    """One wording of the scene, drawn at random."""
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
    """`count` different captions of one split; the same seed gives the same captions."""
    rng = random.Random(f"{split} prompts {seed}")
    said: dict[str, None] = {}
    while len(said) < count:
        said[caption(sample_scene(rng, split), rng)] = None
    return list(said)


def plain_caption(scene: Scene) -> str:
    """The scene in its first wording, the same every time."""
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
    said, inverse = RELATIONS[scene.relation]
    first, second = (_thing(thing, rng) for thing in scene.things)
    if rng.random() < 0.5:
        return f"{first} {rng.choice(said)} {second}"
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
    return next(fact for fact, said in wordings.items() if phrase in said)


_THING = rf"a ({_alternatives(SIZES)}) ({'|'.join(COLOURS)}) ({_alternatives(SHAPES)})"
_MOTION = rf"(?:(?:both|together) )?({_alternatives(MOTIONS)})"
_GROUND = rf"a ({'|'.join(BACKGROUNDS)}) (?:background|backdrop)"
_DIRECT = {fact: said for fact, (said, _) in RELATIONS.items()}
_INVERSE = {fact: said for fact, (_, said) in RELATIONS.items()}
_RELATION = f"({_alternatives(_DIRECT)}|{_alternatives(_INVERSE)})"
_SUBJECT = rf"{_THING}(?: {_RELATION} {_THING})?"
_ENDS = re.compile(rf"{_SUBJECT},? {_MOTION},? (?:on|against) {_GROUND}")
_STARTS = re.compile(rf"on {_GROUND}, {_SUBJECT} {_MOTION}")


def parse_caption(text: str) -> Scene:
    """The scene a caption of this world says.

    Raises ValueError for text that is no caption of this world.
    """
    if match := _ENDS.fullmatch(text):
        *subject, motion, background = match.groups()
    elif match := _STARTS.fullmatch(text):
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
    if any(subject[3] in said for said in _DIRECT.values()):
        return Scene((first, second), motion, background, _meaning(subject[3], _DIRECT))
    return Scene((second, first), motion, background, _meaning(subject[3], _INVERSE))


def _parse_thing(words: list[str]) -> Thing:
    size, colour, shape = words
    return Thing(_meaning(size, SIZES), colour, _meaning(shape, SHAPES))


EXAMPLE = Scene((Thing("small", "red", "circle"),), "right", "black")
