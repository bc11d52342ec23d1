"""What the service reads from its environment, once, at its start. A bad value stops the start.

- `SERVICE_HOST`: the address to listen on, by default 127.0.0.1. Any that is not loopback needs an
  API key to be there at the start (`python -m service keys add NAME`).
- `SERVICE_PORT`: the port to listen on, by default 8000; 0 takes a free one.
- `SERVICE_PUBLIC_URL`: how callers reach the service, for the video URLs; by default as each caller
  asked. Its host is let in on loopback, too.
- `SERVICE_URL_SECRET`: what signs video URLs, 32 characters or more; by default one that the
  processes share through Redis.
- `SERVICE_URL_TTL_S`: how long a video URL opens its video, by default 3600.
- `SERVICE_RATE`: how often each key may ask, by default 600/minute.
- `SERVICE_QUOTA`: how many jobs each key may have waiting and running, by default 20. A key may
  have a rate and a quota of its own.
- `SERVICE_MAX_WAITING`: how many jobs may wait in a queue, by default 200.
- `SERVICE_KEEP_VIDEOS_H`: how many hours after its job's end a video is kept, by default 168.
- `SERVICE_KEEP_JOBS_H`: the same for the job's record, and with it its video; by default 720, which
  is also the most: Redis drops a record 30 days after the job was created.
- `SERVICE_KEEP_ORPHANS_H`: from which age on a video that no record names is deleted, by default
  24.
- `SERVICE_WEBHOOK_HOSTS` and its like: see `service/webhooks/settings.py`. They need
  `SERVICE_PUBLIC_URL`, too: what is sent has no caller whose way here could be taken.
- `SERVICE_MAX_STREAMS`: how many event streams a process keeps open, by default 1000; one key of
  role user may have a tenth of them, and at least 10.
- `SERVICE_HEARTBEAT_S`: how often a stream without events shows that it is alive, by default 15.
- `SERVICE_CATALOG_KEPT_S`: how long what the workers offer is taken as it was last read, by
  default 1.
- `LOG_FORMAT`: `text`, the default, or `json`: one object per line.
- `REDIS_URL`: the Redis or Valkey that holds jobs and queues, by default redis://127.0.0.1:6379/0.
- `ARTIFACTS_URL`: where finished videos are, the same for service and workers: `file:///folder`, or
  `s3://bucket/prefix?endpoint=https://host:port&region=name` with credentials in AWS_ACCESS_KEY_ID
  and AWS_SECRET_ACCESS_KEY. Required.

An empty variable counts as absent, as it does for the worker.
"""

import ipaddress
from datetime import timedelta
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.connection import parse_url

from jobs.logs import LogFormat
from jobs.redis_keys import RECORD_TTL_S
from service.auth.rate_limit import check_rate
from service.schemas.expiry import Keep
from service.webhooks.settings import WebhookSettings

Hours = Annotated[float, Field(gt=0, le=RECORD_TTL_S / 3600, allow_inf_nan=False)]


class RedisSettings(BaseSettings):
    """What everything that speaks to Redis needs, and all that managing keys does."""

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, populate_by_name=True, hide_input_in_errors=True
    )

    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), validation_alias="REDIS_URL"
    )

    @field_validator("redis_url")
    @classmethod
    def _is_redis_address(cls, url: SecretStr) -> SecretStr:
        # The value may hold a password, so it is not repeated.
        text = url.get_secret_value()
        if not text.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("it does not start with redis://, rediss:// or unix://")
        try:
            parse_url(text)  # type: ignore[no-untyped-call]
        except ValueError:
            # Said anew, and without what was read: a part of a password may be taken for the port.
            raise ValueError(
                "it cannot be read as redis://:password@host:port/number; write what is special in "
                "a password, like / or @, as %2F or %40"
            ) from None
        return url


class ServiceSettings(WebhookSettings, RedisSettings):
    """The settings by the names the code uses; the environment's names are the aliases."""

    host: str = Field(default="127.0.0.1", validation_alias="SERVICE_HOST")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, validation_alias="SERVICE_PORT"
    )
    public_url: str | None = Field(default=None, validation_alias="SERVICE_PUBLIC_URL")
    url_secret: Annotated[SecretStr, Field(min_length=32)] | None = Field(
        default=None, validation_alias="SERVICE_URL_SECRET"
    )
    url_ttl_s: Annotated[int, Field(ge=1, le=30 * 24 * 60 * 60)] = Field(
        default=3600, validation_alias="SERVICE_URL_TTL_S"
    )
    rate: str = Field(default="600/minute", validation_alias="SERVICE_RATE")
    quota: Annotated[int, Field(ge=1)] = Field(default=20, validation_alias="SERVICE_QUOTA")
    max_waiting: Annotated[int, Field(ge=1)] = Field(
        default=200, validation_alias="SERVICE_MAX_WAITING"
    )
    keep_videos_h: Hours = Field(default=168, validation_alias="SERVICE_KEEP_VIDEOS_H")
    keep_jobs_h: Hours = Field(default=720, validation_alias="SERVICE_KEEP_JOBS_H")
    keep_orphans_h: Annotated[float, Field(ge=1)] = Field(
        default=24, validation_alias="SERVICE_KEEP_ORPHANS_H"
    )
    max_streams: Annotated[int, Field(ge=1)] = Field(
        default=1000, validation_alias="SERVICE_MAX_STREAMS"
    )
    heartbeat_s: Annotated[float, Field(gt=0, le=300)] = Field(
        default=15, validation_alias="SERVICE_HEARTBEAT_S"
    )
    catalog_kept_s: Annotated[float, Field(ge=0, le=10)] = Field(
        default=1, validation_alias="SERVICE_CATALOG_KEPT_S"
    )
    artifacts_url: str = Field(validation_alias="ARTIFACTS_URL")
    log_format: LogFormat = Field(default=LogFormat.TEXT, validation_alias="LOG_FORMAT")

    @property
    def keep(self) -> Keep:
        return Keep(
            videos=timedelta(hours=self.keep_videos_h),
            jobs=timedelta(hours=self.keep_jobs_h),
            orphans=timedelta(hours=self.keep_orphans_h),
        )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)

    @property
    def known_names(self) -> frozenset[str]:
        """Hosts the service may be asked for under, besides those of loopback."""
        return frozenset({urlsplit(self.public_url).hostname or ""} if self.public_url else ())

    @property
    def public_path(self) -> str:
        """What callers' paths begin with, where a proxy takes it off; mostly nothing."""
        return urlsplit(self.public_url or "").path

    @field_validator("public_url")
    @classmethod
    def _is_web_address(cls, url: str | None) -> str | None:
        if not url:
            return None
        if not _is_web_address(url):
            raise ValueError(f"{url} is not a web address; write it as https://host or with a path")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _webhooks_know_the_way_here(self) -> Self:
        if self.webhook_hosts and self.public_url is None:
            raise ValueError(
                "SERVICE_PUBLIC_URL is missing: webhooks (SERVICE_WEBHOOK_HOSTS) say where the "
                "video is, so write how callers reach this service"
            )
        return self

    @field_validator("rate")
    @classmethod
    def _is_rate(cls, rate: str) -> str:
        return check_rate(rate)


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0  # and raises for what is no port
    except ValueError:
        return False
    is_bare = not (parts.query or parts.fragment or "?" in url or "#" in url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and is_bare


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine, without asking a name server."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
