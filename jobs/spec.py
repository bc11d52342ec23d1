"""Check a caller's request against what the live workers offer, and complete it.

`GenerationBody` is the caller's JSON; `GenerationRequest` is the complete request that a worker
runs. `resolve` turns one into the other: it fills in defaults and refuses what is out of bounds,
with all violations at once. It never rounds a value.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from jobs.catalog import (
    MAX_GUIDANCE_SCALE,
    MIN_GUIDANCE_SCALE,
    MODE_PATTERN,
    MODEL_PATTERN,
    SIZE_PATTERN,
    Catalog,
    WorkerOffer,
)
from jobs.errors import InvalidSpec, ModeNotServed, Violation
from jobs.geometry import is_frame_count, parse_size
from jobs.text_rules import (
    METADATA_BOUND,
    metadata_fault,
)
from jobs.violations import (
    from_pydantic,
    length_violations,
    more_unknown_fields,
    not_one_of,
    outside,
    shown,
    span_violations,
    text_violations,
)

MAX_SEED = 2**63 - 1
MAX_DRAWN_SEED = 2**32 - 1
"""A drawn seed is at most this, so that JavaScript, whose numbers have 53 bits, reads it right."""
MAX_URL_CHARS = 2048
MAX_COUNT = 8
"""The most videos of one request."""
MAX_UNKNOWN_FIELDS = 20
"""How many unknown fields an error lists; a body may contain tens of thousands."""

CountTokens = Callable[[str, str], int | None]
"""Counts the tokens of a text, given a tokenizer's fingerprint; None if it is not available."""
CheckWebhook = Callable[[str], Violation | None]
"""Checks a webhook's URL; returns what is wrong with it, or None."""

_BOUNDS = {
    "prompt": "text with at least one visible character",
    "negative_prompt": "text",
    "mode": "a name of 1 to 32 lower-case letters, digits and hyphens",
    "size": "WIDTHxHEIGHT in pixels, for instance 832x480",
    "num_frames": "a whole number of the form 4k+1",
    "num_inference_steps": "a whole number of at least 1",
    "guidance_scale": f"a number from {MIN_GUIDANCE_SCALE:g} to {MAX_GUIDANCE_SCALE:g}",
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "model": "the name of a served model",
    "webhook_url": "an https address of a host that this service may call",
    "metadata": METADATA_BOUND,
    "count": f"a whole number from 1 to {MAX_COUNT}",
}
_REMEDIES = {"seed": "leave it out for a random one"}


def _whole(value: object) -> object:
    """Take 7.0 for 7, as JSON does. Larger floats are refused: they may have been rounded."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    return int(value) if is_whole and isinstance(value, float) else value


Whole = Annotated[int, BeforeValidator(_whole)]


class GenerationBody(BaseModel):
    """A request for one video. Only the prompt is required.

    A missing seed is drawn at random. The model may be missing while one model is served. No
    webhook is called without a URL. All other fields have defaults in the offer of the model and
    the mode.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        hide_input_in_errors=True,
        json_schema_extra={
            "examples": [
                {
                    "prompt": "a small red circle moving right on a black background",
                    "mode": "w8a8",
                    "seed": 7,
                }
            ]
        },
    )

    prompt: str = Field(
        description="What the video shows. Its longest length is the model's.",
        json_schema_extra={"minLength": 1},
    )
    negative_prompt: str | None = Field(
        default=None, description="What it should not show; by default the model's own."
    )
    mode: Annotated[str, StringConstraints(pattern=MODE_PATTERN)] | None = Field(
        default=None, description="How the model runs, for instance bf16 or w8a8."
    )
    size: Annotated[str, StringConstraints(pattern=SIZE_PATTERN)] | None = Field(
        default=None, description="WIDTHxHEIGHT in pixels, one of the model's sizes."
    )
    # Not bounded here: a refusal of these two names the model's bounds, which are narrower.
    num_frames: Whole | None = Field(
        default=None, description="A count of the form 4k+1.", json_schema_extra={"minimum": 1}
    )
    num_inference_steps: Whole | None = Field(default=None, json_schema_extra={"minimum": 1})
    guidance_scale: float | None = Field(
        default=None,
        ge=MIN_GUIDANCE_SCALE,
        le=MAX_GUIDANCE_SCALE,
        allow_inf_nan=False,
        description="1 is no guidance, and twice as fast. Bounds and defaults may be the mode's.",
    )
    seed: Whole | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Drawn at random and recorded if missing; at most 2^32 - 1 then. JavaScript "
        "reads numbers above 2^53 rounded.",
    )
    model: Annotated[str, StringConstraints(pattern=MODEL_PATTERN)] | None = Field(
        default=None, description="May be left out while one model is served."
    )
    webhook_url: str | None = Field(
        default=None,
        description="Called once the job has ended, whatever the end. Its host has to be one that "
        "the operators of this service have allowed.",
        json_schema_extra={"format": "uri", "maxLength": MAX_URL_CHARS},
    )
    metadata: dict[str, str] | None = Field(
        default=None, description=f"Kept with the job and shown in it: {METADATA_BOUND}."
    )
    count: Whole | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="How many videos, with seeds from `seed` on; all are queued, or none.",
    )


