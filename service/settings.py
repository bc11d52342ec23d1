"""Read the service's settings from environment variables, once at start. A bad value is an error.

- `SERVICE_HOST`: the address to listen on, by default 127.0.0.1. With any address that is not
  loopback the service starts only if there is an API key (`python -m service keys add NAME`).
- `SERVICE_PORT`: the port to listen on, by default 8000; 0 takes a free one.
- `SERVICE_KEYS`: whether callers need an API key on loopback, too: `required`; `auto`, the default:
  unless no key was ever made and there is no SERVICE_PUBLIC_URL; or `open`: only while Redis holds
  a key. Beyond loopback they always need one.
- `SERVICE_STATE_DIR`: the folder in which it is noted that the service had keys, by default
  `wan-hif8` in XDG_STATE_HOME, which is ~/.local/state if it is not set.
- `SERVICE_PUBLIC_URL`: the URL under which callers reach the service, for video URLs; by default
  that of each request. A service on loopback accepts its host in the Host header, too.
- `SERVICE_ALLOWED_ORIGINS`: origins of other sites whose pages may call the service with an API key
  (CORS), separated by commas and each exactly as browsers send it, like https://app.example; by
  default none.
- `SERVICE_URL_SECRET`: the secret that signs video URLs, 32 characters or more; by default one that
  the processes share through Redis.
- `SERVICE_URL_TTL_S`: how many seconds a video URL is valid, by default 3600.
- `SERVICE_RATE`: how many requests each key may send, by default 600/minute.
- `SERVICE_QUOTA`: how many jobs each key may have waiting and running, by default 20. A key may
  have its own rate and quota instead.
- `SERVICE_MAX_WAITING`: how many jobs may wait in a queue, by default 200.
- `SERVICE_KEEP_VIDEOS_H`: how many hours after its job's end a video is kept, by default 168.
- `SERVICE_KEEP_JOBS_H`: the same for the job's record, which is deleted with its video; by default
  720, which is also the most: Redis drops a record 30 days after the job was created.
- `SERVICE_KEEP_ORPHANS_H`: the age in hours at which a video that no record names is deleted, by
  default 24.
- `SERVICE_WEBHOOK_HOSTS` and other settings of webhooks: see `service/webhooks/settings.py`. They
  require `SERVICE_PUBLIC_URL`, because a webhook is not sent in answer to a request, whose URL the
  video URLs could use.
- `SERVICE_MAX_STREAMS`: how many event streams a process keeps open, by default 1000. One key of
  role user may have a tenth of them, and at least 10.
- `SERVICE_MAX_CONNECTIONS`: how many connections a process keeps open, by default 4000, or fewer
  where the system allows the process fewer open files. One address may have a tenth of them.
- `SERVICE_KEEP_ALIVE_S`: for how many seconds a connection is kept open for the next request, by
  default 65, which is more than the 60 s of most proxies.
- `SERVICE_MAX_DOWNLOADS`: how many videos and pictures a process sends at a time, by default 200.
  Those of one owner may be a tenth of them, and at least 10.
- `SERVICE_REDIRECT_DOWNLOADS`: whether callers are redirected to the bucket, by a URL that is valid
  for SERVICE_URL_TTL_S, instead of getting its files through the service; by default false.
- `SERVICE_HEARTBEAT_S`: after how many seconds without events a stream sends a comment to stay
  open, by default 15.
- `SERVICE_CATALOG_KEPT_S`: for how many seconds the catalog of what workers offer is cached, by
  default 1.
- `LOG_FORMAT`: `text`, the default, or `json`: one object per line.
- `REDIS_URL`: the Redis or Valkey that holds jobs and queues, by default redis://127.0.0.1:6379/0;
  `jobs/redis_client/address.py` has the forms, with TLS and with sentinels.
- `REDIS_WAIT_REPLICAS`: how many replicas of Redis must have a new job before it is answered, by
  default 0.
- `REDIS_WAIT_AOF`: whether it must be in Redis' append-only file on disk, by default false.
- `REDIS_WAIT_MS`: how many milliseconds to wait for each, by default 1000; after that the answer is
  503 with the job's id.
- `ARTIFACTS_URL`: where finished videos are, the same for service and workers: `file:///folder`, or
  `s3://bucket/prefix?endpoint=https://host:port&region=name` with credentials in AWS_ACCESS_KEY_ID
  and AWS_SECRET_ACCESS_KEY. Required.
- `OTEL_TRACES_EXPORTER`, `OTEL_EXPORTER_OTLP_ENDPOINT` and other settings of traces: see
  `jobs/telemetry/settings.py`.

An empty variable counts as absent, as it does for the worker.
"""

