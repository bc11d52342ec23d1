"""Build and sign the messages that webhooks receive, and describe them in the OpenAPI document.

Signatures follow the Standard Webhooks specification (standardwebhooks.com).
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, Field
from standardwebhooks import Webhook

from service.schemas.jobs import JobView

_HEADERS = {
    "webhook-id": "The same for every try, so that a message that comes twice is known.",
    "webhook-timestamp": "The second of this try; refuse what is older than some minutes.",
    "webhook-signature": "One `v1,` and base64 for each secret, separated by spaces: the "
    "HMAC-SHA256 of `id.timestamp.body` (standardwebhooks.com).",
}


class WebhookMessage(BaseModel):
    """The body of a call."""

    type: str = Field(
        description="What has happened.", examples=["job.succeeded", "job.failed", "job.cancelled"]
    )
    timestamp: datetime = Field(description="When it happened; when it is sent is in the headers.")
    data: JobView = Field(description="The job, as `GET /jobs/{job_id}` would show it.")

    @classmethod
    def about(cls, job: JobView) -> "WebhookMessage":
        """Build the message about a job that has ended."""
        assert job.finished_at is not None, "messages are sent only about jobs that have ended"
        return cls(type=f"job.{job.state}", timestamp=job.finished_at, data=job)


class Signer:
    """Signs with every secret it was given, so that receivers may change from one to the next."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._webhooks = [Webhook(secret) for secret in secrets]
        self._user_agent = f"wan-hif8/{version('wan-hif8')}"

    def headers(self, job_id: str, body: bytes, now: datetime | None = None) -> Mapping[str, str]:
        """Return the headers of one try.

        The message id is made of the job's id, because a job ends once. So it is the same for every
        try.
        """
        message_id = f"msg_{job_id}"
        at = now or datetime.now(UTC)
        signatures = [each.sign(message_id, at, body.decode()) for each in self._webhooks]
        return {
            "content-type": "application/json",
            "user-agent": self._user_agent,
            "webhook-id": message_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": " ".join(signatures),
        }


def callbacks() -> dict[str, Any]:
    """Describe the calls of a webhook in OpenAPI, as a callback of the operation that creates jobs.

    Returns:
        What to merge into the operation, here that of `POST /generate`.
    """
    schema = WebhookMessage.model_json_schema(ref_template="#/components/schemas/{model}")
    # The document has these schemas anyway.
    schema.pop("$defs")
    parameters = [
        {
            "name": name,
            "in": "header",
            "required": True,
            "description": description,
            "schema": {"type": "string"},
        }
        for name, description in _HEADERS.items()
    ]
    operation = {
        "summary": "The job has ended",
        "description": "Sent at least once when a job with a `webhook_url` has ended.",
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "2XX": {"description": "Received; it is not sent again."},
            "410": {"description": "Not wanted any more; it is not sent again."},
            "default": {"description": "Sent again later, six times within some seven hours."},
        },
    }
    return {"callbacks": {"job-ended": {"{$request.body#/webhook_url}": {"post": operation}}}}
