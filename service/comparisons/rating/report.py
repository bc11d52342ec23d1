"""Turn the votes of a comparison into its report, as JSON for the page, for print and for programs.

`statistics.summary.summarize` does the arithmetic. Here votes are selected and explained: training,
pairs with a failed half, and votes without watching (if the comparison has that rule) are left out.
A report takes up to seconds of CPU time, so it is kept until a vote or a pair changes.
"""

import hashlib
import json
import statistics as numbers
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final, cast

from redis import Redis

from jobs import redis_keys
from service.comparisons.model import Arm, Comparison, Pair, PairKind, PairState
from service.comparisons.rating.raters import Rater, RaterStore
from service.comparisons.rating.votes import Answer, VoteStore
from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.statistics.design import Design
from service.comparisons.statistics.noninferiority import Bounds
from service.comparisons.statistics.summary import PairMeasure, summarize
from service.comparisons.statistics.votes import SCORES, Outcome, Side, Vote, counted
from service.comparisons.statistics.votes import PairKind as VoteKind
from service.comparisons.store import ComparisonStore

Json = dict[str, Any]

REPORT_VERSION: Final = 1
"""Part of the fingerprint: what an older version has kept is not shown."""

NOT_SEEN: Final = "given without watching"
TRAINING: Final = "training"
FAILED: Final = "on a pair that has failed since"


@dataclass(frozen=True, slots=True)
class Ballot:
    """An answer of a rater with its pair; `left_out` says why a vote does not count, if so."""

    rater: Rater
    answer: Answer
    pair: Pair
    left_out: str | None


