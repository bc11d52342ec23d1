"""Define the JSON of API keys, and read the bodies that make and change them."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from jobs.errors import InvalidSpec
from jobs.spec import Whole
from jobs.violations import from_pydantic
from service.auth.api_keys import NAME_BOUND, ApiKey, Role
from service.auth.key_terms import EXPIRY_BOUND, SPAN_BOUND, parse_expiry
from service.auth.rate_limit import RATE_BOUND

_BOUNDS: Final = {
    "name": NAME_BOUND,
    "owner": NAME_BOUND,
    "role": f"one of {', '.join(Role)}",
    "quota": "a whole number from 1, or null for the service's default",
    "rate": f"{RATE_BOUND}, or null for the service's default",
    "expires": EXPIRY_BOUND,
    "grace": SPAN_BOUND,
}

_Body = TypeVar("_Body", bound=BaseModel)


def _expiry(value: object) -> datetime | None:
    """Parse an expiry; what is no text is no expiry either."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("no text")
    try:
        return parse_expiry(value)
    except InvalidSpec as error:
        raise ValueError(str(error)) from None


Expiry = Annotated[
    datetime | None,
    BeforeValidator(_expiry),
    WithJsonSchema({"type": ["string", "null"], "examples": ["30d", "2027-01-31", "never"]}),
]


class _Terms(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    quota: Whole | None = Field(
        default=None,
        description="Most jobs waiting and running; null for the service's default.",
        json_schema_extra={"minimum": 1},
    )
    rate: str | None = Field(
        default=None,
        description='Like "100/minute"; null for the service\'s default.',
    )
    expires: Expiry = Field(
        default=None, description=f"When it stops working: {EXPIRY_BOUND}; null for never."
    )


class KeyBody(_Terms):
    """An API key to make."""

    name: str = Field(description=f"Given once: {NAME_BOUND}.", examples=["alice"])
    role: Role = Role.USER
    owner: str | None = Field(
        default=None, description="To whom its jobs belong, and whose it sees; by default its name."
    )


class KeyChangesBody(_Terms):
    """What to change of an API key; what is left out stays."""

    role: Role = Role.USER


class RotateBody(BaseModel):
    """How to replace the secret of an API key."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    grace: str = Field(
        default="0m", description=f"How long the old secret stays valid: {SPAN_BOUND}."
    )


def read_body(kind: type[_Body], raw: Any) -> _Body:
    """Read a body. Raises InvalidSpec with every field that has another type."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        bounds = {name: _BOUNDS[name] for name in kind.model_fields}
        raise InvalidSpec([from_pydantic(each, bounds, {}) for each in error.errors()]) from None


def changed_terms(body: KeyChangesBody) -> Mapping[str, Any]:
    """Return the terms that a body changes, by their names in `KeyStore.change`."""
    given = {name: getattr(body, name) for name in body.model_fields_set}
    if not given:
        names = ", ".join(KeyChangesBody.model_fields)
        raise InvalidSpec.of(
            "body", None, f"one of {names}", f"The body changes nothing; give one of {names}."
        )
    return {"expires_at" if name == "expires" else name: value for name, value in given.items()}


class KeyView(BaseModel):
    """An API key, without its secret."""

    id: str
    name: str
    owner: str = Field(description="To whom its jobs belong, and whose it sees.")
    role: Role
    state: Literal["usable", "expired", "revoked"]
    own: bool = Field(description="Whether the request was sent with it.")
    quota: int | None = Field(description="Null for the service's default.")
    rate: str | None = Field(description="Null for the service's default.")
    created_at: datetime
    last_used_at: datetime | None = Field(description="Accurate to about a minute.")
    expires_at: datetime | None
    revoked_at: datetime | None
    old_secret_until: datetime | None = Field(
        description="Until when the secret before the last rotation is valid, if it is."
    )

    @classmethod
    def of(cls, key: ApiKey, caller: str, last_used_at: datetime | None, /, **more: Any) -> Self:
        """Build the view of a key; `caller` is the id of the key that asks."""
        state = "revoked" if key.revoked_at else "expired" if key.has_expired else "usable"
        until = key.old_secret_until if key.has_old_secret else None
        shown = key.model_dump(include=_SHOWN) | {"old_secret_until": until} | more
        return cls(
            owner=key.owner_name,
            state=state,
            own=key.id == caller,
            last_used_at=last_used_at,
            **shown,
        )


_SHOWN: Final = {"id", "name", "role", "quota", "rate", "created_at", "expires_at", "revoked_at"}


class MadeKeyView(KeyView):
    """An API key with a new secret."""

    key: str = Field(
        description="The key to send, shown only this once.", examples=["wan_0123456789ab_..."]
    )


class KeyListView(BaseModel):
    """All keys, oldest first, the revoked ones too."""

    keys: Sequence[KeyView]
    roles: Sequence[Role] = Field(description="The roles that a key can have.")
    default_quota: int = Field(description="The quota of keys of the role user without their own.")
    default_rate: str = Field(description="The rate of keys without their own.")
