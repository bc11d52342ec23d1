"""Serve raters and results of comparisons to ops: add raters, read the report, export votes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from jobs.errors import InvalidSpec
from service.api.deps import AppStateDep, JsonBodyDep, OpsDep, PublicUrlDep
from service.api.json_body import parsed
from service.api.openapi import body_of, problems
from service.auth.api_keys import KeyStore, Role
from service.comparisons.model import Comparison
from service.comparisons.rating.export import as_csv, as_jsonl
from service.comparisons.rating.report import Ballot
from service.schemas.rating import RaterBody, RaterLinkView, RaterListView

router = APIRouter(prefix="/comparisons/{comparison_id}", tags=["comparisons"])

_READ = problems(401, 403, 404, 422, 429, 503)
_LINK = problems(400, 401, 403, 404, 409, 413, 415, 422, 429, 503)


@router.get("/raters", summary="List its raters", responses=_READ)
def list_raters(_: OpsDep, comparison_id: str, app_state: AppStateDep) -> RaterListView:
    """List who rates, and how far each is. Links cannot be shown again, only replaced."""
    app_state.desk.refuse_missing(comparison_id)
    raters = app_state.raters.all(comparison_id)
    return RaterListView.of(raters, app_state.desk.progress_of(comparison_id, raters))


@router.post(
    "/raters",
    status_code=201,
    summary="Add a rater",
    response_description="The rater, with the link; it is shown this once.",
    responses=_LINK,
    openapi_extra=body_of("RaterBody"),
)
def add_rater(
    _: OpsDep,
    comparison_id: str,
    body: JsonBodyDep,
    app_state: AppStateDep,
    base_url: PublicUrlDep,
) -> RaterLinkView:
    """Make a link for one person, and with `key` let that owner's key of role rater in, too."""
    wanted = parsed(RaterBody, body)
    if wanted.key is not None:
        _refuse_unknown_key(KeyStore(app_state.redis), wanted.key)
    rater, token = app_state.raters.add(comparison_id, wanted.name, wanted.key)
    return RaterLinkView.of(rater, base_url, token)


@router.post(
    "/raters/{rater_id}/link",
    status_code=201,
    summary="Replace a rater's link",
    response_description="The rater, with the new link; it is shown this once.",
    responses=problems(401, 403, 404, 409, 422, 429, 503),
)
def replace_link(
    _: OpsDep, comparison_id: str, rater_id: str, app_state: AppStateDep, base_url: PublicUrlDep
) -> RaterLinkView:
    """Make another link to the same seat; the old one and its sessions end at once."""
    rater, token = app_state.raters.new_link(comparison_id, rater_id)
    return RaterLinkView.of(rater, base_url, token)


@router.delete(
    "/raters/{rater_id}",
    status_code=204,
    summary="Remove a rater",
    response_description="The link and its sessions have ended.",
    responses=_READ,
)
def remove_rater(_: OpsDep, comparison_id: str, rater_id: str, app_state: AppStateDep) -> None:
    """Withdraw a rater's seat for good. The votes stay, and count: rules exclude, not persons."""
    app_state.raters.remove(comparison_id, rater_id)


@router.get(
    "/report",
    summary="Read the report",
    response_description="`docs/comparisons.md` describes it.",
    responses=_READ,
)
def read_report(_: OpsDep, comparison_id: str, app_state: AppStateDep) -> dict[str, Any]:
    """Say what the votes show: verdicts, intervals, checks of the raters, prompts by outcome."""
    return app_state.reports.get(comparison_id)


@router.get(
    "/export.csv",
    summary="Export the votes as CSV",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, **_READ},
)
def export_csv(_: OpsDep, comparison_id: str, app_state: AppStateDep) -> Response:
    """Every vote with its provenance, a row for each criterion; formulas are made harmless."""
    return _export(app_state, comparison_id, as_csv, "text/csv; charset=utf-8", "csv")


@router.get(
    "/export.jsonl",
    summary="Export the votes as JSON lines",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}, **_READ},
)
def export_jsonl(_: OpsDep, comparison_id: str, app_state: AppStateDep) -> Response:
    """Every answer with its provenance, a JSON object in each line."""
    return _export(app_state, comparison_id, as_jsonl, "application/jsonl", "jsonl")


def _export(
    app_state: AppStateDep,
    comparison_id: str,
    write: Callable[[Comparison, Iterable[Ballot]], Iterator[str]],
    media_type: str,
    ending: str,
) -> Response:
    comparison, given = app_state.reports.export(comparison_id)
    headers = {
        "Content-Disposition": f'attachment; filename="comparison-{comparison.id}.{ending}"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(write(comparison, given), media_type=media_type, headers=headers)


def _refuse_unknown_key(keys: KeyStore, owner: str) -> None:
    """Refuse an owner without a usable key of role rater, who could never come in."""
    usable = {key.owner_name for key in keys.all() if key.role is Role.RATER and key.is_usable}
    if owner not in usable:
        raise InvalidSpec.of(
            "key",
            owner,
            "the owner of a usable key of role rater",
            f"There is no usable key of role rater whose owner is {owner}; make one with `python "
            f"-m service keys add NAME --role rater`, or leave key out and send the link.",
        )
