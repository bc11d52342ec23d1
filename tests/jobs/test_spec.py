"""Test how a caller's JSON becomes a complete request, or an error with every violation."""

from collections.abc import Sequence
from typing import Any

import pytest

from jobs.catalog import Catalog, ModelOffer, WorkerOffer, queue_name
from jobs.errors import InvalidSpec, ModeNotServed, Violation
from jobs.spec import MAX_DRAWN_SEED, MAX_SEED, GenerationBody, resolve, resolve_json
from jobs.violations import shown


def catalog_of(*offers: WorkerOffer, waiting: dict[str, int] | None = None) -> Catalog:
    lengths = {offer.queue: 0 for offer in offers} | (waiting or {})
    known = {(offer.model.name, mode.name) for offer in offers for mode in offer.modes}
    return Catalog(offers=offers, waiting=lengths, known=frozenset(known))


def another(offer: WorkerOffer, modes: slice = slice(None), **model: object) -> WorkerOffer:
    """A worker like `offer` with another model configuration or fewer modes."""
    changed = offer.model.model_copy(update=model)
    kept = offer.modes[modes]
    return offer.model_copy(
        update={"model": changed, "modes": kept, "queue": queue_name(changed, kept)}
    )


def violations(raw: object, catalog: Catalog) -> Sequence[Violation]:
    with pytest.raises(InvalidSpec) as refused:
        resolve_json(raw, catalog)
    return refused.value.violations


def test_defaults_come_from_the_model(offer: WorkerOffer, model: ModelOffer) -> None:
    request, queue = resolve(GenerationBody(prompt="a red circle"), catalog_of(offer))
    assert queue == offer.queue
    assert request.model_dump(exclude={"seed"}) == {
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "mode": "bf16",
        "size": "96x96",
        "num_frames": 17,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "model": "wan-mini",
    }
    assert 0 <= request.seed <= MAX_DRAWN_SEED


def test_missing_seeds_differ(offer: WorkerOffer) -> None:
    body = GenerationBody(prompt="x")
    seeds = {resolve(body, catalog_of(offer))[0].seed for _ in range(8)}
    assert len(seeds) > 1


def test_every_value_is_kept(offer: WorkerOffer) -> None:
    values: dict[str, Any] = {
        "prompt": "  zwei Kreise,\n\tein Quadrat 🟥 ",
        "negative_prompt": "",
        "mode": "w8a8",
        "size": "64x96",
        "num_frames": 5,
        "num_inference_steps": 1,
        "guidance_scale": 1,
        "seed": MAX_SEED,
        "model": "wan-mini",
    }
    request, _ = resolve_json(values, catalog_of(offer))
    assert request.model_dump() == values
    assert (request.width, request.height) == (64, 96)


def test_shortest_queue_is_chosen(offer: WorkerOffer) -> None:
    bf16_only = another(offer, modes=slice(1))
    body = GenerationBody(prompt="x", mode="bf16")
    for busy, free in ((offer, bf16_only), (bf16_only, offer)):
        catalog = catalog_of(offer, bf16_only, waiting={busy.queue: 3})
        assert resolve(body, catalog)[1] == free.queue


def test_only_workers_that_accept_count(offer: WorkerOffer) -> None:
    longer = another(offer, max_frames=81)
    catalog = catalog_of(offer, longer, waiting={longer.queue: 9})
    assert resolve(GenerationBody(prompt="x", num_frames=81), catalog)[1] == longer.queue


