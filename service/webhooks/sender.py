"""One call of a webhook: to an address that was checked, within a bounded time."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import httpx

from service.webhooks.ip_rules import AddressRefused, Resolve, check_address, resolve
from service.webhooks.url_rules import Target, is_literal

logger = logging.getLogger(__name__)

MOST_READ_BYTES: Final = 64 * 1024
"""An answer's body means nothing; this much is read of it, for the receiver to be content."""


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds for a connection, and for everything up to the head of the answer."""

    connect_s: float = 5.0
    total_s: float = 10.0
    rest_s: float = 1.0  # for the answer's body


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to: a `status`, or else the `error` that stands for none."""

    status: int | None = None
    error: str | None = None
    retry_after: str | None = None


def tls_context() -> ssl.SSLContext:
    """Trust Mozilla's list, and besides what this machine or SSL_CERT_FILE has, as of a company."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


class Sender:
    """Sends to one target at a time; any number of calls may be under way."""

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        private: bool = False,
        limits: TimeLimits | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        self._context = context
        self._private = private
        self._limits = limits or TimeLimits()
        self._resolve = resolve

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send `body` to the target, and say what it came to; faults are answers, too."""
        try:
            async with self._client() as client:
                try:
                    async with asyncio.timeout(self._limits.total_s):
                        response = await self._connect(client, target, headers, body)
                except TimeoutError:
                    return Answer(error=f"no answer within {self._limits.total_s:g} s")
                await self._read_rest(response)
        except AddressRefused as error:
            # The address is the business of whoever runs the network, not of the caller.
            logger.warning("webhook host %s is not called: %s", target.host, error)
            return Answer(error="the host has an address which may not be called")
        except (OSError, UnicodeError):  # the latter for what no resolver can be asked
            return Answer(error="the host's name cannot be resolved")
        except httpx.HTTPError as error:
            return Answer(error=self._sentence(error))
        return Answer(response.status_code, retry_after=response.headers.get("retry-after"))

    def _client(self) -> httpx.AsyncClient:
        """A client for one call. Connections are not shared: one that was verified for a host must
        not serve another host at the same address."""
        return httpx.AsyncClient(
            verify=self._context,
            timeout=httpx.Timeout(self._limits.total_s, connect=self._limits.connect_s),
            follow_redirects=False,
            trust_env=False,
        )

    async def _connect(
        self, client: httpx.AsyncClient, target: Target, headers: Mapping[str, str], body: bytes
    ) -> httpx.Response:
        """Try the host's addresses in turn until one takes a connection."""
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
                # The certificate has to be the host's; an IP address is one by itself.
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
                # Raw: nothing is unpacked.
                async for chunk in response.aiter_raw():
                    read += len(chunk)
                    if read >= MOST_READ_BYTES:
                        break
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(self._limits.rest_s):
                await response.aclose()

    def _sentence(self, error: httpx.HTTPError) -> str:
        """Say what went wrong, for the job's owner: no addresses and no peer's text."""
        if isinstance(error, httpx.ConnectTimeout):
            return f"no connection within {self._limits.connect_s:g} s"
        if isinstance(error, httpx.TimeoutException):
            return f"no answer within {self._limits.total_s:g} s"
        if isinstance(error, httpx.ConnectError):
            fault = _tls_fault(error)
            return "no connection" if fault is None else f"no trusted connection: {fault}"
        return "the connection broke before there was an answer"


def _tls_fault(error: BaseException) -> str | None:
    """Find what TLS had to complain about among the causes of an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError):
            return cause.reason or "TLS failed"
        cause = cause.__cause__ or cause.__context__
    return None
