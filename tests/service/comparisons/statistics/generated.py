"""Generate votes of clustered raters and prompts, and turn them round."""

import random
from collections.abc import Iterable
from dataclasses import replace

from service.comparisons.statistics.votes import Outcome, Score, Side, Vote

OTHER = {Outcome.WIN: Outcome.LOSS, Outcome.LOSS: Outcome.WIN, Outcome.TIE: Outcome.TIE}
OTHER_SIDE = {Side.LEFT: Side.RIGHT, Side.RIGHT: Side.LEFT}


def votes_of(  # the world's parameters
    seed: int,
    raters: int = 8,
    prompts: int = 15,
    criteria: tuple[str, ...] = ("overall",),
    kept: float = 0.8,
    mean: float = 0.0,
) -> list[Vote]:
    """Return votes whose raters and prompts have effects of their own; some are missing."""
    rng = random.Random(seed)
    prompt_effects = [rng.gauss(0, 0.5) for _ in range(prompts)]
    votes = []
    for rater in range(raters):
        effect = rng.gauss(mean, 0.4)
        for prompt in range(prompts):
            for criterion in criteria:
                preference = effect + prompt_effects[prompt] + rng.gauss(0, 1)
                outcome = Outcome.WIN if preference > 0 else Outcome.LOSS
                if abs(preference) < 0.3:
                    outcome = Outcome.TIE
                side = rng.choice(list(Side))
                if rng.random() < kept:
                    votes.append(
                        Vote(f"p{prompt}", f"pair{prompt}", f"r{rater}", criterion, outcome, side)
                    )
    return votes


def mirrored(votes: Iterable[Vote]) -> list[Vote]:
    """Return the same votes with candidate and reference exchanged."""
    return [
        replace(vote, outcome=OTHER[vote.outcome], candidate_side=OTHER_SIDE[vote.candidate_side])
        for vote in votes
    ]


def mirrored_scores(scores: Iterable[Score]) -> list[Score]:
    """Return the scores that the reference has."""
    return [replace(score, value=1 - score.value) for score in scores]
