"""Publish and read what the live workers offer.

Each worker publishes a `WorkerOffer` with a short time to live and renews it. The service reads all
offers and checks requests against them. Redis also keeps for 30 days which modes were offered, so
that the service can distinguish a mode that is down from an unknown one. And it keeps the
tokenizers that offers refer to, so that the service can count the tokens of prompts. This package
stores a tokenizer as text and never parses it.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, cast

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from redis import Redis
from rq import Queue

from jobs import redis_keys
from jobs.geometry import is_frame_count
from jobs.redis_client import server_time_s
from jobs.telemetry.logs import warn_once

logger = logging.getLogger(__name__)

MODE_PATTERN = r"^[a-z0-9-]{1,32}$"
MODEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SIZE_PATTERN = r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"

ModeName = Annotated[str, StringConstraints(pattern=MODE_PATTERN)]
ModelName = Annotated[str, StringConstraints(pattern=MODEL_PATTERN)]
Size = Annotated[str, StringConstraints(pattern=SIZE_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

_MODEL_AND_MODE = TypeAdapter(tuple[ModelName, ModeName])

_NOT_IN_QUEUE_NAME = {
    *("tokenizer", "vocabulary", "prompt_template", "example_prompts", "default_size"),
    *("default_frames", "default_steps", "default_guidance_scale", "default_mode"),
    "default_negative_prompt",
}

MIN_GUIDANCE_SCALE = 1.0
"""1 switches guidance off. The pipeline would treat lower values as 1, so they are refused."""
MAX_GUIDANCE_SCALE = 20.0

_Guidance = Annotated[float, Field(ge=MIN_GUIDANCE_SCALE, le=MAX_GUIDANCE_SCALE)]


class Published(BaseModel):
    """What a worker publishes of itself, under a key that holds its id."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Format(BaseModel):
    format: Literal["1"] = "1"  # of an offer or a status; see `redis_keys.FORMAT`


_PublishedT = TypeVar("_PublishedT", bound=Published)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The bounds and defaults of a mode, complete; a ValueError if they contradict each other."""

    min_steps: int = 1
    max_steps: int
    default_steps: int
    max_guidance_scale: float = MAX_GUIDANCE_SCALE
    default_guidance_scale: float

    def __post_init__(self) -> None:
        for name, least in (("steps", self.min_steps), ("guidance_scale", MIN_GUIDANCE_SCALE)):
            default, most = getattr(self, f"default_{name}"), getattr(self, f"max_{name}")
            if least > most:
                raise ValueError(f"min_{name} {least:g} is more than max_{name} {most:g}")
            if not least <= default <= most:
                raise ValueError(f"default_{name} {default:g} is not in {least:g}..{most:g}")


class OwnTerms(Published):
    """What a mode has in place of the model's bounds and defaults; None for what is the model's.

    With a `max_guidance_scale` of 1 a step is one pass, and there is no negative prompt.
    """

    min_steps: int | None = Field(None, ge=1)
    max_steps: int | None = Field(None, ge=1)
    default_steps: int | None = Field(None, ge=1)
    max_guidance_scale: _Guidance | None = None
    default_guidance_scale: _Guidance | None = None

    @property
    def own(self) -> dict[str, int | float]:
        """The terms that are the mode's own, by name."""
        return self.model_dump(include=set(OwnTerms.model_fields), exclude_none=True)


class ModeOffer(OwnTerms):
    """One mode of a model; without a recipe fingerprint it is not quantized.

    `variant` names anything else that changes the frames, for instance a step cache; None if
    nothing does. `kernels` and `warning` are for operators: the kernels that this worker uses, and
    why they are not the device's fastest, if they are not.
    """

    name: ModeName
    description: str
    recipe_fingerprint: str | None = None
    variant: str | None = None
    kernels: str | None = None
    warning: str | None = None


class WordGroup(Published):
    """Words or phrases of one kind that a model was trained on, for example its colours."""

    kind: str = Field(min_length=1)
    phrases: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(min_length=1)