BAD = [
    ("prompt", "", "visible character"),
    ("prompt", " \t\n\u00a0\u200b", "visible character"),
    ("prompt", "\u3164\u2800 \u115f\u1160\uffa0", "visible character"),
    ("prompt", "\ufe0f\u034f", "visible character"),
    *(
        ("prompt", text, "visible character, once HTML entities are read")
        for text in ("&nbsp;", "&#8203;", "&amp;nbsp; &#x200B;&zwj;", "&shy;", "&#129;", "&Tab;")
    ),
    ("prompt", "\u00e2\u20ac\u2039", "visible character, once"),  # U+200B, decoded wrongly twice
    ("prompt", "x" * 201, "at most 200 characters"),
    ("prompt", "a\x00b", "control characters"),
    ("prompt", "a\x1bb", "control characters"),
    ("prompt", "a\ud800b", "control characters"),
    ("prompt", None, "text"),
    ("prompt", 5, "text"),
    ("prompt", ["a"], "text"),
    ("negative_prompt", "y" * 201, "at most 200 characters"),
    ("negative_prompt", "\x07", "control characters"),
    ("mode", "int4", "one of bf16, w8a8"),
    ("mode", "BF16", "one of bf16, w8a8"),
    ("mode", "", "one of bf16, w8a8"),
    ("mode", "a" * 33, "one of bf16, w8a8"),
    ("mode", "bf16\n", "one of bf16, w8a8"),
    ("size", "96x64", "one of 96x96, 64x96"),
    ("size", "96 x 96", "one of 96x96, 64x96"),
    ("size", "096x96", "one of 96x96, 64x96"),
    ("size", [96, 96], "one of 96x96, 64x96"),
    ("num_frames", 16, "4k+1 from 5 to 17"),
    ("num_frames", 21, "4k+1 from 5 to 17"),
    ("num_frames", 1, "4k+1 from 5 to 17"),
    ("num_frames", -3, "4k+1 from 5 to 17"),
    ("num_frames", 17.5, "4k+1"),
    ("num_frames", "17", "4k+1"),
    ("num_frames", True, "4k+1"),
    ("num_inference_steps", 0, "1 to 50"),
    ("num_inference_steps", 51, "1 to 50"),
    ("num_inference_steps", 10**40, "1 to 50"),
    ("guidance_scale", 0.5, "1 to 20"),
    ("guidance_scale", 20.5, "1 to 20"),
    ("guidance_scale", float("nan"), "1 to 20"),
    ("guidance_scale", float("inf"), "1 to 20"),
    ("guidance_scale", "4", "1 to 20"),
    ("seed", -1, "0 to 9223372036854775807"),
    ("seed", MAX_SEED + 1, "0 to 9223372036854775807"),
    ("seed", 1.5, "0 to 9223372036854775807"),
    ("seed", 2.0**53 + 2, "0 to 9223372036854775807"),
    ("seed", True, "0 to 9223372036854775807"),
    ("model", "wan-14b", "one of wan-mini"),
    ("model", "../etc", "one of wan-mini"),
    ("steps", 5, "fields prompt, negative_prompt"),
    ("\ud800", 5, "fields prompt, negative_prompt"),
    ("", 5, "fields prompt, negative_prompt"),
    ("body", 5, "fields prompt, negative_prompt"),
]


@pytest.mark.parametrize(("field", "value", "bound"), BAD, ids=lambda v: ascii(v)[:24])
def test_each_bound(offer: WorkerOffer, field: str, value: object, bound: str) -> None:
    found = violations({"prompt": "a red circle", field: value}, catalog_of(offer))
    assert len(found) == 1
    assert bound in found[0].bound
    assert found[0].detail
    if field != "\ud800":
        assert found[0].field == field
        assert found[0].value == shown(value)


@pytest.mark.parametrize(("field", "name"), [("fps", "fps"), ("", "The empty name")])
def test_unknown_field_gets_a_plain_sentence(offer: WorkerOffer, field: str, name: str) -> None:
    (found,) = violations({"prompt": "x", field: 8}, catalog_of(offer))
    assert found.detail.startswith(f"{name} is not a field; the fields are prompt, negative_prompt")


@pytest.mark.parametrize("prompt", ["🟥", "圆", "한", "\u0915\u093e", "1", "…"])
def test_any_visible_character_will_do(offer: WorkerOffer, prompt: str) -> None:
    assert resolve(GenerationBody(prompt=prompt), catalog_of(offer))[0].prompt == prompt


def test_everything_wrong_is_reported_at_once(offer: WorkerOffer) -> None:
    raw = {
        "prompt": "",
        "negative_prompt": "\x00",
        "mode": "none-such",
        "size": "1x1",
        "num_frames": 4,
        "num_inference_steps": 99,
        "guidance_scale": 99,
        "seed": -1,
        "surprise": 1,
    }
    found = violations(raw, catalog_of(offer))
    assert sorted(each.field for each in found) == sorted(raw)


def test_missing_prompt_does_not_hide_the_rest(offer: WorkerOffer) -> None:
    found = violations({"num_frames": 4}, catalog_of(offer))
    assert {each.field for each in found} == {"prompt", "num_frames"}


