"""Serve the routes of comparisons, for ops: create, list, follow, steer and delete them.

They change what Redis holds; `service/comparisons/orchestrator.py` does the rest, in some service
process, within seconds.
"""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.api.deps import AppStateDep, ComparisonsDep, JsonBodyDep, OpsDep
from service.api.openapi import COMPARISON_ANSWER, COMPARISON_BODY, problems
from service.comparisons.creation import plan
from service.comparisons.model import Comparison, ComparisonState
from service.comparisons.pair_jobs import Planned, cloned, delete_comparison, retried
from service.comparisons.store import MAX_PAGE, ComparisonStore, wrong_state
from service.schemas.comparisons import (
    MAX_PAIRS_PAGE,
    PAIRS_PAGE,
    ComparisonListView,
    ComparisonView,
    PairPageView,
)
from service.schemas.rating import RaterListView

router = APIRouter(prefix="/comparisons", tags=["comparisons"])

_OPEN = (ComparisonState.RUNNING, ComparisonState.PAUSED)
_READ = problems(401, 403, 404, 422, 429, 503)
_CHANGE = problems(401, 403, 404, 409, 422, 429, 503)


@router.post(
    "",
    status_code=201,
    summary="Compare two modes",
    response_description="The comparison; its jobs are submitted from now on.",
    responses={**COMPARISON_ANSWER, **problems(400, 401, 403, 413, 415, 422, 429, 503)},
    openapi_extra=COMPARISON_BODY,
)
def create_comparison(
    # First, so that the body of an unauthenticated request is not read.
    principal: OpsDep,
    body: JsonBodyDep,
    app_state: AppStateDep,
    comparisons: ComparisonsDep,
    response: Response,
) -> ComparisonView:
    """Check everything against what the live workers offer, and create the comparison.

    Every prompt is checked for both modes. If anything is refused, nothing is created, and each
    error names its prompt or the line of the file. The jobs are submitted at low priority: while no
    other job waits.
    """
    catalog = app_state.catalog.get()
    planned = plan(body, principal.owner, catalog, app_state.token_counter.count)
    return _create(comparisons, planned, app_state.settings.public_path, response)


@router.get("", summary="List comparisons, newest first", responses=_READ)
def list_comparisons(
    principal: OpsDep,
    comparisons: ComparisonsDep,
    limit: Annotated[int, Query(json_schema_extra={"minimum": 1, "maximum": MAX_PAGE})] = 20,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
) -> ComparisonListView:
    """Page through the comparisons of everybody."""
    page = comparisons.list(limit, cursor)
    views = [_view(comparisons, each) for each in page.comparisons]
    return ComparisonListView(comparisons=views, next_cursor=page.next_cursor)


@router.get("/{comparison_id}", summary="Read a comparison", responses=_READ)
def read_comparison(
    principal: OpsDep, comparison_id: str, app_state: AppStateDep, comparisons: ComparisonsDep
) -> ComparisonView:
    """Read what is fixed, how far it is, and who rates."""
    comparison, pairs = comparisons.get(comparison_id), comparisons.pairs(comparison_id)
    raters = app_state.raters.all(comparison_id)
    progress = app_state.desk.progress_of(comparison_id, raters)
    return ComparisonView.of(comparison, pairs, RaterListView.of(raters, progress).raters)


@router.get("/{comparison_id}/pairs", summary="List its pairs", responses=_READ)
def list_pairs(
    principal: OpsDep,
    comparison_id: str,
    comparisons: ComparisonsDep,
    limit: Annotated[
        int, Query(json_schema_extra={"minimum": 1, "maximum": MAX_PAIRS_PAGE})
    ] = PAIRS_PAGE,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
) -> PairPageView:
    """Page through the pairs with their prompts, seeds, jobs and failures."""
    comparison = comparisons.get(comparison_id)
    return PairPageView.of(comparison, comparisons.pairs(comparison_id), limit, cursor)


