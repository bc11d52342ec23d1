"""The part of a client: send one prompt, follow the job, save the MP4.

Speaks the public HTTP API like any other client and knows nothing of the packages behind it. Sends
the API key in WAN_API_KEY, if there is one.
"""

import hashlib
import os
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from deploy.local.errors import LocalError, Refused

KEY_VARIABLE = "WAN_API_KEY"

_POLL_S = 0.2
_TERMINAL = {"succeeded", "failed", "cancelled"}

Job = dict[str, Any]  # the JSON of GET /jobs/{id}


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """What to generate; None leaves the choice to the service."""

    prompt: str
    mode: str | None = None
    seed: int | None = None
    num_inference_steps: int | None = None

    def body(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Bearer(httpx.Auth):
    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


def connect(url: str) -> httpx.Client:
    """A client for a service on this machine; proxies from the environment are not for loopback."""
    key = os.environ.get(KEY_VARIABLE)
    return httpx.Client(
        base_url=url, timeout=30, trust_env=False, auth=_Bearer(key) if key else None
    )


def send(client: httpx.Client, order: VideoRequest) -> Job:
    """Enqueues the order. Raises Refused with what the problem document says."""
    answer = client.post("/generate", json=order.body())
    if answer.is_client_error:
        raise Refused(_explain(answer))
    return _json(answer)


def follow(client: httpx.Client, job: Job, watch: Callable[[Job], None]) -> Job:
    """Polls until the job has ended; `watch` sees every state and may raise to give up.

    Raises LocalError when the job failed or was cancelled.
    """
    watch(job)
    while job["state"] not in _TERMINAL:
        time.sleep(_POLL_S)
        job = _json(client.get(f"/jobs/{job['id']}"))
        watch(job)
    if job["state"] != "succeeded":
        failure = job["failure"] or {"code": "cancelled", "detail": "somebody cancelled it"}
        raise LocalError(f"the job {job['state']} ({failure['code']}): {failure['detail']}")
    return job


def save(client: httpx.Client, job: Job, out: Path) -> None:
    """Downloads the job's MP4 to `out`, which is replaced only by a complete and verified file."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file:
            # The link opens the video by itself; the key is not for whatever host it names.
            with client.stream("GET", job["video"]["url"], auth=None) as answer:
                if answer.is_error:
                    answer.read()
                    raise LocalError(_explain(answer))
                for chunk in answer.iter_bytes():
                    digest.update(chunk)
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != job["video"]["sha256"]:
            raise LocalError(f"the video of job {job['id']} arrived damaged: its sha256 differs")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _json(answer: httpx.Response) -> Job:
    if answer.is_error:
        raise LocalError(_explain(answer))
    document: Job = answer.json()
    return document


def _explain(answer: httpx.Response) -> str:
    """The problem document as text for a terminal: a line for each violation, or its detail."""
    if "json" not in answer.headers.get("content-type", ""):
        return f"HTTP {answer.status_code} from {answer.url}: {answer.text[:200]}"
    problem = answer.json()
    if violations := problem.get("errors"):
        return "\n".join(
            [f"{problem['title']}:", *(f"  - {each['detail']}" for each in violations)]
        )
    return str(problem.get("detail") or problem)
