"""Check Redis and the artifact store, as a start of the worker uses them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

from pydantic import ValidationError
from redis import Redis

from jobs.store.durability import read_risks
from worker.doctor.report import Fault, Finding, without_secrets
from worker.settings import WorkerSettings
from worker.startup import open_redis, open_store


def settings() -> Finding:
    """Read the settings from the environment."""
    try:
        found = WorkerSettings()
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise Fault(
            f"the environment is not set up: {'; '.join(problems)}",
            "set the variables that docs/operations.md lists under Environment",
        ) from None
    return Finding(f"device {found.device}, configuration {found.config}", value=found)


def settings_without_store() -> WorkerSettings:
    """Return what the other checks go by if the environment is not set up."""
    try:
        return WorkerSettings(artifacts_url="")
    except ValidationError:
        return WorkerSettings.model_construct(artifacts_url="")


def redis(url: str, opened: ExitStack) -> Callable[[], Finding]:
    """Build the check of Redis; its connection stays open until `opened` ends."""

    def look() -> Finding:
        connection = opened.enter_context(open_redis(url))
        info = cast("dict[str, Any]", connection.info("server"))
        name = info.get("server_name", "redis")
        version = info.get(f"{name}_version", info.get("redis_version"))
        risks = " ".join(risk.detail for risk in read_risks(connection))
        return Finding(
            f"{name} {version} answers at {without_secrets(url)}", risks or None, value=connection
        )

    return look


def artifacts(url: str, connection: Redis | None) -> Callable[[], Finding]:
    """Build the check that the store is there, is the one this Redis knows, and can be written."""

    def look() -> Finding:
        assert connection is not None, "the report skips this check without Redis"
        open_store(url, connection)
        return Finding(f"{without_secrets(url)} can be written and belongs to this Redis")

    return look
