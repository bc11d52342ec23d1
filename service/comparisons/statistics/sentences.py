"""Put a verdict into one plain sentence that claims no more than its interval."""

from collections.abc import Mapping

from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.statistics.design import Design
from service.comparisons.statistics.intervals import ClusteredShare, Interval
from service.comparisons.statistics.noninferiority import Verdict, VotesNeeded
from service.comparisons.statistics.votes import Ties


def of_criterion(
    criterion: str,
    verdict: Verdict,
    share: ClusteredShare | None,
    interval: Interval | None,
    needed: VotesNeeded,
    design: Design,
) -> str:
    """Say what the votes show for one criterion."""
    subject = f"{BY_ID[criterion].name}: {design.candidate}"
    limit = f"the limit of {_percent(design.bounds.limit)} that was fixed beforehand"
    if share is None or interval is None:
        return (
            f"{subject} cannot be judged yet, since that takes votes of at least two raters"
            " on at least two prompts."
        )
    kind = "votes (ties as half)" if design.ties is Ties.HALF else "decisive votes"
    won = f"it won {_percent(share.share)} of {share.votes} {kind}"
    sure = f"with {100 * (1 - design.bounds.alpha):g} % confidence"
    if verdict is Verdict.NON_INFERIOR:
        return (
            f"{subject} is non-inferior to {design.reference}, since {won}, {sure} more than"
            f" {_percent(interval.low)}, which is above {limit}."
        )
    if verdict is Verdict.INFERIOR:
        return (
            f"{subject} is inferior to {design.reference}, since {won}, {sure} less than"
            f" {_percent(interval.high)}, which is below {limit}."
        )
    more = f"; by plan, {needed.missing} more decisive votes are needed" if needed.missing else ""
    return (
        f"{subject} may or may not be as good as {design.reference}, since {won} and the"
        f" {100 * interval.level:g} % interval, {_percent(interval.low)} to"
        f" {_percent(interval.high)}, contains {limit}{more}."
    )


def of_all(verdict: Verdict, verdicts: Mapping[str, Verdict], design: Design) -> str:
    """Say what the votes show for all criteria together; `verdicts` are those that it rests on."""
    margin = f"the margin of {100 * design.bounds.margin:g} points"
    if verdict is Verdict.NON_INFERIOR:
        return (
            f"{design.candidate} is non-inferior to {design.reference} within {margin}"
            f" in {_names(verdicts, Verdict.NON_INFERIOR)}."
        )
    if verdict is Verdict.INFERIOR:
        return (
            f"{design.candidate} is inferior to {design.reference} by more than {margin}"
            f" in {_names(verdicts, Verdict.INFERIOR)}."
        )
    return (
        f"The votes do not show whether {design.candidate} is as good as {design.reference} within"
        f" {margin}; open is {_names(verdicts, Verdict.INCONCLUSIVE)}."
    )


def _names(verdicts: Mapping[str, Verdict], wanted: Verdict) -> str:
    names = [
        BY_ID[criterion].name.lower()
        for criterion, verdict in verdicts.items()
        if verdict is wanted
    ]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
