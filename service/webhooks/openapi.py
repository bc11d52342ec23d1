"""How the OpenAPI document describes the calls of a webhook: as a callback of `POST /generate`."""

from typing import Any

from service.webhooks.message import WebhookMessage

_HEADERS = {
    "webhook-id": "The same for every try, so that a message that comes twice is known.",
    "webhook-timestamp": "The second of this try; refuse what is older than some minutes.",
    "webhook-signature": "One `v1,` and base64 for each secret, separated by spaces: the "
    "HMAC-SHA256 of `id.timestamp.body` (standardwebhooks.com).",
}


def callbacks() -> dict[str, Any]:
    """Describe them as part of an operation."""
    schema = WebhookMessage.model_json_schema(ref_template="#/components/schemas/{model}")
    # The document has these anyway.
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
