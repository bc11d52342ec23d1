"""Check what a caller wants compared, and complete it: prompts, seeds, settings and pairs.

Every prompt is checked against what the live workers offer for both modes, as if its job were
requested, so that a comparison does not find out later what it cannot make. If anything is refused,
nothing is created; the error names every refused prompt.
"""

import base64
import binascii
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from jobs.catalog import MIN_GUIDANCE_SCALE, MODE_PATTERN, MODEL_PATTERN, Catalog
from jobs.errors import InvalidSpec, Violation
from jobs.record import now
from jobs.spec import (
    MAX_DRAWN_SEED,
    MAX_SEED,
    CountTokens,
    GenerationRequest,
    resolve_json,
)
from jobs.violations import outside, said, shown
from service.comparisons.model import (
    MAX_PAIRS,
    MAX_PROMPTS,
    Arm,
    Comparison,
    Contender,
    Prompt,
    RatingPlan,
    SharedSettings,
)
from service.comparisons.pair_jobs import Planned, pairs_of
from service.comparisons.prompt_files import MAX_SEEDS, PromptLine, check_seeds, read_prompts
from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.statistics.noninferiority import LEAST_MARGIN, MOST_MARGIN
from service.comparisons.statistics.votes import Ties
from service.comparisons.store import new_comparison_id

MOST_VIOLATIONS: Final = 50
"""A refusal lists so many violations, and the number of the others."""

_OTHER: Final = "another mode or model than the reference's"

_Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class ContenderBody(_Body):
    """A mode of a model."""

    mode: Annotated[str, StringConstraints(pattern=MODE_PATTERN)]
    model: Annotated[str, StringConstraints(pattern=MODEL_PATTERN)] | None = Field(
        default=None, description="May be left out while one model is served."
    )


class PromptBody(_Body):
    """A prompt with what is its own."""

    prompt: str
    negative_prompt: str | None = Field(
        default=None, description="By default that of the settings."
    )
    seeds: list[_Seed] | None = Field(
        default=None, min_length=1, max_length=MAX_SEEDS, description="By default the `seeds`."
    )


class PromptsFileBody(_Body):
    """A file of prompts, as text or in base64, which keeps its encoding."""

    name: str = Field(description="Ends with .csv or .txt.")
    text: str | None = None
    text_base64: str | None = None


class SettingsBody(_Body):
    """What all videos share; by default the reference's, but steps and guidance of each mode."""

    size: str | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None