class GenerationRequest(BaseModel):
    """A complete request: every choice is made, the seed included.

    Running it twice on one device gives the same file. On another kind of device, or with another
    number of CPU threads, the last bits of its numbers may differ (docs/api.md).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    prompt: str
    negative_prompt: str
    mode: str
    size: str = Field(pattern=SIZE_PATTERN)
    num_frames: int = Field(ge=1)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float
    seed: int = Field(ge=0, le=MAX_SEED)
    model: str

    @property
    def width(self) -> int:
        """The width in pixels."""
        return parse_size(self.size)[0]

    @property
    def height(self) -> int:
        """The height in pixels."""
        return parse_size(self.size)[1]


def resolve(
    body: GenerationBody,
    catalog: Catalog,
    count_tokens: CountTokens | None = None,
    check_webhook: CheckWebhook | None = None,
) -> tuple[GenerationRequest, str]:
    """Complete `body`, and choose the shortest of the queues whose live workers accept it.

    Without `count_tokens`, or where it returns None, only the number of characters of a text is
    checked; the worker checks its tokens later. Without `check_webhook`, every webhook is refused.

    Raises:
        InvalidSpec: something is out of bounds; all violations are in it.
        ModeNotServed: the model and mode are known, but no live worker serves them; or no worker
            is live at all.
    """
    return _resolve(body, catalog, list(_webhook_violations(body, check_webhook)), count_tokens)


def resolve_json(
    raw: object,
    catalog: Catalog,
    count_tokens: CountTokens | None = None,
    check_webhook: CheckWebhook | None = None,
) -> tuple[GenerationRequest, str]:
    """Resolve a parsed JSON document; values of wrong types are reported with other violations.

    Raises:
        InvalidSpec, ModeNotServed: as `resolve`.
    """
    more = 0
    if isinstance(raw, Mapping):
        unknown = [name for name in raw if name not in GenerationBody.model_fields]
        more = len(unknown) - MAX_UNKNOWN_FIELDS
        left_out = set(unknown[MAX_UNKNOWN_FIELDS:])
        raw = {name: raw[name] for name in raw if name not in left_out}
    try:
        return resolve(GenerationBody.model_validate(raw), catalog, count_tokens, check_webhook)
    except ValidationError as error:
        bounds = _BOUNDS | catalog.bounds()
        violations = [from_pydantic(each, bounds, _REMEDIES) for each in error.errors()]
    if more > 0:
        violations.append(more_unknown_fields(more, _BOUNDS))
    if not isinstance(raw, Mapping):
        raise InvalidSpec(violations)
    invalid = {violation.field for violation in violations}
    valid = {k: v for k, v in raw.items() if k in GenerationBody.model_fields and k not in invalid}
    # Only to look for further violations: this body is never run.
    rest = GenerationBody.model_construct(**{"prompt": "-", **valid})
    violations += _webhook_violations(rest, check_webhook)
    return _resolve(rest, catalog, violations, count_tokens)


def _resolve(
    body: GenerationBody,
    catalog: Catalog,
    violations: list[Violation],
    count_tokens: CountTokens | None,
) -> tuple[GenerationRequest, str]:
    """Check `body` and complete it; `violations` are those found so far."""
    violations = [
        *violations,
        *text_violations(body.prompt, body.negative_prompt),
        *_group_violations(body),
    ]
    offers, unserved = _offers_for(body, catalog, violations)
    # Only a worker that has a mode knows its bounds. Of one that nobody knows the model's are told.
    away = unserved is not None and all(each.field != "mode" for each in violations)
    # All offers of one queue have the same bounds, and may differ in the mode that is not named.
    refusals = {
        key: [*_bound_violations(body, offer, away), *_length_violations(body, offer, count_tokens)]
        for key, offer in {(each.queue, each.model.default_mode): each for each in offers}.items()
    }
    accepting = [each for each in offers if not refusals[each.queue, each.model.default_mode]]
    if offers and not accepting:
        # Workers may differ in their bounds; the error names those of the first.
        violations += next(iter(refusals.values()))
    if violations:
        raise InvalidSpec(violations)
    if unserved is not None:
        raise unserved
    chosen = min(accepting, key=lambda offer: (catalog.waiting[offer.queue], offer.queue))
    return _complete(body, chosen), chosen.queue


def _offers_for(
    body: GenerationBody, catalog: Catalog, violations: list[Violation]
) -> tuple[list[WorkerOffer], ModeNotServed | None]:
    """Find the live offers for the body's model and mode, or the error if there are none.

    An unknown model or mode is appended to `violations`.
    """
    model = body.model
    if model is None and len(catalog.models) > 1:
        violations.append(not_one_of("model", model, catalog.models, "has to be named"))
        return [], None
    if model is None:
        model = catalog.models[0] if catalog.models else None
    known_models = {name for name, _ in catalog.known} | set(catalog.models)
    if model is not None and model not in known_models:
        if known_models:
            violations.append(not_one_of("model", model, sorted(known_models), "is not known"))
        return [], _nothing_live(catalog)
    of_model = [offer for offer in catalog.offers if offer.model.name == model]
    serving = [offer for offer in of_model if offer.serves(body.mode or offer.model.default_mode)]
    if serving:
        return serving, None
    known = {mode for name, mode in catalog.known if model in (None, name)}
    if body.mode is not None and known and body.mode not in known:
        violations.append(not_one_of("mode", body.mode, sorted(known), "is not known"))
    return of_model, _not_served(model, body.mode, catalog)


def _group_violations(body: GenerationBody) -> Iterator[Violation]:
    """Find what is wrong with the metadata, and with the last seed of several."""
    fault = metadata_fault(body.metadata or {})
    if fault is not None:
        yield Violation("metadata", None, METADATA_BOUND, f"metadata {fault}.")
    count, seed = body.count or 1, body.seed or 0
    if seed + count - 1 > MAX_SEED:
        most = MAX_SEED - count + 1
        yield outside("seed", seed, f"at most {most}, so that {count} seeds from it on exist")


def _webhook_violations(
    body: GenerationBody, check_webhook: CheckWebhook | None
) -> Iterator[Violation]:
    url = body.webhook_url
    if url is None:
        return
    if check_webhook is None:
        yield Violation("webhook_url", shown(url), "nothing", "webhook_url is not taken here.")
    elif (violation := check_webhook(url)) is not None:
        yield violation


def _bound_violations(body: GenerationBody, offer: WorkerOffer, away: bool) -> Iterator[Violation]:
    """Find what is out of the bounds of the model, and of its mode if that is not away."""
    model = offer.model
    if body.size is not None and body.size not in model.sizes:
        yield not_one_of("size", body.size, model.sizes, "is not offered")
    frames = body.num_frames
    if frames is not None and (
        not is_frame_count(frames) or not model.min_frames <= frames <= model.max_frames
    ):
        yield outside("num_frames", frames, f"4k+1 from {model.min_frames} to {model.max_frames}")
    if away:
        return
    mode = body.mode or model.default_mode
    own, usual = (
        ((terms.min_steps, terms.max_steps), (MIN_GUIDANCE_SCALE, terms.max_guidance_scale))
        for terms in (offer.terms(mode), model.terms())
    )
    fields = ("num_inference_steps", "guidance_scale")
    for field, span, of_model in zip(fields, own, usual, strict=True):
        of_mode = None if span == of_model else mode
        yield from span_violations(field, getattr(body, field), span, of_mode)


def _length_violations(
    body: GenerationBody, offer: WorkerOffer, count_tokens: CountTokens | None
) -> Iterator[Violation]:
    """Find the texts that are too long for the model, or empty once they are cleaned."""
    model, count = offer.model, None
    if count_tokens is not None and model.tokenizer is not None:
        count = partial(count_tokens, model.tokenizer)
    for field in ("prompt", "negative_prompt"):
        text: str | None = getattr(body, field)
        if text is not None:
            bounds = model.max_prompt_chars, model.max_prompt_tokens
            yield from length_violations(field, text, bounds, count)


def _complete(body: GenerationBody, offer: WorkerOffer) -> GenerationRequest:
    model = offer.model
    terms = offer.terms(body.mode or model.default_mode)
    values: dict[str, Any] = {
        "negative_prompt": model.default_negative_prompt,
        "mode": model.default_mode,
        "size": model.default_size,
        "num_frames": model.default_frames,
        "num_inference_steps": terms.default_steps,
        "guidance_scale": terms.default_guidance_scale,
    }
    values |= body.model_dump(exclude_none=True, exclude={"webhook_url", "metadata", "count"})
    if values["guidance_scale"] <= MIN_GUIDANCE_SCALE and body.negative_prompt is None:
        values["negative_prompt"] = ""  # the model's own would have no effect
    if body.seed is None:
        values["seed"] = secrets.randbelow(MAX_DRAWN_SEED + 2 - MAX_COUNT)
    return GenerationRequest.model_validate(values | {"model": model.name})


def _nothing_live(catalog: Catalog) -> ModeNotServed:
    return ModeNotServed(
        "No worker is live, so nothing can be generated; start one with `python -m worker`.",
        served=catalog.served(),
    )


def _not_served(model: str | None, mode: str | None, catalog: Catalog) -> ModeNotServed:
    if not catalog.offers:
        return _nothing_live(catalog)
    served = "; ".join(f"{name}: {', '.join(catalog.modes(name))}" for name in catalog.models)
    return ModeNotServed(
        f"No live worker serves mode {mode or 'default'} of model {model}. Served now: {served}.",
        served=catalog.served(),
    )
