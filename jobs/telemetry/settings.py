"""Read the usual environment variables of OpenTelemetry, and decide whether a process traces.

They are part of the settings of service and worker. Traces are off unless OTEL_TRACES_EXPORTER is
`otlp` or an endpoint is named. What is read here is checked at the start; the libraries read the
others themselves, such as OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS
and OTEL_BSP_SCHEDULE_DELAY.
"""

from importlib.util import find_spec
from typing import Final, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_ENDPOINT: Final = "http://localhost:4318"
TRACES_PATH: Final = "/v1/traces"

_NEEDED: Final = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
"""What only traces need; it comes with the extra `tracing`."""


class TracingSettings(BaseSettings):
    """The settings of traces. Fields have the code's names; aliases are the variables."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, populate_by_name=True)

    otel_sdk_disabled: bool = Field(default=False, validation_alias="OTEL_SDK_DISABLED")
    otel_traces_exporter: str | None = Field(default=None, validation_alias="OTEL_TRACES_EXPORTER")
    # Neither is shown in an error: a URL may contain a password.
    otel_endpoint: str | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    otel_traces_endpoint: str | None = Field(
        default=None, validation_alias="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    )
    otel_protocol: str = Field(
        default="http/protobuf", validation_alias="OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    otel_traces_protocol: str | None = Field(
        default=None, validation_alias="OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    )
    otel_service_name: str | None = Field(default=None, validation_alias="OTEL_SERVICE_NAME")

    @property
    def traces(self) -> bool:
        """Whether the process traces."""
        if self.otel_sdk_disabled or self.otel_traces_exporter == "none":
            return False
        asked = (self.otel_traces_exporter, self.otel_endpoint, self.otel_traces_endpoint)
        return any(each is not None for each in asked)

    @property
    def traces_url(self) -> str:
        """The URL that traces are sent to."""
        if self.otel_traces_endpoint is not None:
            return self.otel_traces_endpoint
        return (self.otel_endpoint or DEFAULT_ENDPOINT).rstrip("/") + TRACES_PATH

    @model_validator(mode="after")
    def _traces_can_be_sent(self) -> Self:
        if not self.traces:
            return self
        if self.otel_traces_exporter not in (None, "otlp"):
            raise ValueError(
                f"OTEL_TRACES_EXPORTER: {self.otel_traces_exporter} is not supported; take otlp or "
                f"none"
            )
        protocol = self.otel_traces_protocol or self.otel_protocol
        if protocol != "http/protobuf":
            raise ValueError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol} is not supported; take http/protobuf, "
                f"which collectors receive on port 4318"
            )
        if not _is_web_address(self.traces_url):
            raise ValueError(
                "OTEL_EXPORTER_OTLP_ENDPOINT: it is not a web address; write it as "
                f"{DEFAULT_ENDPOINT}"
            )
        missing = [name for name in _NEEDED if not _is_installed(name)]
        if missing:
            raise ValueError(
                f"OTEL_TRACES_EXPORTER or an endpoint asks for traces, and {missing[0]} is not "
                f"installed; install the extra `tracing` (docs/operations.md#traces), or set "
                f"OTEL_SDK_DISABLED=true"
            )
        return self


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
