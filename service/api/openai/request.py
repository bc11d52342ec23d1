"""Convert the fields of `POST /v1/videos` to a complete request for a video.

`model` gives the model and the mode, `seconds` the number of frames. The other fields have the
names and the checks of `jobs.spec`. Nothing is rounded, and every violation is reported under the
caller's field name.
"""

import dataclasses
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from jobs.catalog import Catalog, ModelOffer
from jobs.errors import InvalidSpec, ModeNotServed, Violation
from jobs.geometry import FRAME_STRIDE
from jobs.spec import (
    MAX_UNKNOWN_FIELDS,
    CheckWebhook,
    CountTokens,
    GenerationRequest,
    resolve_json,
)
from jobs.violations import more_unknown_fields, shown

PASSED_ON: Final = (
    "prompt",
    "size",
    "negative_prompt",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "webhook_url",
)
FIELDS: Final = ("model", "seconds", *PASSED_ON)
SECONDS_PATTERN: Final = r"^[0-9]{1,6}(\.[0-9]{1,6})?$"

_SECONDS: Final = re.compile(SECONDS_PATTERN, re.ASCII)
_ONE_OF_FIELDS: Final = f"one of the fields {', '.join(FIELDS)}"


def video_request_to_spec(
    fields: object, catalog: Catalog, count_tokens: CountTokens, check_webhook: CheckWebhook
) -> tuple[GenerationRequest, str]:
    """Check the fields, fill in the defaults, and choose the queue.

    Returns:
        The complete request and the name of its queue.

    Raises:
        InvalidSpec: fields are missing or wrong; has every violation.
        ModeNotServed: see `jobs.spec.resolve`.
    """
    if not isinstance(fields, Mapping):
        detail = f"The body is not an object; its fields are {', '.join(FIELDS)}."
        raise InvalidSpec.of("body", None, "an object", detail)
    unknown = [name for name in fields if name not in FIELDS]
    violations = [_unknown_field(name, fields[name]) for name in unknown[:MAX_UNKNOWN_FIELDS]]
    if len(unknown) > MAX_UNKNOWN_FIELDS:
        violations.append(more_unknown_fields(len(unknown) - MAX_UNKNOWN_FIELDS, FIELDS))
    model, mode = _model_and_mode(fields.get("model"), catalog, violations)
    body = {name: fields[name] for name in PASSED_ON if name in fields}
    if fields.get("seconds") is not None:
        body["num_frames"] = _frames(fields, _offer_of(model, mode, catalog), violations)
    try:
        body |= {"model": model, "mode": mode}
        resolved = resolve_json(body, catalog, count_tokens, check_webhook)
    except ModeNotServed:
        if not violations:
            raise
    except InvalidSpec as refused:
        _add_renamed(refused.violations, fields, violations)
    if violations:
        raise InvalidSpec(violations)
    return resolved


def _unknown_field(name: object, value: object) -> Violation:
    field = str(shown(name))
    if name == "input_reference":
        why = "this service makes videos from text alone; leave it out."
        return Violation(field, None, "nothing", f"input_reference is not taken: {why}")
    known = f"the fields are {', '.join(FIELDS)}"
    return Violation(field, shown(value), _ONE_OF_FIELDS, f"{field} is not a field; {known}.")


def _model_and_mode(
    name: object, catalog: Catalog, violations: list[Violation]
) -> tuple[str | None, str | None]:
    """Return the model and the mode that `name` means: a model, a mode, or model:mode."""
    live = {(model, mode) for model in catalog.models for mode in catalog.modes(model)}
    known = live | catalog.known
    if name is None or not known:
        return None, None
    if isinstance(name, str):
        model, _, mode = name.partition(":")
        if (model, mode) in known:
            return model, mode
        if any(name == model for model, _ in known):
            return name, None
        for pairs in (live, known):
            models = [model for model, mode in pairs if mode == name]
            if len(models) == 1:
                return models[0], name
    bound = "one of " + ", ".join(f"{model}:{mode}" for model, mode in sorted(live or known))
    why = "is a mode of several models" if any(name == mode for _, mode in known) else "is unknown"
    detail = f"model {shown(name)} {why}; use {bound}, or leave it out."
    violations.append(Violation("model", shown(name), bound, detail))
    return None, None


def _offer_of(model: str | None, mode: str | None, catalog: Catalog) -> ModelOffer | None:
    """Return the offer whose bounds apply to `seconds`; None if it is not clear which model's."""
    if model is None and len(catalog.models) == 1:
        model = catalog.models[0]
    offers = [offer for offer in catalog.offers if offer.model.name == model]
    # Workers may differ in their bounds, so those that serve the mode come first.
    offers.sort(key=lambda offer: not offer.serves(mode or offer.model.default_mode))
    return offers[0].model if offers else None


def _frames(
    fields: Mapping[str, object], offer: ModelOffer | None, violations: list[Violation]
) -> int | None:
    """Return the number of frames that last for `seconds`; None if it is unknown or refused."""
    value = fields["seconds"]
    seconds = _exact(value)
    bound = "a number of seconds" if offer is None else _bound(offer)
    if fields.get("num_frames") is not None:
        detail = "seconds and num_frames say the same thing; give one of them."
        violations.append(Violation("seconds", shown(value), "nothing beside num_frames", detail))
        return None
    if seconds is not None and offer is None:
        return None
    if seconds is not None and offer is not None:
        frames = seconds * offer.fps + 1
        if frames % FRAME_STRIDE == 1 and offer.min_frames <= frames <= offer.max_frames:
            return int(frames)
    detail = f"seconds is {shown(value)}, which is not {bound}."
    violations.append(Violation("seconds", shown(value), bound, detail))
    return None


def _exact(value: object) -> Fraction | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value)
    return Fraction(text) if _SECONDS.fullmatch(text) else None


def _bound(offer: ModelOffer) -> str:
    least, most = (
        (count - 1) // FRAME_STRIDE * FRAME_STRIDE / offer.fps
        for count in (offer.min_frames + FRAME_STRIDE - 1, offer.max_frames)
    )
    return f"a multiple of {FRAME_STRIDE / offer.fps:g} from {least:g} to {most:g}"


def _add_renamed(
    found: tuple[Violation, ...], fields: Mapping[str, object], violations: list[Violation]
) -> None:
    """Add the violations that `jobs.spec` found, under the caller's names, one for each field."""
    named = {violation.field for violation in violations}
    for violation in found:
        name = violation.field
        if name == "num_frames" and "num_frames" not in fields:
            name = "seconds"
        if name not in named:
            violations.append(dataclasses.replace(violation, field=name))
