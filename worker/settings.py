"""The process edge: what a worker reads from its environment, once, in `main()`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.logs import LogFormat
from worker.devices import DeviceChoice


class WorkerSettings(BaseSettings):
    """Where the worker finds Redis, its artifacts, its configuration and its device."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, populate_by_name=True)

    # Secret, because it may hold a password.
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
    log_format: LogFormat = Field(LogFormat.TEXT, validation_alias="LOG_FORMAT")