import ipaddress
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.redis_client import parse_address
from jobs.redis_keys import RECORD_TTL_S
from jobs.store.durability import LONGEST_WAIT_MS, Durability
from jobs.telemetry.logs import LogFormat
from jobs.telemetry.settings import TracingSettings
from service.auth.key_memory import KeyMemory, KeyPolicy
from service.auth.rate_limit import check_rate
from service.schemas.expiry import RetentionPeriods
from service.webhooks.settings import WebhookSettings

_USUAL_PORTS = {"http": 80, "https": 443}

Hours = Annotated[float, Field(gt=0, le=RECORD_TTL_S / 3600, allow_inf_nan=False)]


class RedisSettings(BaseSettings):
    """The settings of every command that uses Redis; managing keys needs no others."""

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, populate_by_name=True, hide_input_in_errors=True
    )

    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), validation_alias="REDIS_URL"
    )

    @field_validator("redis_url")
    @classmethod
    def _is_redis_address(cls, url: SecretStr) -> SecretStr:
        parse_address(url.get_secret_value())  # its errors repeat no part of the value
        return url


class ServiceSettings(WebhookSettings, RedisSettings, TracingSettings):
    """All settings. Fields have the code's names; aliases are the environment variables."""

    host: str = Field(default="127.0.0.1", validation_alias="SERVICE_HOST")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, validation_alias="SERVICE_PORT"
    )
    public_url: str | None = Field(default=None, validation_alias="SERVICE_PUBLIC_URL")
    keys: KeyPolicy = Field(default=KeyPolicy.AUTO, validation_alias="SERVICE_KEYS")
    state_dir: Path | None = Field(default=None, validation_alias="SERVICE_STATE_DIR")
    xdg_state_home: Path | None = Field(default=None, validation_alias="XDG_STATE_HOME")
    allowed_origins: str = Field(default="", validation_alias="SERVICE_ALLOWED_ORIGINS")
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
    max_connections: Annotated[int, Field(ge=1)] = Field(
        default=4000, validation_alias="SERVICE_MAX_CONNECTIONS"
    )
    keep_alive_s: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=65, validation_alias="SERVICE_KEEP_ALIVE_S"
    )
    max_downloads: Annotated[int, Field(ge=1)] = Field(
        default=200, validation_alias="SERVICE_MAX_DOWNLOADS"
    )
    redirect_downloads: bool = Field(default=False, validation_alias="SERVICE_REDIRECT_DOWNLOADS")
    heartbeat_s: Annotated[float, Field(gt=0, le=300)] = Field(
        default=15, validation_alias="SERVICE_HEARTBEAT_S"
    )
    catalog_kept_s: Annotated[float, Field(ge=0, le=10)] = Field(
        default=1, validation_alias="SERVICE_CATALOG_KEPT_S"
    )
    wait_replicas: Annotated[int, Field(ge=0, le=10)] = Field(
        default=0, validation_alias="REDIS_WAIT_REPLICAS"
    )
    wait_aof: bool = Field(default=False, validation_alias="REDIS_WAIT_AOF")
    wait_ms: Annotated[int, Field(ge=1, le=LONGEST_WAIT_MS)] = Field(
        default=1000, validation_alias="REDIS_WAIT_MS"
    )
    artifacts_url: str = Field(validation_alias="ARTIFACTS_URL")
    log_format: LogFormat = Field(default=LogFormat.TEXT, validation_alias="LOG_FORMAT")

    @property
    def retention_periods(self) -> RetentionPeriods:
        """The three retention times as durations."""
        return RetentionPeriods(
            videos=timedelta(hours=self.keep_videos_h),
            jobs=timedelta(hours=self.keep_jobs_h),
            orphans=timedelta(hours=self.keep_orphans_h),
        )

    @property
    def durability(self) -> Durability:
        """What a new job has to reach before it is answered."""
        return Durability(self.wait_replicas, self.wait_aof, self.wait_ms)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)

    @property
    def redirect_s(self) -> int | None:
        """How long the bucket's URLs are valid to which downloads are redirected; None for none."""
        return self.url_ttl_s if self.redirect_downloads else None

    @property
    def may_be_open(self) -> bool:
        """Whether the service is open to callers without a key while there are no keys."""
        if not self.is_local or self.keys is KeyPolicy.REQUIRED:
            return False
        # A public URL means that a proxy passes on what others send.
        is_public = self.public_url is not None and not is_loopback(
            urlsplit(self.public_url).hostname or ""
        )
        return self.keys is KeyPolicy.OPEN or not is_public

    @property
    def key_memory(self) -> KeyMemory | None:
        """Where it is remembered that there were keys; None if `open` says not to."""
        if self.keys is KeyPolicy.OPEN:
            return None
        home = self.xdg_state_home or Path("~/.local/state")
        try:
            folder = (self.state_dir or home / "wan-hif8").expanduser()
        except RuntimeError:  # this user has no home
            folder = Path("/var/lib/wan-hif8")
        return KeyMemory(folder, self.artifacts_url)

    @property
    def known_names(self) -> frozenset[str]:
        """Host names that requests may use for the service, besides those of loopback."""
        return frozenset({urlsplit(self.public_url).hostname or ""} if self.public_url else ())

    @property
    def origins(self) -> frozenset[str]:
        """The origins in `allowed_origins`."""
        return frozenset(_split(self.allowed_origins))

    @property
    def public_path(self) -> str:
        """The prefix of callers' paths, if a proxy removes one; mostly empty."""
        return urlsplit(self.public_url or "").path

    @field_validator("public_url")
    @classmethod
    def _is_web_address(cls, url: str | None) -> str | None:
        if not url:
            return None
        if not _is_web_address(url):
            raise ValueError(f"{url} is not a web address; write it as https://host or with a path")
        return url.rstrip("/")

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: str) -> str:
        for origin in _split(origins):
            if "*" in origin:
                raise ValueError(
                    f"{origin} would let the pages of every site call this service; name each "
                    f"origin, like https://app.example"
                )
            if not _is_web_address(origin) or origin_of(origin) != origin:
                raise ValueError(
                    f"{origin} is not an origin as browsers send it; write it like "
                    f"https://app.example, with a port only if it is not the scheme's own"
                )
        return origins

    @model_validator(mode="after")
    def _is_open_on_loopback_only(self) -> Self:
        if self.keys is KeyPolicy.OPEN and not self.is_local:
            raise ValueError(
                f"SERVICE_KEYS: it is open, and SERVICE_HOST is {self.host}, which others reach; "
                f"take required or auto, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _redirects_have_a_bucket(self) -> Self:
        if self.redirect_downloads and not self.artifacts_url.startswith("s3://"):
            raise ValueError(
                "SERVICE_REDIRECT_DOWNLOADS: it is true, and ARTIFACTS_URL is no bucket to "
                "redirect to; leave it out, or keep videos in s3://bucket"
            )
        return self

    @model_validator(mode="after")
    def _webhooks_have_public_url(self) -> Self:
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
        has_port = parts.port != 0  # raises ValueError if it is not a port
    except ValueError:
        return False
    is_bare = not (parts.query or parts.fragment or "?" in url or "#" in url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and is_bare


def _split(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


def origin_of(url: str) -> str:
    """Return the origin of a web address as browsers send it: in lower case, no usual port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host
    usual = parts.port in (None, _USUAL_PORTS.get(parts.scheme))
    return f"{parts.scheme}://{name}" + ("" if usual else f":{parts.port}")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, without resolving names."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
