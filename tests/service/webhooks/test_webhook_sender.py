"""Test calls over real sockets: where they go, how long they take, which certificates they need."""

import asyncio
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from benchmarks.fixtures.certificates import Authority
from service.webhooks.sender import Answer, Sender, TimeLimits, tls_context
from service.webhooks.url_rules import HostRule, Resolve, Target, WebhookRules
from tests.conftest import free_port
from tests.support.webhook_receiver import Receiver, hold, status

NAME = "hooks.example.com"
QUICK = TimeLimits(connect_s=1, total_s=1, rest_s=0.5)


def names(*answers: Sequence[str]) -> tuple[Resolve, list[str]]:
    """A resolver that returns one answer after the other, and the list of names it resolved."""
    asked: list[str] = []

    async def resolve(host: str, _: int) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolve, asked


def post(sender: Sender, url: str, body: bytes = b"{}") -> Answer:
    host = HostRule.parse(url.partition("//")[2].partition("/")[0])
    target: Target = WebhookRules((host,), http=True).target(url)
    return asyncio.run(sender.post(target, {"webhook-id": "msg_1"}, body))


def sender(resolve: Resolve, *, private: bool = True, limits: TimeLimits = QUICK) -> Sender:
    return Sender(tls_context(), private=private, limits=limits, resolve=resolve)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as receiver:
        yield receiver


def test_the_call_arrives_as_it_was_sent(receiver: Receiver) -> None:
    resolve, asked = names(["127.0.0.1"])
    answer = post(sender(resolve), f"http://{NAME}:{receiver.port}/a/b%20c?d=e", b'{"f": 1}')
    assert answer == Answer(204)
    (call,) = receiver.calls
    headers = {name.lower(): value for name, value in call.headers.items()}
    assert call.path == "/a/b%20c?d=e"
    assert call.body == b'{"f": 1}'
    assert headers["host"] == f"{NAME}:{receiver.port}"
    assert headers["webhook-id"] == "msg_1"
    assert asked == [NAME]


