"""Read the settings of webhooks from the environment; part of `service.settings`.

- `SERVICE_WEBHOOK_HOSTS`: the hosts that may be called, by default none. Names separated by commas;
  `*.example.com` means every subdomain of example.com, and `hooks.example.com:8443` a port other
  than the scheme's own.
- `SERVICE_WEBHOOK_SECRET`: the secret that signs the calls, `whsec_...`; required if there are
  hosts. Each call is signed with all of several, separated by commas, so that a secret can be
  changed.
- `SERVICE_WEBHOOK_PRIVATE=1`: allows hosts with addresses of internal networks and of this machine,
  and hosts that are IP addresses.
- `SERVICE_WEBHOOK_HTTP=1`: accepts http:// URLs, too.
"""

import base64
import binascii
import re
from typing import Final

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings

from service.webhooks.url_rules import HostRule, WebhookRules, is_literal

SECRET_PREFIX: Final = "whsec_"
SECRET_BYTES: Final = range(24, 65)
"""How many bytes a secret may have, by the Standard Webhooks specification."""
HOW_TO_MAKE_ONE: Final = "make one with `echo whsec_$(openssl rand -base64 32)`"


class WebhookSettings(BaseSettings):
    """Settings of webhooks. Fields have the code's names; aliases are the environment variables."""

    # Before `webhook_hosts`, whose check needs them: fields are checked in this order.
    webhook_secret: SecretStr = Field(
        default=SecretStr(""), validation_alias="SERVICE_WEBHOOK_SECRET"
    )
    webhook_private: bool = Field(default=False, validation_alias="SERVICE_WEBHOOK_PRIVATE")
    webhook_http: bool = Field(default=False, validation_alias="SERVICE_WEBHOOK_HTTP")
    webhook_hosts: str = Field(default="", validation_alias="SERVICE_WEBHOOK_HOSTS")

    @property
    def webhook_rules(self) -> WebhookRules:
        """The rules that the settings describe."""
        hosts = tuple(map(HostRule.parse, _split(self.webhook_hosts)))
        return WebhookRules(hosts, http=self.webhook_http, private=self.webhook_private)

    @property
    def webhook_secrets(self) -> tuple[str, ...]:
        """The secrets to sign with, in their order."""
        return tuple(_split(self.webhook_secret.get_secret_value()))

    @field_validator("webhook_hosts")
    @classmethod
    def _are_hosts(cls, hosts: str, info: ValidationInfo) -> str:
        secret = info.data.get("webhook_secret")  # absent if it was refused
        if hosts and secret is not None and not secret.get_secret_value():
            raise ValueError(
                f"SERVICE_WEBHOOK_SECRET is missing, by which receivers tell these calls from "
                f"others; {HOW_TO_MAKE_ONE}"
            )
        for entry in _split(hosts):
            rule = HostRule.parse(entry)
            if is_literal(rule.host) and not info.data.get("webhook_private"):
                raise ValueError(
                    f"{entry} is an IP address; name the host instead, or set "
                    f"SERVICE_WEBHOOK_PRIVATE=1 if it is in a network of your own"
                )
        return hosts

    @field_validator("webhook_secret")
    @classmethod
    def _are_secrets(cls, secret: SecretStr) -> SecretStr:
        text = secret.get_secret_value()
        # A value that is not empty has to hold a secret: with a lone comma nothing would be signed.
        for each in _split(text) or [text]:
            if text and not _is_secret(each):
                raise ValueError(
                    f"it is not {SECRET_PREFIX} and the base64 of {SECRET_BYTES[0]} to "
                    f"{SECRET_BYTES[-1]} random bytes; {HOW_TO_MAKE_ONE}"
                )
        return secret


def _split(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


def _is_secret(text: str) -> bool:
    if not text.startswith(SECRET_PREFIX):
        return False
    try:
        secret = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        return False
    return len(secret) in SECRET_BYTES
