"""Say what the pairs of a comparison are: their jobs' requests and keys, and how they are given up.

Nothing here decides when; `orchestrator.py` does.
"""

import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jobs.artifacts.store import ArtifactStore
from jobs.catalog import MIN_GUIDANCE_SCALE
from jobs.errors import JobNotCancellable, JobNotFound, RecordUnreadable
from jobs.record import now
from jobs.spec import GenerationBody
from jobs.store.job_store import JobStore
from jobs.store.submission import Idempotency
from service.comparisons.model import (
    Arm,
    Comparison,
    ComparisonState,
    Half,
    HalfState,
    Pair,
    PairKind,
    PairState,
)
from service.comparisons.store import ComparisonStore, new_comparison_id, new_pair_id
from service.comparisons.viewing_copies import delete_copies


@dataclass(frozen=True, slots=True)
class Planned:
    """A comparison that may be stored, and its pairs."""

    comparison: Comparison
    pairs: tuple[Pair, ...]


def cloned(comparison: Comparison, owner: str) -> Planned:
    """Make a paused comparison of the same prompts, seeds and settings, with no video and no vote.

    It is not checked again: what is no longer served is waited for.
    """
    fresh = {
        "id": new_comparison_id(),
        "title": f"{comparison.title} (copy)"[:200],
        "owner": owner,
        "created_at": now(),
        "secret": secrets.token_hex(16),
        "state": ComparisonState.PAUSED,
        "problem": None,
    }
    clone = comparison.model_copy(update=fresh)
    return Planned(clone, pairs_of(clone))


def pairs_of(comparison: Comparison) -> tuple[Pair, ...]:
    """Make the pairs of a new comparison: those to test, then those that check raters."""
    tests = [
        {"kind": PairKind.TEST, "prompt_id": prompt.id, "seed": seed}
        for prompt in comparison.prompts
        for seed in prompt.seeds
    ]
    rating = comparison.rating
    others = {
        PairKind.TRAINING: rating.training,
        PairKind.GOLD: rating.gold,
        PairKind.IDENTICAL: rating.identical,
    }
    checks = [{"kind": kind} for kind, count in others.items() for _ in range(count)]
    return tuple(
        Pair(id=new_pair_id(), number=number, **fields)  # type: ignore[arg-type]
        for number, fields in enumerate([*tests, *checks], 1)
    )


def body_of(comparison: Comparison, pair: Pair, arm: Arm) -> GenerationBody:
    """Return the request for one half; those of a pair differ in what is the contender's only."""
    assert pair.prompt_id is not None, "a test pair has a prompt"
    prompt = comparison.prompt(pair.prompt_id)
    own = comparison.contender(arm).model_dump(exclude_none=True)
    body = GenerationBody(
        prompt=prompt.prompt, seed=pair.seed, **comparison.settings.model_dump() | own
    )
    if body.guidance_scale != MIN_GUIDANCE_SCALE:  # without guidance it has no effect
        body.negative_prompt = prompt.negative_prompt
    return body


def retried(pair: Pair) -> Pair:
    """Return the pair with its failed halves and copies to be made again; others stay."""
    for arm in Arm:
        half = pair.half(arm)
        if half.state in (HalfState.FAILED, HalfState.CANCELLED):
            pair = pair.with_half(arm, Half(attempt=half.attempt))
    return pair.model_copy(update={"failure": None})


def half_key(comparison: Comparison, pair: Pair, arm: Arm, half: Half) -> Idempotency:
    """Return the key under which a half's job is created once in each attempt."""
    name = f"comparison:{comparison.id}:{pair.id}:{arm.value}:{half.attempt}"
    return Idempotency.of(name, name)


def cancel_jobs(jobs: JobStore, pairs: Iterable[Pair]) -> None:
    """Cancel the open jobs of pairs; what has ended meanwhile, or is gone, is no error."""
    for half in (half for pair in pairs for half in pair.halves):
        if half.state.is_open and half.job_id is not None:
            with suppress(JobNotFound, JobNotCancellable, RecordUnreadable):
                jobs.cancel(half.job_id)


def delete_comparison(
    jobs: JobStore, comparisons: ComparisonStore, artifacts: ArtifactStore, comparison_id: str
) -> None:
    """Delete a comparison with its copies and votes, and cancel its open jobs.

    The jobs themselves belong to their owner, and stay. Calls may be repeated, also after an error.

    Raises:
        ComparisonNotFound: there is none of this id.
        ArtifactsUnavailable: the artifact store does not respond; the comparison is cancelled, and
            can be deleted later.
    """
    with suppress(RecordUnreadable):  # a later version's: nothing is submitted, its jobs just end
        if not comparisons.get(comparison_id).state.is_final:
            # So that nothing more is submitted or copied.
            not_final = [state for state in ComparisonState if not state.is_final]
            comparisons.change_state(comparison_id, ComparisonState.CANCELLED, not_final)
        cancel_jobs(jobs, comparisons.pairs(comparison_id))
    delete_copies(artifacts, comparison_id)
    comparisons.delete(comparison_id)


def has_no_open_job(pairs: Sequence[Pair]) -> bool:
    """Return whether nothing of these pairs is queued or running."""
    return not any(half.state.is_open for pair in pairs for half in pair.halves)


def is_done(pairs: Sequence[Pair]) -> bool:
    """Return whether only a retry would change anything."""
    # A pair with one failed half counts as failed, and its other half may still wait.
    return all(
        pair.failure is not None
        or pair.state is PairState.READY
        or (pair.state is PairState.FAILED and all(half.state.has_ended for half in pair.halves))
        for pair in pairs
    )
