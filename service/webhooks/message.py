"""What a webhook is told, signed by the Standard Webhooks scheme (standardwebhooks.com)."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from pydantic import BaseModel, Field
from standardwebhooks import Webhook

from service.schemas.jobs import JobView


class WebhookMessage(BaseModel):
    """The body of a call."""

    type: str = Field(
        description="What has happened.", examples=["job.succeeded", "job.failed", "job.cancelled"]
    )
    timestamp: datetime = Field(description="When it happened; when it is told is in the headers.")
    data: JobView = Field(description="The job, as `GET /jobs/{job_id}` would show it.")

    @classmethod
    def about(cls, job: JobView) -> "WebhookMessage":
        """Tell of a job that has ended."""
        assert job.finished_at is not None, "only jobs that have ended are told of"
        return cls(type=f"job.{job.state}", timestamp=job.finished_at, data=job)


class Signer:
    """Signs with every secret it was given, so that receivers may change from one to the next."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._webhooks = [Webhook(secret) for secret in secrets]
        self._agent = f"wan-hif8/{version('wan-hif8')}"

    def headers(self, job_id: str, body: bytes, now: datetime | None = None) -> Mapping[str, str]:
        """The headers of one try. A job ends once, so the id of a call is made of the job's."""
        message_id = f"msg_{job_id}"
        at = now or datetime.now(UTC)
        signatures = [each.sign(message_id, at, body.decode()) for each in self._webhooks]
        return {
            "content-type": "application/json",
            "user-agent": self._agent,
            "webhook-id": message_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": " ".join(signatures),
        }
