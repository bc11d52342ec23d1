"""Call a webhook once, at an IP address that was checked, within a bounded time."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import httpx

from service.webhooks.url_rules import (
    AddressRefused,
    Resolve,
    Target,
    check_address,
    is_literal,
    resolve,
)

logger = logging.getLogger(__name__)

MAX_READ_BYTES: Final = 64 * 1024
"""The most that is read of an answer's body, and thrown away. It is read only so that receivers can
finish their answer."""


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Time limits of one call.

    Attributes:
        connect_s: seconds for a connection.
        total_s: seconds for everything up to the answer's headers.
        rest_s: seconds for the answer's body, and as many for closing it.
    """

    connect_s: float = 5.0
    total_s: float = 10.0
    rest_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a call: a `status`, or else the `error` that says why there is none."""

    status: int | None = None
    error: str | None = None
    retry_after: str | None = None


def tls_context() -> ssl.SSLContext:
    """Make a TLS context that trusts Mozilla's list and the authorities of this machine.

    Those of this machine, or of SSL_CERT_FILE if it is set, may be a company's own.
    """
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


class Sender:
    """Sends requests to checked addresses; any number of calls may be under way."""

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        private: bool = False,
        limits: TimeLimits | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        """Create a sender.

        Args:
            private: whether hosts may have addresses of internal networks.
        """
        self._context = context
        self._private = private
        self._limits = limits or TimeLimits()
        self._resolve = resolve

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send `body` to the target and return the result; errors of the call are results, too."""
        try:
            async with self._client() as client:
                try:
                    async with asyncio.timeout(self._limits.total_s):
                        response = await self._connect(client, target, headers, body)
                except TimeoutError:
                    return Answer(error=f"no answer within {self._limits.total_s:g} s")
                await self._read_rest(response)
        except AddressRefused as error:
            # The log names the address, for the operators; the job's owner must not learn it.
            logger.warning("webhook host %s is not called: %s", target.host, error)
            return Answer(error="the host has an address which may not be called")
        except (OSError, UnicodeError):  # the latter for names that cannot be encoded for DNS
            return Answer(error="the host's name cannot be resolved")
        except httpx.HTTPError as error:
            return Answer(error=self._describe(error))
        return Answer(response.status_code, retry_after=response.headers.get("retry-after"))

    def _client(self) -> httpx.AsyncClient:
        """Make a client for one call.

        Connections are not shared between calls: one that was verified for a host must not serve
        another host at the same address.
        """
        return httpx.AsyncClient(
            verify=self._context,
            timeout=httpx.Timeout(self._limits.total_s, connect=self._limits.connect_s),
            follow_redirects=False,
            trust_env=False,
        )

    async def _connect(
        self, client: httpx.AsyncClient, target: Target, headers: Mapping[str, str], body: bytes
    ) -> httpx.Response:
        """Try the host's addresses in turn until one accepts a connection."""
        addresses = await self._resolve(target.host, target.port)
        for address in addresses:
            check_address(address, private=self._private)
        for position, address in enumerate(addresses, 1):
            request = client.build_request(
                "POST",
                httpx.URL(
                    scheme=target.scheme,
                    host=address,
                    port=target.port,
                    raw_path=target.path.encode(),
                ),
                content=body,
                headers={"accept-encoding": "identity", **headers, "host": target.authority},
                # The URL names the IP address, but the certificate has to be the host's. Where the
                # host is an IP address, the URL already names it.
                extensions={} if is_literal(target.host) else {"sni_hostname": target.host},
            )
            try:
                return await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if position == len(addresses):
                    raise
        raise OSError("a name without addresses")

    async def _read_rest(self, response: httpx.Response) -> None:
        read = 0
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(self._limits.rest_s):
                # Raw: nothing is decompressed.
                async for chunk in response.aiter_raw():
                    read += len(chunk)
                    if read >= MAX_READ_BYTES:
                        break
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(self._limits.rest_s):
                await response.aclose()

    def _describe(self, error: httpx.HTTPError) -> str:
        """Describe an error for the job's owner, without IP addresses and the peer's text."""
        if isinstance(error, httpx.ConnectTimeout):
            return f"no connection within {self._limits.connect_s:g} s"
        if isinstance(error, httpx.TimeoutException):
            return f"no answer within {self._limits.total_s:g} s"
        if isinstance(error, httpx.ConnectError):
            fault = _tls_fault(error)
            return "no connection" if fault is None else f"no trusted connection: {fault}"
        return "the connection broke before there was an answer"


def _tls_fault(error: BaseException) -> str | None:
    """Find the TLS error among the causes of an error, and return its reason."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError):
            return cause.reason or "TLS failed"
        cause = cause.__cause__ or cause.__context__
    return None
