"""Define the JSON of signing in."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from service.auth.api_keys import Role
from service.auth.gate import LOCAL, Principal


class SignInBody(BaseModel):
    """A key to sign in with."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(description="An API key, `wan_...`.")


class SessionView(BaseModel):
    """Who the caller is."""

    name: str = Field(description="The owner of the caller's jobs.", examples=["alice"])
    role: Role
    open: bool = Field(
        description="Whether the service is open: everybody is `local` then, and need not sign in."
    )

    @classmethod
    def of(cls, principal: Principal) -> Self:
        """Build the view of a caller."""
        return cls(name=principal.name, role=principal.role, open=principal is LOCAL)
