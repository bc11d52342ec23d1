"""Turn votes into the result of a comparison, as plain values that JSON can hold.

A result follows from the votes, the design and the seed alone; the order of votes changes nothing.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from service.comparisons.statistics import sentences
from service.comparisons.statistics.design import Design
from service.comparisons.statistics.intervals import (
    ClusteredShare,
    Interval,
    bootstrap_share,
    clustered_mean,
    clustered_share,
    wilson,
)
from service.comparisons.statistics.noninferiority import Verdict, judge, votes_needed
from service.comparisons.statistics.reliability import (
    Scale,
    repeat_consistency,
    side_bias,
    vote_agreement,
)
from service.comparisons.statistics.screening import exclusions
from service.comparisons.statistics.significance import (
    binomial_test,
    holm,
    prompt_means,
    sign_flip_test,
)
from service.comparisons.statistics.votes import SCORES, Outcome, Score, Ties, Vote, counted, scores

Json = dict[str, Any]


_UNBOUNDED: Final = (-math.inf, math.inf)
_BOUNDS: Final = {"ssim": (-1.0, 1.0), "psnr_db": (0.0, math.inf)}


@dataclass(frozen=True, slots=True)
class PairMeasure:
    """An automatic measure of one pair.

    Attributes:
        value: of the pair itself, such as the PSNR between its videos, or the candidate's value
            minus the reference's.
    """

    prompt_id: str
    pair_id: str
    name: str
    value: float


def summarize(votes: Iterable[Vote], design: Design, measures: Iterable[PairMeasure] = ()) -> Json:
    """Return the result without excluded raters, and beside it that with all of them."""
    everything = list(votes)
    excluded = exclusions(everything, design.screening)
    names = {exclusion.rater_id for exclusion in excluded}
    kept = [vote for vote in everything if vote.rater_id not in names]
    result = _result(kept, design)
    return {
        "design": asdict(design) | {"limit": design.bounds.limit},
        **result,
        "exclusions": [
            {"rater_id": exclusion.rater_id, "reasons": list(exclusion.reasons)}
            for exclusion in excluded
        ],
        "with_all_raters": _result(everything, design) if excluded else result,
        "measures": _measures(measures),
    }


def _result(votes: Sequence[Vote], design: Design) -> Json:
    by_criterion = {
        name: [vote for vote in votes if vote.criterion == name] for name in design.criteria
    }
    criteria = {name: _criterion(name, given, design) for name, given in by_criterion.items()}
    for test in ("clustered", "sign_flip"):
        adjusted = holm({name: each["difference"][test] for name, each in criteria.items()})
        for name, p_value in adjusted.items():
            criteria[name]["difference"][f"{test}_holm"] = p_value
    return {
        "criteria": criteria,
        "conclusion": _conclusion(by_criterion, design),
        "pairs": _pairs(votes, design),
    }


def _criterion(name: str, votes: Sequence[Vote], design: Design) -> Json:
    """Return all that is said of one criterion."""
    test_votes = counted(votes)
    outcomes = Counter(vote.outcome for vote in test_votes)
    decisive = outcomes[Outcome.WIN] + outcomes[Outcome.LOSS]
    given = scores(test_votes, design.ties)
    share = clustered_share(given)
    verdict, interval = judge(share, design.bounds)
    tie_share = outcomes[Outcome.TIE] / len(test_votes) if test_votes else 0.0
    diluted = tie_share if design.ties is Ties.HALF else 0.0
    needed = votes_needed(share, decisive, diluted, design.bounds)
    differences = [mean - 0.5 for mean in prompt_means(given).values()]
    return {
        "votes": len(test_votes),
        "decisive": decisive,
        "raters": len({vote.rater_id for vote in test_votes}),
        "prompts": len({vote.prompt_id for vote in test_votes}),
        "outcomes": {str(each): _outcome(outcomes[each], len(test_votes)) for each in Outcome},
        "share": _share(given, share, interval, design),
        "verdict": str(verdict),
        "bounds": {
            "limit": design.bounds.limit,
            "lower": interval.low if interval else None,
            "upper": interval.high if interval else None,
            "confidence": 1 - design.bounds.alpha,
        },
        "sentence": sentences.of_criterion(name, verdict, share, interval, needed, design),
        "votes_needed": _json(needed),
        "difference": {
            "clustered": share.p_value if share else 1.0,
            "sign_flip": sign_flip_test(differences, design.seed),
            "binomial": binomial_test(outcomes[Outcome.WIN], decisive),
        },
        "reliability": _reliability(votes),
    }


def _outcome(votes: int, total: int) -> Json:
    return {
        "votes": votes,
        "share": votes / total if total else None,
        "wilson": _json(wilson(votes, total)),
    }


def _share(
    given: Sequence[Score],
    share: ClusteredShare | None,
    interval: Interval | None,
    design: Design,
) -> Json:
    drawn = bootstrap_share(given, design.bounds.level, design.bootstrap_draws, design.seed)
    return {
        "value": sum(score.value for score in given) / len(given) if given else None,
        "counted": len(given),
        "interval": _json(interval),
        "bootstrap": _json(drawn),
        "effective_votes": share.effective_votes if share else None,
        "design_effect": share.design_effect if share else None,
        "df": share.df if share else None,
    }


def _reliability(votes: Sequence[Vote]) -> Json:
    return {
        "alpha_nominal": vote_agreement(votes, Scale.NOMINAL),
        "alpha_ordinal": vote_agreement(votes, Scale.ORDINAL),
        "side_bias": _json(side_bias(votes)),
        "repeats": _json(repeat_consistency(votes)),
    }


def _conclusion(by_criterion: Mapping[str, Sequence[Vote]], design: Design) -> Json:
    """Judge all criteria together.

    Non-inferior takes every criterion at the full level: a wrong one needs no correction, since all
    must pass. Inferior takes one criterion only, so its level is divided by their number.
    """
    shares = {
        name: clustered_share(scores(counted(votes), design.ties))
        for name, votes in by_criterion.items()
    }
    verdicts = {name: judge(share, design.bounds)[0] for name, share in shares.items()}
    level = 1 - 2 * design.bounds.alpha / len(shares)
    inferior = {
        name: Verdict.INFERIOR
        for name, share in shares.items()
        if share and share.interval(level).high < design.bounds.limit
    }
    if inferior:
        verdict = Verdict.INFERIOR
        verdicts = inferior
    elif all(each is Verdict.NON_INFERIOR for each in verdicts.values()):
        verdict = Verdict.NON_INFERIOR
    else:
        verdict = Verdict.INCONCLUSIVE
        passed = Verdict.NON_INFERIOR
        verdicts = {
            name: each if each is passed else Verdict.INCONCLUSIVE
            for name, each in verdicts.items()
        }
    return {
        "verdict": str(verdict),
        "sentence": sentences.of_all(verdict, verdicts, design),
    }


def _pairs(votes: Sequence[Vote], design: Design) -> list[Json]:
    """Return the outcomes of each test pair, the worst for the candidate first."""
    by_pair: dict[tuple[str, str], list[Vote]] = defaultdict(list)
    for vote in counted(votes):
        if vote.criterion in design.criteria:
            by_pair[vote.prompt_id, vote.pair_id].append(vote)
    rows: list[tuple[float, str, str, Json]] = []
    for (prompt, pair), given in by_pair.items():
        share = sum(SCORES[vote.outcome] for vote in given) / len(given)
        outcomes = {
            name: {
                str(outcome): sum(v.criterion == name and v.outcome is outcome for v in given)
                for outcome in Outcome
            }
            for name in design.criteria
        }
        row = {"prompt_id": prompt, "pair_id": pair, "share": share, "criteria": outcomes}
        rows.append((share, prompt, pair, row))
    return [row for *_, row in sorted(rows, key=lambda each: each[:3])]


def _measures(measures: Iterable[PairMeasure]) -> Json:
    """Return the mean of each measure with its interval, clustered by prompt."""
    by_name: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for measure in measures:
        by_name[measure.name].append((measure.prompt_id, measure.value))
    return {
        name: _json(clustered_mean(values, bounds=_BOUNDS.get(name, _UNBOUNDED)))
        for name, values in sorted(by_name.items())
    }


def _json(value: Any) -> Json | None:
    return None if value is None else asdict(value)
