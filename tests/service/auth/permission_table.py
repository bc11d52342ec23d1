"""Define who may do what, in one row for each endpoint; `test_permissions.py` checks every row.

`.venv/bin/python -m tests.service.auth.permission_table` writes docs/permissions.md from these
rows.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

DOCUMENT: Final = Path(__file__).resolve().parents[3] / "docs" / "permissions.md"

CALLERS: Final = ("nobody", "owner", "other user", "ops", "revoked key", "signed link", "rater")
"""Owner: the key that requested the job in the path, or any key of role user if there is no job.
Rater: a key of role rater with a seat in the comparison in the path."""

Refusals = tuple[int | None, ...]


class Policy(Enum):
    """The status of the answer to each of CALLERS that is refused; None for those who may."""

    PUBLIC = (None,) * 7
    KEY = (401, None, None, None, 401, 401, 403)
    ANY_KEY = (401, None, None, None, 401, 401, None)
    OWN_JOB = (401, None, 404, None, 401, 401, 403)
    OWN_VIDEO = (401, None, 404, None, 401, None, 403)
    OPS = (401, 403, 403, None, 401, 401, 403)
    LINK = (None, None, None, None, 401, None, None)
    RATER = (401, 403, 403, 403, 401, 401, None)

    def refusal(self, caller: str) -> int | None:
        refusals: Refusals = self.value
        return refusals[CALLERS.index(caller)]


@dataclass(frozen=True)
class Row:
    """One endpoint.

    Attributes:
        done: the status of the answer to callers who may.
        finished: whether the job in the path has its video already.
        preview: whether that job runs instead, and has a preview.
        lists: whether the answer shows jobs: then only those the caller may see.
        json: the body to send.
        done_open: the status on an open service, where it is another one than `done`.
    """

    policy: Policy
    does: str
    done: int = 200
    finished: bool = True
    preview: bool = False
    lists: bool = False
    json: Any = None
    done_open: int | None = None


VOTE: Final = {"answers": {"overall": "left"}}
ASK: Final = {"prompt": "a small red circle"}
NEW_KEY: Final = {"name": "made", "role": "ops"}

COMPARE: Final = {
    "title": "Is w8a8 as good?",
    "reference": {"mode": "bf16"},
    "candidate": {"mode": "w8a8"},
    "prompts": ["a small red circle"],
}

ROWS: Final[dict[str, Row]] = {
    "POST /generate": Row(Policy.KEY, "ask for a video", done=202, json=ASK),
    "GET /jobs": Row(Policy.KEY, "list the jobs one may see", lists=True),
    "GET /jobs/{job_id}": Row(Policy.OWN_JOB, "read a job"),
    "GET /jobs/{job_id}/events": Row(Policy.OWN_JOB, "follow a job"),
    "GET /jobs/{job_id}/preview.webp": Row(
        Policy.OWN_JOB, "see what a running job looks like so far", finished=False, preview=True
    ),
    "DELETE /jobs/{job_id}": Row(Policy.OWN_JOB, "cancel a job", finished=False),
    "GET /jobs/{job_id}/video.mp4": Row(Policy.OWN_VIDEO, "fetch a video"),
    "HEAD /jobs/{job_id}/video.mp4": Row(Policy.OWN_VIDEO, "ask whether there is a video"),
    "GET /jobs/{job_id}/thumbnail.webp": Row(Policy.OWN_VIDEO, "fetch its thumbnail"),
    "HEAD /jobs/{job_id}/thumbnail.webp": Row(Policy.OWN_VIDEO, "ask whether there is one"),
    "GET /jobs/{job_id}/spritesheet.webp": Row(Policy.OWN_VIDEO, "fetch its spritesheet"),
    "HEAD /jobs/{job_id}/spritesheet.webp": Row(Policy.OWN_VIDEO, "ask whether there is one"),
    "POST /v1/videos": Row(Policy.KEY, "ask for a video", json=ASK),
    "GET /v1/videos": Row(Policy.KEY, "list the jobs one may see", lists=True),
    "GET /v1/videos/{video_id}": Row(Policy.OWN_JOB, "read a job"),
    "DELETE /v1/videos/{video_id}": Row(Policy.OWN_JOB, "delete a job and its video"),
    "GET /v1/videos/{video_id}/content": Row(Policy.OWN_JOB, "fetch a video or a picture of it"),
    "HEAD /v1/videos/{video_id}/content": Row(Policy.OWN_JOB, "ask whether there is a video"),
    "POST /v1/videos/edits": Row(Policy.KEY, "be told that it is not supported", done=404),
    "POST /v1/videos/extensions": Row(Policy.KEY, "be told that it is not supported", done=404),
    "POST /v1/videos/characters": Row(Policy.KEY, "be told that it is not supported", done=404),
    "GET /v1/videos/characters/{character_id}": Row(
        Policy.KEY, "be told that it is not supported", done=404
    ),
    "POST /v1/videos/{video_id}/remix": Row(
        Policy.KEY, "be told that it is not supported", done=404
    ),
    "GET /v1/models": Row(Policy.KEY, "see what is offered"),
    "GET /v1/models/{model}": Row(Policy.KEY, "see what one mode is"),
    "GET /models": Row(Policy.KEY, "see what is offered"),
    "POST /session": Row(Policy.ANY_KEY, "sign in"),
    "GET /session": Row(Policy.ANY_KEY, "ask who one is"),
    "DELETE /session": Row(
        Policy.PUBLIC, "sign out; with `all=true`, which needs a key, everywhere", done=204
    ),
    "POST /comparisons": Row(Policy.OPS, "compare two modes", done=201, json=COMPARE),
    "GET /comparisons": Row(Policy.OPS, "list comparisons"),
    "GET /comparisons/{comparison_id}": Row(Policy.OPS, "read a comparison"),
    "GET /comparisons/{comparison_id}/pairs": Row(Policy.OPS, "list its pairs"),
    "POST /comparisons/{comparison_id}/pause": Row(Policy.OPS, "pause it"),
    "POST /comparisons/{comparison_id}/resume": Row(Policy.OPS, "resume it"),
    "POST /comparisons/{comparison_id}/cancel": Row(Policy.OPS, "cancel it"),
    "POST /comparisons/{comparison_id}/close": Row(Policy.OPS, "close it"),
    "POST /comparisons/{comparison_id}/retry": Row(Policy.OPS, "make what failed again"),
    "POST /comparisons/{comparison_id}/clone": Row(Policy.OPS, "make a copy of it", done=201),
    "DELETE /comparisons/{comparison_id}": Row(Policy.OPS, "delete it", done=204),
    "GET /comparisons/{comparison_id}/raters": Row(Policy.OPS, "list the raters"),
    "POST /comparisons/{comparison_id}/raters": Row(
        Policy.OPS, "add a rater", done=201, json={"name": "Ada"}
    ),
    "POST /comparisons/{comparison_id}/raters/{rater_id}/link": Row(
        Policy.OPS, "replace a rater's link", done=201
    ),
    "DELETE /comparisons/{comparison_id}/raters/{rater_id}": Row(
        Policy.OPS, "remove a rater", done=204
    ),
    "GET /comparisons/{comparison_id}/report": Row(Policy.OPS, "read the report"),
    "GET /comparisons/{comparison_id}/export.csv": Row(Policy.OPS, "export the votes"),
    "GET /comparisons/{comparison_id}/export.jsonl": Row(Policy.OPS, "export the votes"),
    "POST /rating/join": Row(
        Policy.LINK, "join a comparison by the token of a rater's link", json={"token": "TOKEN"}
    ),
    "GET /rating": Row(Policy.RATER, "read what one rates"),
    "GET /rating/next": Row(Policy.RATER, "see the next pair"),
    "GET /rating/items/{item}/{side}.mp4": Row(Policy.RATER, "fetch a video of a pair"),
    "HEAD /rating/items/{item}/{side}.mp4": Row(Policy.RATER, "ask whether there is one"),
    "POST /rating/items/{item}/vote": Row(Policy.RATER, "vote", done=201, json=VOTE),
    "POST /rating/items/{item}/skip": Row(Policy.RATER, "skip a pair", done=201, json={}),
    "POST /rating/undo": Row(Policy.RATER, "take back the last answer"),
    "GET /metrics": Row(Policy.OPS, "read the metrics"),
    "GET /workers": Row(Policy.OPS, "see the workers and the queues"),
    "POST /workers/{worker_id}/drain": Row(Policy.OPS, "let a worker take no more jobs", done=202),
    "POST /workers/{worker_id}/resume": Row(Policy.OPS, "let it take jobs again", done=202),
    "GET /failures": Row(Policy.OPS, "see which jobs failed lately"),
    "GET /series": Row(Policy.OPS, "see jobs over time"),
    "GET /keys": Row(Policy.OPS, "list the API keys"),
    "POST /keys": Row(Policy.OPS, "make an API key", done=201, json=NEW_KEY),
    "PATCH /keys/{name}": Row(
        Policy.OPS, "change what a key may do", json={"quota": 3}, done_open=404
    ),
    "POST /keys/{name}/rotate": Row(Policy.OPS, "give a key another secret", done_open=404),
    "POST /keys/{name}/revoke": Row(Policy.OPS, "revoke a key", done_open=404),
    "GET /": Row(Policy.PUBLIC, "find the other addresses; browsers get the page to make videos"),
    "GET /healthz": Row(Policy.PUBLIC, "ask whether the process is alive"),
    "GET /readyz": Row(Policy.PUBLIC, "ask whether jobs can be run"),
    "GET /openapi.json": Row(Policy.PUBLIC, "read the description of the API"),
    "GET /docs": Row(Policy.PUBLIC, "read the same as a page"),
    "GET /redoc": Row(Policy.PUBLIC, "be redirected to that page"),
    "GET /ops": Row(Policy.PUBLIC, "open the operators' page, which shows what its reader may see"),
    "GET /rate": Row(Policy.PUBLIC, "open the raters' page"),
    "GET /static/{version}/{name:path}": Row(Policy.PUBLIC, "load a file of the pages"),
    "GET /favicon.ico": Row(Policy.PUBLIC, "load the icon of the pages"),
    "GET /favicon.svg": Row(Policy.PUBLIC, "load the same icon in any size"),
}

_HEAD: Final = f"""\
# Who may do what