@router.post("/{comparison_id}/pause", summary="Pause it", responses=_CHANGE)
def pause_comparison(
    principal: OpsDep, comparison_id: str, comparisons: ComparisonsDep
) -> ComparisonView:
    """Submit no further job; those that are queued or running go on."""
    return _change(comparisons, comparison_id, ComparisonState.PAUSED)


@router.post("/{comparison_id}/resume", summary="Resume it", responses=_CHANGE)
def resume_comparison(
    principal: OpsDep, comparison_id: str, comparisons: ComparisonsDep
) -> ComparisonView:
    """Go on with a paused comparison."""
    return _change(comparisons, comparison_id, ComparisonState.RUNNING)


@router.post("/{comparison_id}/close", summary="Close it", responses=_CHANGE)
def close_comparison(
    principal: OpsDep, comparison_id: str, comparisons: ComparisonsDep
) -> ComparisonView:
    """End the rating for good; the result stands. Jobs that have not ended are cancelled."""
    return _change(comparisons, comparison_id, ComparisonState.CLOSED)


@router.post("/{comparison_id}/cancel", summary="Cancel it", responses=_CHANGE)
def cancel_comparison(
    principal: OpsDep, comparison_id: str, comparisons: ComparisonsDep
) -> ComparisonView:
    """Give a comparison up for good, and cancel its jobs."""
    return _change(comparisons, comparison_id, ComparisonState.CANCELLED)


@router.post("/{comparison_id}/retry", summary="Retry what failed", responses=_CHANGE)
def retry_comparison(
    principal: OpsDep, comparison_id: str, comparisons: ComparisonsDep
) -> ComparisonView:
    """Make the failed and cancelled halves again, with the same seeds; videos that exist stay."""
    comparison = comparisons.get(comparison_id)
    if comparison.state.is_final:
        raise wrong_state(comparison, "be retried")
    for pair in comparisons.pairs(comparison_id):
        if retried(pair) != pair:
            comparisons.update_pair(comparison_id, pair.id, retried)
    return _view(comparisons, comparison)


@router.post(
    "/{comparison_id}/clone",
    status_code=201,
    summary="Make a copy of it",
    response_description="The copy: paused, without videos and votes.",
    responses={**COMPARISON_ANSWER, **_READ},
)
def clone_comparison(
    principal: OpsDep,
    comparison_id: str,
    app_state: AppStateDep,
    comparisons: ComparisonsDep,
    response: Response,
) -> ComparisonView:
    """Make a paused comparison with the same prompts, seeds and settings; resume starts it."""
    planned = cloned(comparisons.get(comparison_id), principal.owner)
    return _create(comparisons, planned, app_state.settings.public_path, response)


@router.delete(
    "/{comparison_id}", status_code=204, summary="Delete a comparison", responses=_CHANGE
)
async def remove_comparison(
    principal: OpsDep, comparison_id: str, app_state: AppStateDep, comparisons: ComparisonsDep
) -> Response:
    """Delete a comparison for good, with its votes and the copies for raters.

    Jobs that have not ended are cancelled. The jobs and their videos belong to the owner, and stay.
    """
    await app_state.downloads.run(
        delete_comparison, app_state.store, comparisons, app_state.artifacts, comparison_id
    )
    return Response(status_code=204)


def _create(
    comparisons: ComparisonStore, planned: Planned, public_path: str, response: Response
) -> ComparisonView:
    comparisons.create(planned.comparison, planned.pairs)
    response.headers["Location"] = f"{public_path}/comparisons/{planned.comparison.id}"
    return ComparisonView.of(planned.comparison, planned.pairs, raters=[])


def _change(
    comparisons: ComparisonStore, comparison_id: str, to: ComparisonState
) -> ComparisonView:
    return _view(comparisons, comparisons.change_state(comparison_id, to, _OPEN))


def _view(comparisons: ComparisonStore, comparison: Comparison) -> ComparisonView:
    return ComparisonView.of(comparison, comparisons.pairs(comparison.id))