@pytest.mark.parametrize("raw", [None, [], "text", 5, True])
def test_body_that_is_no_object(offer: WorkerOffer, raw: object) -> None:
    (found,) = violations(raw, catalog_of(offer))
    assert found.field == "body"
    assert "prompt" in found.bound


def test_known_mode_without_worker_lists_what_is_served(offer: WorkerOffer) -> None:
    bf16_only = another(offer, modes=slice(1))
    catalog = Catalog((bf16_only,), {bf16_only.queue: 0}, catalog_of(offer).known)
    with pytest.raises(ModeNotServed, match="Served now: wan-mini: bf16") as refused:
        resolve(GenerationBody(prompt="x", mode="w8a8"), catalog)
    assert refused.value.context["served"] == [{"model": "wan-mini", "modes": ["bf16"]}]


def test_known_model_without_worker(offer: WorkerOffer) -> None:
    catalog = Catalog((offer,), {offer.queue: 0}, frozenset({("wan-14b", "bf16")}))
    with pytest.raises(ModeNotServed, match="model wan-14b"):
        resolve(GenerationBody(prompt="x", model="wan-14b"), catalog)


def test_unknown_mode_stays_unknown_without_workers(offer: WorkerOffer) -> None:
    catalog = Catalog((), {}, catalog_of(offer).known)
    (found,) = violations({"prompt": "x", "mode": "int4"}, catalog)
    assert (found.field, found.bound) == ("mode", "one of bf16, w8a8")


@pytest.mark.parametrize("named", [None, "wan-mini"])
def test_the_modes_of_a_dead_model_are_not_those_of_a_live_one(
    offer: WorkerOffer, named: str | None
) -> None:
    known = catalog_of(offer).known | {("wan-14b", "int4")}
    catalog = Catalog((offer,), {offer.queue: 0}, known)
    (found,) = violations({"prompt": "x", "mode": "int4", "model": named}, catalog)
    assert (found.field, found.bound) == ("mode", "one of bf16, w8a8")
    with pytest.raises(ModeNotServed, match="No live worker serves mode int4 of model wan-14b"):
        resolve(GenerationBody(prompt="x", mode="int4", model="wan-14b"), catalog)


def test_unknown_model_stays_unknown_without_workers(offer: WorkerOffer) -> None:
    catalog = Catalog((), {}, catalog_of(offer).known)
    (found,) = violations({"prompt": "x", "model": "wan-13b"}, catalog)
    assert (found.field, found.bound) == ("model", "one of wan-mini")


@pytest.mark.parametrize("mode", [None, "bf16", "anything"])
def test_no_worker_was_ever_live(mode: str | None) -> None:
    with pytest.raises(ModeNotServed, match="No worker is live"):
        resolve(GenerationBody(prompt="x", mode=mode), Catalog((), {}, frozenset()))


def test_several_models_have_to_be_named(offer: WorkerOffer) -> None:
    catalog = catalog_of(offer, another(offer, name="wan-14b"))
    (found,) = violations({"prompt": "x"}, catalog)
    assert (found.field, found.bound) == ("model", "one of wan-14b, wan-mini")
    request, _ = resolve(GenerationBody(prompt="x", model="wan-14b"), catalog)
    assert request.model == "wan-14b"


def words(tokenizer: str, text: str) -> int | None:
    """A tokenizer for which every word is a token; only the one named `a…a` is available."""
    return len(text.split()) if tokenizer == "a" * 64 else None


def test_texts_are_bounded_in_tokens(offer: WorkerOffer) -> None:
    catalog = catalog_of(another(offer, tokenizer="a" * 64, max_prompt_tokens=3))
    raw = {"prompt": "one two three", "negative_prompt": "a b c d"}
    with pytest.raises(InvalidSpec) as refused:
        resolve_json(raw, catalog, words)
    (found,) = refused.value.violations
    assert (found.field, found.value, found.bound) == (
        "negative_prompt",
        "4 tokens",
        "at most 3 tokens",
    )
    assert found.detail == "negative_prompt has 4 tokens, which is more than 3; shorten it."
    raw["negative_prompt"] = "a b c"
    assert resolve_json(raw, catalog, words)[0].negative_prompt == "a b c"


def test_tokens_are_reported_beside_other_violations(offer: WorkerOffer) -> None:
    catalog = catalog_of(another(offer, tokenizer="a" * 64, max_prompt_tokens=3))
    raw = {"prompt": "a b c d", "num_frames": 4, "seed": -1}
    with pytest.raises(InvalidSpec) as refused:
        resolve_json(raw, catalog, words)
    assert {each.field for each in refused.value.violations} == {"prompt", "num_frames", "seed"}