`tests/service/auth/test_permissions.py` checks every row with every caller. This page is written by
`.venv/bin/python -m tests.service.auth.permission_table`.

A job belongs to the *owner* of the key that requested it: the key's name, unless it was made with
another `--owner`. Keys of one owner may do the same with a job. A request for somebody else's job
is answered exactly like one for a job that does not exist (404). A *signed link* is a URL in a
finished job's `video`: it gives access to that one video, thumbnail or spritesheet without a key,
until it expires. While the service is [open](operations.md#keys-and-links), every caller may do
what *ops* may; only a link makes a rater there, too. *nobody* is a caller without a key, and an
expired key is treated like a revoked one. A [session](sessions.md) may do what its key may, except
under `/v1`, which takes keys only. A *rater* is a key of that role with a seat in the
[comparison](comparisons.md#raters-and-votes); the session that a rater's link opens may do the same
and nothing else. Browsers get a page without data at some of these addresses, whoever asks; its
scripts ask the API.

| request | to | {" | ".join(CALLERS)} |
|---|---|{"---|" * len(CALLERS)}
"""


def table() -> str:
    """Return the text of docs/permissions.md."""
    lines = []
    for endpoint, row in ROWS.items():
        cells = (
            "yes" if refusal is None else f"no ({refusal})"
            for refusal in map(row.policy.refusal, CALLERS)
        )
        lines.append(f"| `{endpoint}` | {row.does} | {' | '.join(cells)} |\n")
    return _HEAD + "".join(lines)


if __name__ == "__main__":
    DOCUMENT.write_text(table(), encoding="utf-8")
