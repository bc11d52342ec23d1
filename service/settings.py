"""What the service reads from its environment, once, at its start. A bad value stops the start.

- `SERVICE_HOST`: the address to listen on, by default 127.0.0.1. Loopback only, because there is no
  authentication yet.
- `SERVICE_PORT`: the port to listen on, by default 8000; 0 takes a free one.
- `SERVICE_PUBLIC_URL`: how callers reach the service, for the video URLs; by default as each caller
  asked.
- `REDIS_URL`: the Redis or Valkey that holds jobs and queues, by default redis://127.0.0.1:6379/0.
- `ARTIFACTS_URL`: the folder of finished videos, `file:///...`, shared with the workers. Required.

An empty variable counts as absent, as it does for the worker.
"""

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """The settings by the names the code uses; the environment's names are the aliases."""

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, populate_by_name=True, hide_input_in_errors=True
    )

    host: str = Field(default="127.0.0.1", validation_alias="SERVICE_HOST")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, validation_alias="SERVICE_PORT"
    )
    public_url: str | None = Field(default=None, validation_alias="SERVICE_PUBLIC_URL")
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), validation_alias="REDIS_URL"
    )
    artifacts_url: str = Field(validation_alias="ARTIFACTS_URL")

    @field_validator("host")
    @classmethod
    def _is_loopback(cls, host: str) -> str:
        if host == "localhost":
            return host
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError(
                f"{host} is reachable from outside, and the service has no authentication yet, so "
                f"it listens on loopback only; use 127.0.0.1, ::1 or localhost"
            )
        return host

    @field_validator("public_url")
    @classmethod
    def _is_web_address(cls, url: str | None) -> str | None:
        if not url:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
            raise ValueError(f"{url} is not a web address; write it as https://host or with a path")
        return url.rstrip("/")

    @field_validator("redis_url")
    @classmethod
    def _is_redis_address(cls, url: SecretStr) -> SecretStr:
        # The value may hold a password, so it is not repeated.
        if urlsplit(url.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("it does not start with redis://, rediss:// or unix://")
        return url