class ModelOffer(Published):
    """One model, its bounds and its defaults.

    Counts of frames have the form 4k+1; sizes are "WxH" in pixels. `max_prompt_chars` is the bound
    that is cheap to check. `max_prompt_tokens` is what the text encoder takes, counted with
    `tokenizer`: the SHA-256 of a text that `read_tokenizer` returns.

    `vocabulary` lists what the model can draw, if it was trained on few words; it is empty for a
    model that takes any text. It is for hints only: no prompt is refused by it. `prompt_template`
    shows how a prompt is built, with the kinds of the vocabulary in capitals.
    """

    name: ModelName
    fingerprint: str
    sizes: tuple[Size, ...] = Field(min_length=1)
    default_size: Size
    min_frames: int = Field(ge=1)
    max_frames: int
    default_frames: int
    fps: int = Field(ge=1)
    max_steps: int = Field(ge=1)
    default_steps: int
    default_guidance_scale: float
    default_mode: ModeName
    max_prompt_chars: int = Field(ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    tokenizer: Sha256 | None = None
    default_negative_prompt: str = ""
    vocabulary: tuple[WordGroup, ...] = ()
    prompt_template: str | None = None
    example_prompts: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _defaults_lie_within_bounds(self) -> "ModelOffer":
        if self.default_size not in self.sizes:
            raise ValueError(f"default_size {self.default_size} is not among sizes {self.sizes}")
        if not self.min_frames <= self.default_frames <= self.max_frames:
            raise ValueError(
                f"default_frames {self.default_frames} is not in "
                f"{self.min_frames}..{self.max_frames}"
            )
        if not is_frame_count(self.default_frames):
            raise ValueError(f"default_frames {self.default_frames} is not of the form 4k+1")
        self.terms()
        return self

    def terms(self, mode: OwnTerms | None = None) -> Terms:
        """Return a mode's bounds and defaults, or the model's; ValueError if they contradict."""
        usual = self.model_dump(include=set(OwnTerms.model_fields))
        return Terms(**usual | (mode.own if mode else {}))


class WorkerOffer(Published):
    """The offer of one worker process: its model and modes, and the queue it takes jobs from."""

    worker_id: str = Field(min_length=1)
    queue: str = Field(min_length=1)
    device: str
    model: ModelOffer
    modes: tuple[ModeOffer, ...] = Field(min_length=1)
    started_at: AwareDatetime

    @model_validator(mode="after")
    def _serves_its_default(self) -> "WorkerOffer":
        if not self.serves(self.model.default_mode):
            names = ", ".join(mode.name for mode in self.modes)
            raise ValueError(
                f"default_mode {self.model.default_mode} is not among this worker's modes: {names}"
            )
        for mode in self.modes:
            self.model.terms(mode)
        return self

    def serves(self, mode: str) -> bool:
        """Return whether the worker has this mode."""
        return any(offered.name == mode for offered in self.modes)

    def terms(self, mode: str) -> Terms:
        """Return the bounds and defaults of a mode; those of the model if the worker lacks it."""
        return self.model.terms(next((each for each in self.modes if each.name == mode), None))

    @property
    def is_degraded(self) -> bool:
        """Whether the worker runs a mode with slower kernels than intended."""
        return any(mode.warning is not None for mode in self.modes)


@dataclass(frozen=True, slots=True)
class Catalog:
    """The live offers, their queues' lengths, and the (model, mode) pairs known from 30 days."""

    offers: tuple[WorkerOffer, ...]
    waiting: Mapping[str, int]
    known: frozenset[tuple[str, str]]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that some live worker serves."""
        return tuple(sorted({offer.model.name for offer in self.offers}))

    def modes(self, model: str) -> tuple[str, ...]:
        """Return the modes that some live worker serves for `model`."""
        return tuple(
            sorted({m.name for o in self.offers if o.model.name == model for m in o.modes})
        )

    def bounds(self) -> dict[str, str]:
        """List what the live workers offer, where any do, by the field that names it."""
        sizes = dict.fromkeys(size for offer in self.offers for size in offer.model.sizes)
        offered = {
            "mode": sorted({mode.name for offer in self.offers for mode in offer.modes}),
            "size": list(sizes),
            "model": self.models,
        }
        return {field: f"one of {', '.join(names)}" for field, names in offered.items() if names}

    def served(self) -> list[dict[str, object]]:
        """Return what is served, as JSON values for an error's context."""
        return [{"model": model, "modes": list(self.modes(model))} for model in self.models]


def queue_name(model: ModelOffer, modes: Sequence[ModeOffer]) -> str:
    """Name the queue of all workers that can run exactly the same requests.

    The digest covers every bound and fingerprint, so a job that was checked against one worker's
    offer never reaches a worker with another configuration. It does not cover defaults and
    descriptions: requests are complete, and with another name for the queue, waiting jobs would
    never run. Nor does it cover the tokenizer, which belongs to the model.

    Example: `wan-mini.1f0c9a2b7d3e`.
    """
    bounds = model.model_dump(exclude=_NOT_IN_QUEUE_NAME)
    bounds["sizes"] = sorted(model.sizes)
    served = sorted(
        [mode.name, mode.recipe_fingerprint or "", *([mode.variant] if mode.variant else [])]
        + [f"{name}={value:g}" for name, value in mode.own.items() if "default" not in name]
        for mode in modes
    )
    digest = hashlib.sha256(json.dumps([bounds, served], sort_keys=True).encode()).hexdigest()
    return f"{model.name}.{digest[:12]}"


def publish(redis: Redis, offer: WorkerOffer) -> None:
    """Make `offer` live for the next 15 seconds, and its modes known for 30 days."""
    second = server_time_s(redis)
    with redis.pipeline(transaction=True) as pipe:
        pipe.set(
            redis_keys.worker_offer(offer.worker_id),
            offer.model_dump_json(),
            ex=redis_keys.OFFER_TTL_S,
        )
        pipe.zadd(redis_keys.WORKERS, {offer.worker_id: second})
        # Removes workers that are gone.
        pipe.zremrangebyscore(redis_keys.WORKERS, "-inf", second - 3600)
        pipe.zadd(
            redis_keys.KNOWN_MODES,
            {json.dumps([offer.model.name, mode.name]): second for mode in offer.modes},
        )
        pipe.zremrangebyscore(redis_keys.KNOWN_MODES, "-inf", second - redis_keys.KNOWN_MODE_TTL_S)
        pipe.execute()


def tokenizer_fingerprint(text: bytes) -> str:
    """Return the name of a tokenizer: the SHA-256 of its `tokenizer.json`, in hexadecimal."""
    return hashlib.sha256(text).hexdigest()


def publish_tokenizer(redis: Redis, name: str, text: bytes) -> None:
    """Keep a tokenizer's text for 30 days; it may be megabytes, so it is sent only if missing.

    Call this before an offer that refers to it, and again at every renewal of the offer.

    Args:
        name: `tokenizer_fingerprint` of the text, passed so that it is not computed every time.
    """
    key = redis_keys.tokenizer(name)
    if not redis.expire(key, redis_keys.TOKENIZER_TTL_S):
        redis.set(key, text, ex=redis_keys.TOKENIZER_TTL_S)


def read_tokenizer(redis: Redis, fingerprint: str) -> str | None:
    """Read a tokenizer's text; None if there is none, or its content does not match its name."""
    found = redis.get(redis_keys.tokenizer(fingerprint))
    if found is None:
        return None
    text = cast("bytes", found)
    if hashlib.sha256(text).hexdigest() != fingerprint:
        logger.warning("The tokenizer stored as %s is not the one of this name.", fingerprint)
        return None
    return text.decode()


def close(redis: Redis, worker_id: str) -> None:
    """Remove a worker's offer and keep its status: it takes no further job."""
    redis.delete(redis_keys.worker_offer(worker_id))


def withdraw(redis: Redis, worker_id: str) -> None:
    """Remove a worker's offer and status; its modes stay known."""
    with redis.pipeline(transaction=True) as pipe:
        pipe.delete(
            redis_keys.worker_offer(worker_id),
            redis_keys.worker_status(worker_id),
            redis_keys.worker_drain(worker_id),
        )
        pipe.zrem(redis_keys.WORKERS, worker_id)
        pipe.execute()


def read(redis: Redis) -> Catalog:
    """Read the live offers, sorted by worker id, with their queues' lengths and the known modes."""
    with redis.pipeline(transaction=False) as pipe:
        pipe.zrange(redis_keys.WORKERS, 0, -1)
        pipe.zrange(redis_keys.KNOWN_MODES, 0, -1)
        worker_ids, known = pipe.execute()
    offers = _live_offers(redis, sorted(name.decode(errors="replace") for name in worker_ids))
    return Catalog(
        offers=offers,
        waiting=_queue_lengths(redis, {offer.queue for offer in offers}),
        known=frozenset(_known_modes(redis, known)),
    )


def _known_modes(redis: Redis, texts: list[bytes]) -> Iterator[tuple[str, str]]:
    for text in texts:
        try:
            yield _MODEL_AND_MODE.validate_json(text)
        except ValidationError:
            # Written by another version or by hand: the others are still valid.
            warn_once(
                logger, redis, f"What {redis_keys.KNOWN_MODES} holds is left out: {text[:80]!r}"
            )


def _live_offers(redis: Redis, worker_ids: list[str]) -> tuple[WorkerOffer, ...]:
    keys = [redis_keys.worker_offer(name) for name in worker_ids]
    return readable(redis, WorkerOffer, "offer", worker_ids, keys)


def readable(
    redis: Redis, kind: type[_PublishedT], noun: str, worker_ids: Sequence[str], keys: Sequence[str]
) -> tuple[_PublishedT, ...]:
    """Read what workers have published under `keys`; what cannot be read is logged and left out."""
    texts = cast("list[bytes | None]", redis.mget(keys)) if keys else []
    found = []
    for worker_id, text in zip(worker_ids, texts, strict=True):
        if text is None:
            continue
        try:
            _Format.model_validate_json(text)
            found.append(kind.model_validate_json(text, extra="ignore"))
        except ValidationError as error:
            # From another version, for instance during an upgrade: the others are still valid.
            warn_once(logger, redis, f"The {noun} of worker {worker_id} is left out: {error}")
    return tuple(found)


def _queue_lengths(redis: Redis, queues: set[str]) -> dict[str, int]:
    names = sorted(queues)
    with redis.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(Queue(name, connection=redis).key)
        return dict(zip(names, pipe.execute(), strict=True))