class RatingBody(RatingPlan):
    """What a rater is shown besides the test pairs."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class ComparisonBody(_Body):
    """A comparison of a candidate mode with a reference mode, in paired videos of equal seeds."""

    title: str = Field(min_length=1, max_length=200)
    reference: ContenderBody
    candidate: ContenderBody
    prompts: list[PromptBody | str] | None = Field(
        default=None, description=f"1 to {MAX_PROMPTS}; or a `prompts_file`."
    )
    prompts_file: PromptsFileBody | None = Field(
        default=None,
        description="TXT with a prompt on each line, or CSV with the columns prompt, "
        "negative_prompt, and seed or seeds.",
    )
    seeds: Annotated[int, Field(ge=1, le=MAX_SEEDS)] | list[_Seed] = Field(
        default=1, description="How many seeds are drawn for each prompt; or those of all prompts."
    )
    settings: SettingsBody = SettingsBody()
    criteria: list[str] = Field(default=list(BY_ID), description="Ids; by default all.")
    margin: float = Field(
        default=0.1,
        ge=LEAST_MARGIN,
        le=MOST_MARGIN,
        description="The loss of share that would be acceptable.",
    )
    alpha: float = Field(default=0.05, ge=0.001, le=0.2)
    power: float = Field(default=0.8, ge=0.5, le=0.99)
    ties: Ties = Field(default=Ties.HALF, strict=False)
    rating: RatingBody = RatingBody()
    pixel_measures: bool = True


_BODIES: Final[list[type[BaseModel]]] = [*_Body.__subclasses__(), RatingBody]
_NAMES: Final = frozenset(name for body in _BODIES for name in body.model_fields)


Complete = Callable[[dict[str, Any]], GenerationRequest]


def plan(
    raw: object, owner: str, catalog: Catalog, count_tokens: CountTokens | None = None
) -> Planned:
    """Check a parsed JSON document, and complete it to a comparison.

    Raises:
        InvalidSpec: something is refused; its violations name the field, and the line of a file.
        ModeNotServed: a mode is known, but no live worker serves it; or no worker is live at all.
    """
    body = _parse(raw)
    given = _given_prompts(body)

    def complete(fields: dict[str, Any]) -> GenerationRequest:
        return resolve_json(fields, catalog, count_tokens)[0]

    settings, contenders, negative = _settings(body, catalog, complete)
    prompts = _prompts(body, given, negative)
    _check_prompts(prompts, settings, contenders, complete)
    reference, candidate = contenders
    comparison = Comparison(
        id=new_comparison_id(),
        title=body.title.strip(),
        owner=owner,
        created_at=now(),
        reference=reference,
        candidate=candidate,
        settings=settings,
        prompts=tuple(prompts),
        criteria=tuple(body.criteria),
        rating=RatingPlan(**body.rating.model_dump()),
        secret=secrets.token_hex(16),
        **body.model_dump(include={"margin", "alpha", "power", "ties", "pixel_measures"}),
    )
    return Planned(comparison, pairs_of(comparison))


def _parse(raw: object) -> ComparisonBody:
    try:
        body = ComparisonBody.model_validate(raw)
    except ValidationError as error:
        # A value that is none of several types has an error for each of them; one is enough.
        found = {each.field: each for each in map(_from_pydantic, reversed(error.errors()))}
        raise InvalidSpec(_some(list(found.values())[::-1])) from None
    violations = list(_violations(body))
    if violations:
        raise InvalidSpec(violations)
    return body


def _from_pydantic(error: ErrorDetails) -> Violation:
    """Convert an error of the body to a violation, with the place as in `prompts.3.seeds`."""
    *above, last = error["loc"] or ("body",)
    is_unknown = error["type"] == "extra_forbidden"
    place = [each for each in above if isinstance(each, int) or each in _NAMES]
    if isinstance(last, int) or last in _NAMES or is_unknown or not place:
        place.append(last)
    field = str(shown(".".join(map(str, place))))
    if is_unknown:
        return Violation(field, None, "a known field", f"{field} is not a field.")
    if error["type"] == "missing":
        return Violation(field, None, "a value", f"{field} is missing.")
    bound = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    detail = f"{field} is {said(error['input'])}, which is not accepted: {error['msg']}."
    return Violation(field, shown(error["input"]), bound, detail)


def _violations(body: ComparisonBody) -> Iterator[Violation]:
    """Find what the types do not say."""
    if not body.title.strip():
        yield outside("title", body.title, "text with at least one visible character")
    if (body.prompts is None) == (body.prompts_file is None):
        detail = "Give either prompts or a prompts_file, one of the two."
        yield Violation("prompts", None, "prompts, or a prompts_file", detail)
    if body.prompts is not None and not 1 <= len(body.prompts) <= MAX_PROMPTS:
        bound = f"1 to {MAX_PROMPTS}"
        detail = f"There are {len(body.prompts)} prompts; give {bound}."
        yield Violation("prompts", len(body.prompts), bound, detail)
    unknown = [name for name in body.criteria if name not in BY_ID]
    if unknown or not body.criteria or len(set(body.criteria)) < len(body.criteria):
        yield outside("criteria", body.criteria, f"some of {', '.join(BY_ID)}, each once")
    lists = {"seeds": body.seeds} | {
        f"prompts.{number}.seeds": each.seeds
        for number, each in enumerate(body.prompts or ())
        if isinstance(each, PromptBody)
    }
    for field, seeds in lists.items():
        if isinstance(seeds, list):
            try:
                check_seeds(seeds)
            except ValueError as error:
                yield Violation(field, shown(seeds), "different seeds", f"{field} {error}.")
            if not seeds:
                yield Violation(field, None, "at least one seed", f"{field} has no seed.")


def _given_prompts(body: ComparisonBody) -> Sequence[PromptLine]:
    """Return the prompts as they were given; `line` is 0 for those that came in no file."""
    if body.prompts_file is not None:
        return read_prompts(body.prompts_file.name, _content(body.prompts_file))
    given = []
    for each in body.prompts or ():
        if isinstance(each, str):
            given.append(PromptLine(0, each.strip()))
        else:
            seeds = None if each.seeds is None else tuple(each.seeds)
            given.append(PromptLine(0, each.prompt.strip(), each.negative_prompt, seeds))
    violations = []
    first: dict[tuple[str, str | None], int] = {}
    for number, prompt in enumerate(given):
        known = first.setdefault((prompt.prompt, prompt.negative_prompt), number)
        if known != number:
            detail = f"prompts.{number} repeats prompts.{known}; give that one more seeds instead."
            bound = "different prompts"
            violations.append(Violation(f"prompts.{number}", shown(prompt.prompt), bound, detail))
    if violations:
        raise InvalidSpec(_some(violations))
    return given


def _content(file: PromptsFileBody) -> bytes | str:
    if (file.text is None) == (file.text_base64 is None):
        detail = "Give either text or text_base64 of the file, one of the two."
        raise InvalidSpec.of("prompts_file", None, "text, or text_base64", detail)
    if file.text_base64 is None:
        return file.text or ""
    try:
        return base64.b64decode(file.text_base64, validate=True)
    except (binascii.Error, ValueError) as error:
        detail = f"text_base64 is not base64 ({error})."
        raise InvalidSpec.of("prompts_file.text_base64", None, "base64", detail) from None


def _settings(
    body: ComparisonBody, catalog: Catalog, complete: Complete
) -> tuple[SharedSettings, tuple[Contender, Contender], str]:
    """Complete the settings by the reference's defaults, and check them for both contenders.

    Steps and guidance that are not given are each mode's own. The last value is the negative prompt
    of prompts without their own: that of the first contender with guidance.
    """
    given = {name: each for name, each in body.settings.model_dump().items() if each is not None}
    violations: list[Violation] = []
    completed: list[GenerationRequest] = []
    for arm, contender in zip(Arm, (body.reference, body.candidate), strict=True):
        fields = given | {"prompt": "-", **contender.model_dump(exclude_none=True)}
        try:
            request = complete(fields)
        except InvalidSpec as error:
            where = {"mode": f"{arm}.mode", "model": f"{arm}.model"}
            violations += [
                _renamed(each, where.get(each.field, f"settings.{each.field}"), f"{arm}: ")
                for each in error.violations
            ]
            continue
        completed.append(request)
        # The candidate has to take what the reference has by default.
        shared = {"size", "num_frames"}
        if request.guidance_scale > MIN_GUIDANCE_SCALE:
            shared.add("negative_prompt")
        given = request.model_dump(include=shared) | given
    if violations:
        raise InvalidSpec(violations)
    reference, candidate = completed
    if (reference.mode, reference.model) == (candidate.mode, candidate.model):
        raise InvalidSpec([outside("candidate", candidate.mode, _OTHER)])
    rates = {offer.model.name: offer.model.fps for offer in catalog.offers}
    if rates.get(reference.model) != rates.get(candidate.model):
        detail = (
            f"{reference.model} draws {rates.get(reference.model)} frames a second and "
            f"{candidate.model} {rates.get(candidate.model)}; compare models with equal rates."
        )
        raise InvalidSpec.of("candidate.model", candidate.model, "an equal rate", detail)
    settings = SharedSettings(**reference.model_dump(include=set(SharedSettings.model_fields)))
    own = {
        name: getattr(candidate, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(candidate, name) != getattr(reference, name)
    }
    contenders = (
        Contender(mode=reference.mode, model=reference.model),
        Contender(mode=candidate.mode, model=candidate.model, **own),
    )
    return settings, contenders, str(given.get("negative_prompt", ""))


def _prompts(body: ComparisonBody, given: Sequence[PromptLine], negative: str) -> list[Prompt]:
    prompts = []
    for number, each in enumerate(given, 1):
        seeds = each.seeds
        if seeds is None:
            seeds = tuple(body.seeds) if isinstance(body.seeds, list) else _draw(body.seeds)
        own = each.negative_prompt
        prompts.append(
            Prompt(
                id=str(number),
                prompt=each.prompt,
                negative_prompt=negative if own is None else own,
                seeds=seeds,
                line=each.line or None,
            )
        )
    pairs = sum(len(prompt.seeds) for prompt in prompts)
    if pairs > MAX_PAIRS:
        detail = (
            f"{len(prompts)} prompts with their seeds are {pairs} pairs, and {MAX_PAIRS} are the "
            f"most; take fewer seeds or prompts."
        )
        raise InvalidSpec.of("seeds", pairs, f"at most {MAX_PAIRS} pairs", detail)
    return prompts


def _draw(count: int) -> tuple[int, ...]:
    seeds: set[int] = set()
    while len(seeds) < count:
        seeds.add(secrets.randbelow(MAX_DRAWN_SEED + 1))
    return tuple(seeds)


def _check_prompts(
    prompts: Sequence[Prompt],
    settings: SharedSettings,
    contenders: Sequence[Contender],
    complete: Complete,
) -> None:
    """Check every prompt for both contenders; what both refuse is reported once."""
    violations: dict[tuple[str, str], Violation] = {}
    for prompt in prompts:
        texts = prompt.model_dump(include={"prompt", "negative_prompt"})
        for contender in contenders:
            fields = settings.model_dump() | texts | contender.model_dump(exclude_none=True)
            try:
                complete(fields | {"seed": prompt.seeds[0]})
            except InvalidSpec as error:
                for each in error.violations:
                    violations[prompt.id, each.field] = _located(each, prompt)
    if violations:
        raise InvalidSpec(_some(list(violations.values())))


def _located(violation: Violation, prompt: Prompt) -> Violation:
    if prompt.line is not None:
        return _renamed(violation, "prompts_file", f"Line {prompt.line}: ")
    place = f"prompts.{int(prompt.id) - 1}"
    return _renamed(violation, f"{place}.{violation.field}", f"{place}: ")


def _renamed(violation: Violation, field: str, prefix: str) -> Violation:
    return Violation(field, violation.value, violation.bound, prefix + violation.detail)


def _some(violations: list[Violation]) -> list[Violation]:
    more = len(violations) - MOST_VIOLATIONS
    if more <= 0:
        return violations
    detail = f"{more} more are refused."
    rest = Violation("prompts", None, "what is accepted", detail)
    return [*violations[:MOST_VIOLATIONS], rest]