def test_each_text_is_refused_once(offer: WorkerOffer) -> None:
    """Texts with too many or disallowed characters are not tokenized."""
    catalog = catalog_of(another(offer, tokenizer="a" * 64, max_prompt_tokens=3))
    for text, bound in (("x " * 101, "200 characters"), ("a b c d \ud800", "control characters")):
        with pytest.raises(InvalidSpec) as refused:
            resolve_json({"prompt": text}, catalog, words)
        (found,) = refused.value.violations
        assert bound in found.bound


def test_without_a_tokenizer_the_worker_checks_the_tokens(offer: WorkerOffer) -> None:
    body = GenerationBody(prompt="a b c d")
    bounded = another(offer, tokenizer="b" * 64, max_prompt_tokens=3)
    assert resolve(body, catalog_of(bounded), words)[1] == bounded.queue
    assert resolve(body, catalog_of(another(offer, max_prompt_tokens=3)), words)
    assert resolve(body, catalog_of(another(offer, tokenizer="a" * 64, max_prompt_tokens=3)))


def test_worker_that_takes_more_tokens_is_chosen(offer: WorkerOffer) -> None:
    short = another(offer, tokenizer="a" * 64, max_prompt_tokens=3)
    long = another(offer, tokenizer="a" * 64, max_prompt_tokens=4)
    catalog = catalog_of(short, long, waiting={long.queue: 9})
    assert resolve(GenerationBody(prompt="a b c d"), catalog, words)[1] == long.queue


WORDED = [
    (
        {"seed": -1},
        "seed is -1, which is not a whole number from 0 to 9223372036854775807; leave it out for a "
        "random one.",
    ),
    ({"mode": "W8A8"}, "mode is W8A8, which is not one of bf16, w8a8."),
    ({"mode": "int4"}, "mode int4 is not known; use one of bf16, w8a8."),
    ({"size": "large"}, "size is large, which is not one of 96x96, 64x96."),
    ({"size": None, "prompt": None}, "prompt is null, which is not text with at least one "),
    ({"num_frames": True}, "num_frames is true, which is not a whole number of the form 4k+1."),
    ({"num_frames": [17]}, "num_frames is [17], which is not a whole number of the form 4k+1."),
    ({"mode": {"a": None}}, 'mode is {"a": null}, which is not one of bf16, w8a8.'),
    ({"guidance_scale": 21}, "guidance_scale is 21, which is not a number from 1 to 20."),
]


@pytest.mark.parametrize(("changes", "detail"), WORDED, ids=lambda v: ascii(v)[:24])
def test_a_refusal_is_one_sentence_in_the_words_of_json(
    offer: WorkerOffer, changes: dict[str, object], detail: str
) -> None:
    (found,) = violations({"prompt": "x"} | changes, catalog_of(offer))
    assert found.detail.startswith(detail)


def test_a_body_that_is_no_object_names_no_class(offer: WorkerOffer) -> None:
    (found,) = violations([], catalog_of(offer))
    assert found.detail.startswith("The body is not a JSON object; its fields are prompt, ")


def test_a_whole_number_may_have_a_decimal_point(offer: WorkerOffer) -> None:
    raw = {"prompt": "x", "seed": 7.0, "num_frames": 17.0, "num_inference_steps": 2e1}
    request, _ = resolve_json(raw, catalog_of(offer))
    assert (request.seed, request.num_frames, request.num_inference_steps) == (7, 17, 20)
    assert all(isinstance(each, int) for each in (request.seed, request.num_frames))


def test_without_guidance_the_models_own_negative_prompt_is_left_out(offer: WorkerOffer) -> None:
    for given, expected in (({}, ""), ({"negative_prompt": "dark"}, "dark")):
        raw = {"prompt": "x", "guidance_scale": 1} | given
        assert resolve_json(raw, catalog_of(offer))[0].negative_prompt == expected


def test_shown_values_are_short_valid_text() -> None:
    assert shown("x" * 500) == "x" * 80 + "… (500 characters)"
    assert shown("\ud800") == "\\ud800"
    assert shown(float("nan")) == "NaN"
    assert isinstance(shown(10**40), str)
