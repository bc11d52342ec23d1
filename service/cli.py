"""Run the service, manage its API keys, and run retention, from the command line.

Here keys are managed with access to Redis: anybody who can write to Redis can do everything anyway,
and a service without keys has no caller who may request one. Callers of the role ops manage them
over HTTP, too (`service/api/routes/keys.py`).
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated

import typer
from pydantic import ValidationError
from redis.exceptions import RedisError

from jobs.artifacts.known_store import KnownArtifactStore, open_known_artifacts
from jobs.errors import (
    ArtifactRefused,
    ArtifactsUnavailable,
    InvalidSpec,
    KeyConflict,
    KeyNotFound,
)
from jobs.redis_client import connect
from service.auth.api_keys import ApiKey, KeyStore, Role
from service.auth.key_terms import parse_expiry, parse_quota, parse_rate, parse_span
from service.maintenance.retention import Retention, RetentionBusy, describe
from service.maintenance.retention_clock import ClockRefused
from service.settings import RedisSettings, ServiceSettings

app = typer.Typer(
    help="Run the service, configured by the environment, or do one of the commands.",
    add_completion=False,
    # typer's tracebacks show local variables, which may hold a password.
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(
    help="API keys, in the Redis at REDIS_URL.", no_args_is_help=True, add_completion=False
)
app.add_typer(keys_app, name="keys")
store_app = typer.Typer(
    help="The artifact store at ARTIFACTS_URL.", no_args_is_help=True, add_completion=False
)
app.add_typer(store_app, name="store")

ExpiryOption = Annotated[
    str | None,
    typer.Option(help="When it stops working: never, 2027-01-31 or a time (UTC), 30d, 12h."),
]
NameOrId = Annotated[str, typer.Argument(metavar="NAME-or-id")]

_REFUSALS = (InvalidSpec, KeyConflict, KeyNotFound, ArtifactRefused, ArtifactsUnavailable)
_COLUMNS = ("name", "owner", "id", "role", "created", "last used", "quota", "rate", "state")


@app.callback(invoke_without_command=True)
def run(context: typer.Context) -> None:
    """Run the service if no command is given."""
    if context.invoked_subcommand is None:
        from service.server import start  # noqa: PLC0415  # no other command needs FastAPI

        start()


@app.command("retention")
def run_retention() -> None:
    """Delete now what is past its time; the service itself does it about once an hour."""
    with _one_line_for_errors():
        settings = ServiceSettings()
        with connect(settings.redis_url.get_secret_value()) as redis:
            artifacts = open_known_artifacts(settings.artifacts_url, redis)
            deleted = Retention(redis, artifacts, settings.retention_periods).run(threading.Event())
    print(f"Deleted {describe(deleted)}.")


@store_app.command()
def show() -> None:
    """Say whether the store is the one that Redis knows, and how many of its videos are there."""
    with _artifacts() as artifacts:
        artifacts.verify()
        found, number = artifacts.latest_videos()
    print(f"The store is the right one; {found} of the {number} latest videos are there.")


@store_app.command()
def adopt() -> None:
    """Make the store the one that Redis knows, after it was moved or restored on purpose."""
    with _artifacts() as artifacts:
        known = artifacts.adopt()
        found, number = artifacts.latest_videos()
    print(f"Redis knows the store {known} now; {found} of the {number} latest videos are there.")


@keys_app.command()
def add(
    name: Annotated[str, typer.Argument(help="The key's name, given once.")],
    role: Annotated[
        Role, typer.Option(help="ops see all jobs, and their own go first.")
    ] = Role.USER,
    quota: Annotated[
        int | None, typer.Option(help="Most jobs waiting and running [default: SERVICE_QUOTA].")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help='Like "100/minute" [default: SERVICE_RATE].')
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option(help="To whom its jobs belong, and whose jobs it sees [default: NAME]."),
    ] = None,
    expires: ExpiryOption = None,
) -> None:
    """Make a key and print it alone on stdout; it cannot be shown again."""
    with _key_store() as store:
        expires_at = None if expires is None else parse_expiry(expires)
        made, token = store.add(name, role, quota, rate, owner=owner, expires_at=expires_at)
    _show(made, token)


@keys_app.command("list")
def list_keys() -> None:
    """List all keys, the revoked ones too."""
    with _key_store() as store:
        found, used = store.all(), store.last_uses()
    rows = [_COLUMNS, *(_row(key, used.get(key.id)) for key in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


@keys_app.command()
def change(
    key: NameOrId,
    role: Annotated[Role | None, typer.Option(help="Another role.")] = None,
    quota: Annotated[
        str | None, typer.Option(help="Another quota; default for SERVICE_QUOTA.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Another rate; default for SERVICE_RATE.")
    ] = None,
    expires: ExpiryOption = None,
) -> None:
    """Change what a key may do, or when it expires; known to the service within two seconds."""
    given = {
        "role": (role, Role),
        "quota": (quota, parse_quota),
        "rate": (rate, parse_rate),
        "expires_at": (expires, parse_expiry),
    }
    with _key_store() as store:
        terms = {name: parse(text) for name, (text, parse) in given.items() if text is not None}
        if not terms:
            sys.exit("service: nothing is to change; give --role, --quota, --rate or --expires.")
        changed = store.change(key, **terms)
    print(f"The key of {changed.name} (id {changed.id}) is changed; it is {_state(changed)}.")


@keys_app.command()
def rotate(
    key: NameOrId,
    grace: Annotated[
        str, typer.Option(help="How long the old secret stays valid: 24h, 7d; 30 days at most.")
    ] = "0m",
) -> None:
    """Give a key another secret, shown once; the old one is refused within two seconds."""
    with _key_store() as store:
        rotated, token = store.rotate(key, parse_span(grace))
    _show(rotated, token)


@keys_app.command()
def revoke(key: NameOrId) -> None:
    """Revoke a key for ever; the service refuses it within two seconds."""
    with _key_store() as store:
        revoked = store.revoke(key)
    print(f"The key of {revoked.name} (id {revoked.id}) is revoked.")


@contextmanager
def _key_store() -> Iterator[KeyStore]:
    """Open the key store; errors end the command with one line."""
    with (
        _one_line_for_errors(),
        connect(RedisSettings().redis_url.get_secret_value()) as redis,
    ):
        yield KeyStore(redis)


@contextmanager
def _artifacts() -> Iterator[KnownArtifactStore]:
    """Open the artifact store of the environment; errors end the command with one line."""
    with _one_line_for_errors():
        settings = ServiceSettings()
        with connect(settings.redis_url.get_secret_value()) as redis:
            yield open_known_artifacts(settings.artifacts_url, redis)


@contextmanager
def _one_line_for_errors() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        from service.server import describe_errors  # noqa: PLC0415

        sys.exit(describe_errors(error))
    except _REFUSALS as error:
        sys.exit(f"service: {error}")
    except ClockRefused as error:
        sys.exit(f"service: nothing is deleted: {error}.")
    except RetentionBusy:
        sys.exit("service: a service process is deleting at this moment; nothing is left to do.")
    except RedisError as error:
        sys.exit(f"service: Redis at REDIS_URL cannot be reached or refuses to work: {error}")


def _show(key: ApiKey, token: str) -> None:
    print(token)
    print(
        f"This is the only time the key of {key.name} ({key.role}, id {key.id}) is shown.",
        file=sys.stderr,
    )


def _row(key: ApiKey, used_at: datetime | None) -> tuple[str, ...]:
    return (
        *(key.name, key.owner_name, key.id, key.role, _minute(key.created_at)),
        "never" if used_at is None else _minute(used_at),
        "-" if key.quota is None else str(key.quota),
        key.rate or "-",
        _state(key),
    )


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return f"revoked {_minute(key.revoked_at)}"
    if key.has_expired:
        return f"expired {_minute(key.expires_at)}"
    until = "" if key.expires_at is None else f" until {_minute(key.expires_at)}"
    old = f", old secret until {_minute(key.old_secret_until)}" if key.has_old_secret else ""
    return f"usable{until}{old}"


def _minute(time: datetime | None) -> str:
    assert time is not None, "asked for only where there is one"
    return f"{time:%Y-%m-%d %H:%M}Z"
