"""Define the JSON of the health checks."""

from typing import Literal

from pydantic import BaseModel, Field


class HealthView(BaseModel):
    """The answer of a process that is alive."""

    status: Literal["ok"] = "ok"


class ReadyView(BaseModel):
    """The answer of a service that can run jobs."""

    status: Literal["ready", "degraded"] = Field(
        default="ready", description="degraded: jobs run, and an operator should read `warnings`."
    )
    workers: int = Field(description="Live workers.")
    degraded: int = Field(
        description="Workers that run a mode slower than it was made for, or that are out of "
        "service; `GET /workers` says which, and why."
    )
    faults: list[str] | None = Field(
        default=None, description="Why workers are out of service; missing if none is."
    )
    warnings: list[str] | None = Field(
        default=None,
        description="Settings of Redis that may lose accepted jobs, or a missing artifact store; "
        "absent if there are none.",
    )
