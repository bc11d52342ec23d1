"""Send one prompt to the service, follow its job, and save the MP4.

It uses the public HTTP API, like any other client, and does not import the packages behind it. It
sends the API key in WAN_API_KEY, if that is set.
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
    """A video to generate; None means the service's default."""

    prompt: str
    mode: str | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    size: str | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON for `POST /generate`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Bearer(httpx.Auth):
    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


def connect(url: str) -> httpx.Client:
    """Return a client for a service on this machine; it ignores the environment's proxies."""
    key = os.environ.get(KEY_VARIABLE)
    return httpx.Client(
        base_url=url, timeout=30, trust_env=False, auth=_Bearer(key) if key else None
    )


def send(client: httpx.Client, request: VideoRequest) -> Job:
    """Submit the request; return the job.

    Raises:
        Refused: with the text of the problem document.
    """
    response = client.post("/generate", json=request.body())
    if response.is_client_error:
        raise Refused(_explain(response))
    return _json(response)


def follow(client: httpx.Client, job: Job, on_update: Callable[[Job], None]) -> Job:
    """Poll until the job has ended; return it.

    Args:
        on_update: called with the job after each poll; an error it raises ends the polling.

    Raises:
        LocalError: the job failed or was cancelled.
    """
    on_update(job)
    while job["state"] not in _TERMINAL:
        time.sleep(_POLL_S)
        job = _json(client.get(f"/jobs/{job['id']}"))
        on_update(job)
    if job["state"] != "succeeded":
        failure = job["failure"] or {"code": "cancelled", "detail": "somebody cancelled it"}
        raise LocalError(f"the job {job['state']} ({failure['code']}): {failure['detail']}")
    return job


def save(client: httpx.Client, job: Job, out: Path) -> None:
    """Download the job's MP4 to `out`, which is replaced only by a complete and verified file."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file:
            # The signed URL needs no API key, which must not be sent to its host.
            with client.stream("GET", job["video"]["url"], auth=None) as response:
                if response.is_error:
                    response.read()
                    raise LocalError(_explain(response))
                for chunk in response.iter_bytes():
                    digest.update(chunk)
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != job["video"]["sha256"]:
            raise LocalError(f"the video of job {job['id']} arrived damaged: its sha256 differs")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _json(response: httpx.Response) -> Job:
    if response.is_error:
        raise LocalError(_explain(response))
    document: Job = response.json()
    return document


def _explain(response: httpx.Response) -> str:
    """Return a problem document as text: one line for each violation, or its detail."""
    if "json" not in response.headers.get("content-type", ""):
        return f"HTTP {response.status_code} from {response.url}: {response.text[:200]}"
    problem = response.json()
    if violations := problem.get("errors"):
        return "\n".join(
            [f"{problem['title']}:", *(f"  - {each['detail']}" for each in violations)]
        )
    return str(problem.get("detail") or problem)