def test_an_ip_address_is_called_as_it_is(receiver: Receiver) -> None:
    assert post(Sender(tls_context(), private=True), f"http://127.0.0.1:{receiver.port}/").status


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"]]
)
def test_a_name_that_leads_inside_is_not_called(
    receiver: Receiver, addresses: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    resolve, _ = names(addresses)
    answer = post(sender(resolve, private=False), f"http://{NAME}:{receiver.port}/")
    assert answer.status is None
    assert answer.error == "the host has an address which may not be called"
    assert receiver.calls == []
    # The IP address is logged for the operators, but not shown to the caller.
    assert "127.0.0.1" in caplog.text


def test_the_connection_goes_to_the_address_that_was_checked(receiver: Receiver) -> None:
    other = Receiver()
    with other.listening("127.0.0.3", receiver.port):
        resolve, asked = names(["127.0.0.1"], ["127.0.0.3"])
        assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").status == 204
        assert asked == [NAME]
        assert other.calls == []
        assert len(receiver.calls) == 1
        # The second receiver works: the next call resolves the name again, and goes there.
        assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").status == 204
        assert (len(receiver.calls), len(other.calls)) == (1, 1)


def test_proxies_of_the_environment_are_not_used(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Receiver()
    with proxy.listening():
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        resolve, _ = names(["127.0.0.1"])
        assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").status == 204
    assert proxy.calls == []


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    other = Receiver()
    with other.listening():
        receiver.answer = status(307, Location=f"http://127.0.0.1:{other.port}/")
        resolve, _ = names(["127.0.0.1"])
        assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").status == 307
    assert other.calls == []


def test_the_next_address_is_tried_where_nobody_listens(receiver: Receiver) -> None:
    resolve, _ = names(["127.0.0.2", "127.0.0.1"])
    assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").status == 204


def test_nobody_listens() -> None:
    resolve, _ = names(["127.0.0.1", "127.0.0.2"])
    assert post(sender(resolve), f"http://{NAME}:{free_port()}/") == Answer(error="no connection")


def test_a_name_nobody_knows() -> None:
    # Reserved never to be given away (RFC 2606).
    answer = post(Sender(tls_context(), limits=QUICK), "http://nobody.invalid/")
    assert answer.error in ("the host's name cannot be resolved", "no answer within 1 s")


def test_a_resolver_that_hangs_ends_with_the_time() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    assert post(sender(resolve), f"http://{NAME}/").error == "no answer within 1 s"


def test_a_slow_receiver_is_left(receiver: Receiver) -> None:
    receiver.answer = hold(receiver)
    resolve, _ = names(["127.0.0.1"])
    started = time.monotonic()
    assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").error == "no answer within 1 s"
    assert time.monotonic() - started < 5


def test_drops_of_an_answer_do_not_lengthen_the_time(receiver: Receiver) -> None:
    def drip(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not receiver.ending.wait(0.1):
            handler.wfile.write(b"x")

    receiver.answer = drip
    resolve, _ = names(["127.0.0.1"])
    assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").error == "no answer within 1 s"


def test_of_a_huge_answer_little_is_read(receiver: Receiver) -> None:
    sent = 0
    broken = threading.Event()

    def flood(handler: BaseHTTPRequestHandler, _: int) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**10))
        handler.end_headers()
        try:
            while not receiver.ending.is_set():
                sent += handler.wfile.write(bytes(1 << 16))
        finally:
            broken.set()

    receiver.answer = flood
    resolve, _ = names(["127.0.0.1"])
    assert post(sender(resolve), f"http://{NAME}:{receiver.port}/") == Answer(200)
    assert broken.wait(20), "the connection is closed while the receiver still sends"
    # At most what the kernel's buffers hold, and not 10 GB.
    assert sent < 64 << 20


def test_an_answer_that_never_ends_counts_by_its_status(receiver: Receiver) -> None:
    def trickle(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(202)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        receiver.ending.wait(30)

    receiver.answer = trickle
    resolve, _ = names(["127.0.0.1"])
    assert post(sender(resolve), f"http://{NAME}:{receiver.port}/") == Answer(202)


def test_a_connection_that_breaks(receiver: Receiver) -> None:
    receiver.answer = lambda handler, _: handler.connection.close()
    resolve, _ = names(["127.0.0.1"])
    answer = post(sender(resolve), f"http://{NAME}:{receiver.port}/")
    assert answer == Answer(error="the connection broke before there was an answer")


def test_an_answer_that_is_none(receiver: Receiver) -> None:
    def nonsense(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.wfile.write(b"\x00\xff\r\n\r\n" * 100)

    receiver.answer = nonsense
    resolve, _ = names(["127.0.0.1"])
    assert post(sender(resolve), f"http://{NAME}:{receiver.port}/").status is None


def test_retry_after_is_handed_on(receiver: Receiver) -> None:
    receiver.answer = status(503, Retry_After="17")
    resolve, _ = names(["127.0.0.1"])
    answer = post(sender(resolve), f"http://{NAME}:{receiver.port}/")
    assert answer == Answer(503, retry_after="17")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    context = tls_context()
    context.load_verify_locations(authority.file)
    return context


def test_the_certificate_is_checked_for_the_name(
    authority: Authority, trusting: ssl.SSLContext
) -> None:
    resolve, _ = names(["127.0.0.1"])
    trusts = Sender(trusting, private=True, limits=QUICK, resolve=resolve)
    with Receiver().listening(context=authority.server(NAME)) as receiver:
        assert post(trusts, f"https://{NAME}:{receiver.port}/") == Answer(204)
        other = post(trusts, f"https://other.example.com:{receiver.port}/")
        address = post(trusts, f"https://127.0.0.1:{receiver.port}/")
        untrusted = post(sender(resolve), f"https://{NAME}:{receiver.port}/")
    assert other.error is not None
    assert "not valid for 'other.example.com'" in other.error
    assert address.error is not None
    assert "not valid for '127.0.0.1'" in address.error
    assert untrusted.error is not None
    assert untrusted.error.startswith("no trusted connection")
    assert len(receiver.calls) == 1


def test_a_trusted_name_does_not_open_the_way_to_another_at_the_same_address(
    authority: Authority, trusting: ssl.SSLContext
) -> None:
    """A kept connection, verified for the first name, would serve the second."""
    resolve, _ = names(["127.0.0.1"])
    trusts = Sender(trusting, private=True, limits=QUICK, resolve=resolve)
    with Receiver().listening(context=authority.server(NAME)) as receiver:

        async def both() -> tuple[Answer, Answer]:
            targets = [
                Target("https", host, receiver.port, "/") for host in (NAME, "other.example.com")
            ]
            return (
                await trusts.post(targets[0], {}, b"{}"),
                await trusts.post(targets[1], {}, b"{}"),
            )

        first, second = asyncio.run(both())
    assert first.status == 204
    assert second.status is None


def test_certificates_of_a_company_come_from_the_environment(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    resolve, _ = names(["127.0.0.1"])
    with Receiver().listening(context=authority.server(NAME)) as receiver:
        assert post(sender(resolve), f"https://{NAME}:{receiver.port}/") == Answer(204)


def test_a_receiver_that_does_not_speak_tls(receiver: Receiver) -> None:
    resolve, _ = names(["127.0.0.1"])
    answer = post(sender(resolve), f"https://{NAME}:{receiver.port}/")
    assert answer.status is None
    assert answer.error is not None
    assert receiver.calls == []
