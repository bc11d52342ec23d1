"""Serve the routes of raters: join, see the pair to judge, vote, skip, take back.

A rater comes by a link, or with an API key of role rater. What the answers say does not follow from
the modes, and both videos of a pair are sent alike (`docs/comparisons.md`).
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from jobs import redis_keys
from jobs.errors import Forbidden, InvalidSpec, PairLeftOut
from service.api.deps import (
    AppState,
    AppStateDep,
    JsonBodyDep,
    SeatDep,
)
from service.api.json_body import parsed
from service.api.known_query import refuse_unknown_parameters
from service.api.openapi import SIGN_IN_ANSWER, VIDEO_RESPONSES, body_of, problems
from service.api.routes.session import set_cookie
from service.api.video_response import RangeRequestDep, SentFile, VideoResponse
from service.auth.api_keys import Role
from service.auth.seats import Seat
from service.middleware.credentials import sent_key, sent_session
from service.middleware.host_check import JOIN_PATH
from service.middleware.request_log import client_address
from service.schemas.rating import (
    ItemView,
    JoinBody,
    ProgressView,
    RatingView,
    SkipBody,
    VoteBody,
)

router = APIRouter(tags=["rating"])

NEXT_AFTER_S = 5
"""When to ask again while videos are still made."""

ItemPath = Annotated[str, Path(description="Of `GET /rating/next`.")]
_READ = problems(401, 403, 404, 422, 429, 503)
_ANSWER = problems(400, 401, 403, 404, 409, 413, 415, 422, 429, 503)


@router.post(
    JOIN_PATH,
    summary="Join by a link",
    response_description="The comparison, and how far the rater is in it.",
    responses={**SIGN_IN_ANSWER, **problems(400, 401, 403, 404, 409, 413, 415, 422, 429, 503)},
    openapi_extra={**body_of("JoinBody"), "security": [{}, {"key": []}]},
)
async def join(
    request: Request,
    app_state: AppStateDep,
    body: JsonBodyDep,
    response: Response,
) -> RatingView:
    """Exchange the token of a link for a session, in a cookie that opens this seat and no more.

    The page of the link sends the token, which is after the # and so in no log. The same link works
    on another device, and goes on where the rater is. With a key of role rater as well, the key
    opens the seat from now on; with `comparison` instead of a token, such a key chooses among the
    seats it has.
    """
    refuse_unknown_parameters(request)
    wanted = parsed(JoinBody, body)
    if (wanted.token is None) is (wanted.comparison is None):
        raise InvalidSpec.of(
            "token",
            None,
            "a link's token, or comparison instead",
            "The body needs either token or comparison; send what the link has after the #.",
        )
    owner = await _key_owner(request, app_state)
    if wanted.comparison is not None:
        seat = await _chosen_seat(app_state, owner, wanted.comparison)
    else:
        address = client_address(request.scope)
        assert wanted.token is not None, "one of the two is there"
        seat, session = await run_in_threadpool(app_state.gate.join, wanted.token, address)
        if owner is not None:
            await run_in_threadpool(app_state.raters.claim, seat, owner)
        earlier = sent_session(request.headers)
        if earlier is not None:
            await run_in_threadpool(app_state.sessions.end, earlier)
        set_cookie(request, response, session.text, redis_keys.SESSION_LONGEST_S)
    return RatingView.of(*await run_in_threadpool(app_state.desk.overview, seat))


@router.get("/rating", summary="What do I rate?", responses=problems(401, 403, 404, 422, 429, 503))
def read_rating(seat: SeatDep, app_state: AppStateDep) -> RatingView:
    """Say what the comparison asks, how far the rater is, and whether it takes votes."""
    return RatingView.of(*app_state.desk.overview(seat))


@router.get(
    "/rating/next",
    response_model=ItemView,
    summary="The pair to judge",
    response_description="The pair: the same one until it is answered.",
    responses={
        204: {
            "description": "All that can be shown was answered. With `Retry-After` more may come."
        },
        **problems(401, 403, 404, 409, 422, 429, 503),
    },
)
async def read_next(seat: SeatDep, app_state: AppStateDep) -> ItemView | Response:
    """Show the next pair, or the one that was shown last and not answered, on any device."""
    shown = await run_in_threadpool(app_state.desk.next, seat)
    if shown is not None:
        return ItemView.of(shown, app_state.settings.public_path)
    _, progress = await run_in_threadpool(app_state.desk.overview, seat)
    headers = {"Retry-After": str(NEXT_AFTER_S)} if progress.waiting else None
    return Response(status_code=204, headers=headers)


@router.head("/rating/items/{item}/{side}.mp4", include_in_schema=False)
@router.get(
    "/rating/items/{item}/{side}.mp4",
    summary="Fetch one video of a pair",
    response_class=VideoResponse,
    responses={
        **{status: each for status, each in VIDEO_RESPONSES.items() if status != 307},
        **problems(400, 401, 403, 404, 409, 412, 416, 422, 429, 503),
    },
)
async def read_side(
    seat: SeatDep,
    item: ItemPath,
    side: Literal["left", "right"],
    app_state: AppStateDep,
    range_request: RangeRequestDep,
) -> Response:
    """Fetch the MP4 on one side, whole or in ranges.

    Both have equally many bytes and the same headers but for an ETag that says nothing.
    """

    def view() -> SentFile:
        copy, tag = app_state.desk.file(seat, item, side)
        return SentFile(
            key=copy.key,
            bytes=copy.bytes,
            what="video",
            etag=tag,
            modified=None,  # it could tell which mode is slower
            cache_control="private, no-store",
            gone=PairLeftOut(
                "A video of this pair is no longer stored, so it cannot be judged; skip it, and "
                "tell those who sent you the link."
            ),
        )

    return await app_state.downloads.send_file(seat.id, view, range_request)


@router.post(
    "/rating/items/{item}/vote",
    status_code=201,
    summary="Vote",
    response_description="The vote is stored.",
    responses=_ANSWER,
    openapi_extra=body_of("VoteBody"),
)
async def vote(
    seat: SeatDep, item: ItemPath, body: JsonBodyDep, app_state: AppStateDep
) -> ProgressView:
    """Answer every criterion of a pair with left, right or tie; once, whichever device is first."""
    given = parsed(VoteBody, body)
    desk = app_state.desk
    return ProgressView.of(
        await run_in_threadpool(desk.vote, seat, item, given.answers, given.provenance)
    )


@router.post(
    "/rating/items/{item}/skip",
    status_code=201,
    summary="Skip a pair",
    response_description="The skip is stored.",
    responses=_ANSWER,
    openapi_extra=body_of("SkipBody"),
)
def skip(seat: SeatDep, item: ItemPath, body: JsonBodyDep, app_state: AppStateDep) -> ProgressView:
    """Leave a pair out that cannot be judged, with a reason or without; it does not come again."""
    return ProgressView.of(app_state.desk.skip(seat, item, parsed(SkipBody, body).reason))


@router.post(
    "/rating/undo",
    summary="Take back the last answer",
    response_description="The pair is the next one again.",
    responses=problems(401, 403, 404, 409, 422, 429, 503),
)
def undo(seat: SeatDep, app_state: AppStateDep) -> ProgressView:
    """Take back the last vote or skip, until the next one is given."""
    return ProgressView.of(app_state.desk.undo(seat))


async def _key_owner(request: Request, app_state: AppState) -> str | None:
    """Return the owner of the key of role rater that was sent; None without a key."""
    key = sent_key(request.headers)
    if key is None:
        return None
    principal = await app_state.admission.admit(key)
    return principal.owner if principal.role is Role.RATER else None


async def _chosen_seat(app_state: AppState, owner: str | None, comparison_id: str) -> Seat:
    seat = None
    if owner is not None:
        seat = await run_in_threadpool(app_state.raters.seat_of_key, owner, comparison_id)
    if seat is None:
        raise Forbidden(
            "No key of role rater was sent that has a seat in this comparison; ask those who run "
            "it to add you, or open the link that they sent."
        )
    return seat