class Reports:
    """Makes and keeps reports. Safe to share between threads; Redis errors are raised."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._comparisons = ComparisonStore(redis)
        self._raters = RaterStore(redis)
        self._votes = VoteStore(redis)
        self._lock = Lock()

    def get(self, comparison_id: str) -> Json:
        """Return the report as of now. Raises ComparisonNotFound."""
        with self._lock:  # two callers at once are answered with one computation
            comparison = self._comparisons.get(comparison_id)
            pairs = self._comparisons.pairs(comparison_id)
            raters = self._raters.all(comparison_id)
            mark = self._fingerprint(comparison, pairs, raters)
            key = redis_keys.comparison_part(comparison_id, "report")
            kept = cast("bytes | None", self._redis.get(key))
            if kept is not None:
                found = json.loads(kept)
                if found["fingerprint"] == mark:
                    return cast("Json", found)
            given = ballots(comparison, pairs, raters, self._votes)
            made = report(comparison, pairs, raters, given) | {"fingerprint": mark}
            self._redis.set(key, json.dumps(made))
        if not self._comparisons.exists(comparison_id):  # deleted meanwhile
            self._redis.delete(key)
        return made

    def export(self, comparison_id: str) -> tuple[Comparison, list[Ballot]]:
        """Read a comparison and all its answers. Raises ComparisonNotFound."""
        comparison = self._comparisons.get(comparison_id)
        pairs = self._comparisons.pairs(comparison_id)
        return comparison, ballots(comparison, pairs, self._raters.all(comparison_id), self._votes)

    def _fingerprint(
        self, comparison: Comparison, pairs: Sequence[Pair], raters: Sequence[Rater]
    ) -> str:
        """Return a digest of everything that the report follows from."""
        digest = hashlib.sha256(f"{REPORT_VERSION}".encode())
        for part in (comparison, *pairs, *raters):
            digest.update(part.model_dump_json().encode())
        for text in self._votes.texts(comparison.id, [rater.id for rater in raters]):
            digest.update(text + b"\n")
        return digest.hexdigest()


def ballots(
    comparison: Comparison, pairs: Sequence[Pair], raters: Iterable[Rater], votes: VoteStore
) -> list[Ballot]:
    """Read all answers, by rater and in the order in which the pairs were shown."""
    by_id = {pair.id: pair for pair in pairs}
    return [
        Ballot(rater, answer, pair, _why_left_out(comparison, pair, answer))
        for rater in raters
        for answer in votes.answers(comparison.id, rater.id)
        if (pair := by_id.get(answer.pair_id)) is not None
    ]


def _why_left_out(comparison: Comparison, pair: Pair, answer: Answer) -> str | None:
    if answer.skipped:
        return None  # it is no vote in the first place
    if answer.kind is PairKind.TRAINING:
        return TRAINING
    if pair.state is not PairState.READY:
        return FAILED
    needed = comparison.rating.least_seen * comparison.settings.num_frames
    seen = answer.provenance.frames_seen or (0, 0)
    return NOT_SEEN if min(seen) < needed else None


def counted_votes(comparison: Comparison, given: Iterable[Ballot]) -> list[Vote]:
    """Return the votes that the statistics are made from, one for each criterion."""
    return [
        Vote(
            prompt_id=each.pair.prompt_id or "",
            pair_id=each.pair.id,
            rater_id=each.rater.id,
            criterion=criterion,
            outcome=outcome_of(each.answer, criterion),
            candidate_side=Side.LEFT if each.answer.candidate_left else Side.RIGHT,
            is_repeat=each.answer.is_repeat,
            kind=VoteKind(each.answer.kind.value),
        )
        for each in given
        if not each.answer.skipped and each.left_out is None
        for criterion in comparison.criteria
        if criterion in each.answer.choices
    ]


def outcome_of(answer: Answer, criterion: str) -> Outcome:
    """Return what a vote says of the candidate."""
    choice = answer.choices[criterion]
    if choice == "tie":
        return Outcome.TIE
    return Outcome.WIN if (choice == "left") is answer.candidate_left else Outcome.LOSS


def design_of(comparison: Comparison) -> Design:
    """Return what was fixed before the first vote, as the statistics take it."""
    return Design(
        candidate=_named(comparison, Arm.CANDIDATE),
        reference=_named(comparison, Arm.REFERENCE),
        criteria=comparison.criteria,
        ties=comparison.ties,
        bounds=Bounds(comparison.margin, comparison.alpha, comparison.power),
        seed=int(comparison.opaque("statistics")[:8], 16),
    )


def _named(comparison: Comparison, arm: Arm) -> str:
    """Return how sentences name one side: by its mode, with the model only if the modes are one."""
    contender = comparison.contender(arm)
    if comparison.reference.mode != comparison.candidate.mode:
        return contender.mode
    return f"{contender.mode} of {contender.model}"


def measures_of(pairs: Iterable[Pair]) -> list[PairMeasure]:
    """Return the automatic measures of test pairs, without the infinite PSNR of equal pixels."""
    return [
        PairMeasure(pair.prompt_id or "", pair.id, name, value)
        for pair in pairs
        if pair.kind is PairKind.TEST and pair.measures is not None
        for name, value in pair.measures.model_dump().items()
        if value is not None
    ]


def report(
    comparison: Comparison,
    pairs: Sequence[Pair],
    raters: Sequence[Rater],
    given: Sequence[Ballot],
) -> Json:
    """Return the report of these answers, as plain values that JSON can hold."""
    votes = counted_votes(comparison, given)
    result = summarize(votes, design_of(comparison), measures_of(pairs))
    excluded = {each["rater_id"]: each["reasons"] for each in result["exclusions"]}
    kept = [vote for vote in votes if vote.rater_id not in excluded]
    left_out = Counter(each.left_out for each in given if each.left_out is not None)
    states = Counter(pair.state for pair in pairs if pair.kind is PairKind.TEST)
    answered = [each for each in given if not each.answer.skipped]
    return {
        "comparison": _head(comparison),
        "pairs": {state.value: states[state] for state in PairState},
        "answers": {
            "votes": len(answered),
            "skips": len(given) - len(answered),
            "counted": len(answered) - left_out.total(),
            "left_out": [
                {"reason": reason, "votes": number} for reason, number in sorted(left_out.items())
            ],
        },
        "raters": _raters(raters, given, excluded),
        "prompts": _by_prompt(comparison, pairs, kept),
        "result": result,
    }


def _head(comparison: Comparison) -> Json:
    shown = {"id", "title", "created_at", "state", "reference", "candidate", "settings"}
    shown |= {"margin", "alpha", "power", "ties", "rating"}
    criteria = [BY_ID[name] for name in comparison.criteria]
    return comparison.model_dump(mode="json", include=shown) | {
        "criteria": [
            {"id": each.id, "name": each.name, "definition": each.definition} for each in criteria
        ],
    }


def _raters(
    raters: Iterable[Rater], given: Iterable[Ballot], excluded: Mapping[str, list[str]]
) -> list[Json]:
    """Return what each rater did, and whether the rules leave it out."""
    of_rater: dict[str, list[Answer]] = defaultdict(list)
    for each in given:
        if each.answer.kind is not PairKind.TRAINING:
            of_rater[each.rater.id].append(each.answer)
    rows = []
    for rater in raters:
        answers = of_rater[rater.id]
        watched = [
            each.provenance.seconds_watched
            for each in answers
            if not each.skipped and each.provenance.seconds_watched is not None
        ]
        rows.append(
            {
                "id": rater.id,
                "name": rater.name,
                "removed": rater.removed_at is not None,
                "votes": sum(not each.skipped for each in answers),
                "skips": sum(each.skipped for each in answers),
                "seconds_watched_median": numbers.median(watched) if watched else None,
                "excluded": rater.id in excluded,
                "reasons": excluded.get(rater.id, []),
            }
        )
    return rows


def _by_prompt(comparison: Comparison, pairs: Iterable[Pair], votes: Iterable[Vote]) -> list[Json]:
    """Return each prompt with its pairs, the worst for the candidate first, then those without."""
    by_pair: dict[str, list[Vote]] = defaultdict(list)
    for vote in counted(votes):
        by_pair[vote.pair_id].append(vote)
    of_prompt: dict[str | None, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.kind is PairKind.TEST:
            of_prompt[pair.prompt_id].append(pair)
    rows = []
    for prompt in comparison.prompts:
        own = of_prompt[prompt.id]
        of_pairs = [_pair(pair) | _tally(comparison, by_pair[pair.id]) for pair in own]
        together = _tally(comparison, [vote for pair in own for vote in by_pair[pair.id]])
        names: Json = {"prompt_id": prompt.id, "prompt": prompt.prompt}
        rows.append(names | together | {"pairs": sorted(of_pairs, key=_worst_first)})
    return sorted(rows, key=_worst_first)


def _pair(pair: Pair) -> Json:
    return {
        "pair_id": pair.id,
        "seed": pair.seed,
        "state": pair.state.value,
        "jobs": {arm.value: pair.half(arm).job_id for arm in Arm},
        "measures": pair.measures.model_dump() if pair.measures else None,
    }


def _tally(comparison: Comparison, votes: Sequence[Vote]) -> Json:
    outcomes = Counter((vote.criterion, vote.outcome) for vote in votes)
    return {
        "votes": len(votes),
        "share": sum(SCORES[vote.outcome] for vote in votes) / len(votes) if votes else None,
        "criteria": {
            name: {outcome.value: outcomes[name, outcome] for outcome in Outcome}
            for name in comparison.criteria
        },
    }


def _worst_first(row: Json) -> tuple[bool, float]:
    return row["share"] is None, row["share"] or 0.0
