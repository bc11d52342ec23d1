"""Read a worker's settings from environment variables, once, in `worker.startup.main`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from jobs.telemetry.logs import LogFormat
from jobs.telemetry.settings import TracingSettings

DeviceChoice = Literal["auto", "cpu", "cuda", "npu"]
DrainChoice = Literal["finish", "requeue"]


@dataclass(frozen=True)
class StallLimits:
    """The times without a sign of life after which a job counts as hanging.

    Attributes:
        floor_s: the least limit of any step.
        first_step_s: the limit of a step of a kind that was not measured yet: it may compile and
            tune kernels.
    """

    floor_s: float = 15.0
    first_step_s: float = 600.0


class WorkerSettings(TracingSettings):
    """The settings of a worker. The aliases are the environment variables."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, populate_by_name=True)

    # Secret, because the URL may contain a password.
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), validation_alias="REDIS_URL"
    )
    artifacts_url: str = Field(validation_alias="ARTIFACTS_URL")
    config: Path = Field(Path("deploy/wan-mini.toml"), validation_alias="WORKER_CONFIG")
    device: DeviceChoice = Field("auto", validation_alias="WORKER_DEVICE")
    threads: int | None = Field(
        None,
        ge=1,
        validation_alias="WORKER_THREADS",
        description="CPU threads for the model; all cores this process may use when unset.",
    )
    drain: DrainChoice = Field(
        "finish",
        validation_alias="WORKER_DRAIN",
        description="What SIGTERM does to the current job: finish it, or return it to the queue.",
    )
    stall_floor_s: float = Field(
        StallLimits.floor_s,
        gt=0,
        validation_alias="WORKER_STALL_FLOOR_S",
        description="A step may take ten times the median of its kind, and always this long.",
    )
    first_step_s: float = Field(
        StallLimits.first_step_s,
        gt=0,
        validation_alias="WORKER_FIRST_STEP_S",
        description="A step of a kind that was not measured yet may take this long.",
    )
    ready_file: Path | None = Field(
        None,
        validation_alias="WORKER_READY_FILE",
        description="The file that is there while the worker offers its model; by default it is in "
        "the worker's scratch folder.",
    )
    # Set by torchrun, for several ranks on one job.
    rank: int = Field(0, ge=0, validation_alias="RANK")
    world_size: int = Field(1, ge=1, validation_alias="WORLD_SIZE")
    local_rank: int = Field(0, ge=0, validation_alias="LOCAL_RANK")
    log_format: LogFormat = Field(LogFormat.TEXT, validation_alias="LOG_FORMAT")

    @property
    def stall_limits(self) -> StallLimits:
        """The two limits together."""
        return StallLimits(floor_s=self.stall_floor_s, first_step_s=self.first_step_s)
