"""Test TLS with certificates on both sides, directly and through a sentinel (Debian's Redis)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from benchmarks.fixtures.certificates import Authority
from deploy.local.ports import LOOPBACK
from jobs.redis_client import connect, connect_async
from tests.support.sentinel_group import PASSWORD, SentinelGroup


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def group(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[SentinelGroup]:
    folder = tmp_path_factory.mktemp("tls")
    with SentinelGroup(folder, servers=1, sentinels=1, tls=authority) as group:
        yield group


@pytest.fixture(scope="module")
def options(authority: Authority) -> str:
    """The options of a client that trusts the authority and shows a certificate of its own."""
    own = authority.issue("client", "client.example")
    return f"ssl_ca_certs={authority.file}&ssl_certfile={own}&ssl_keyfile={own}"


def urls(group: SentinelGroup, options: str) -> dict[str, str]:
    server = f"{LOOPBACK}:{group.ports[0]}"
    return {
        "direct": f"rediss://:{PASSWORD.replace(' ', '%20')}@{server}/0?{options}",
        "sentinel": group.url(query=f"&{options}"),
    }


@pytest.mark.parametrize("way", ["direct", "sentinel"])
def test_both_sides_show_certificates(group: SentinelGroup, options: str, way: str) -> None:
    url = urls(group, options)[way]

    async def ping() -> object:
        client = connect_async(url, 2)
        try:
            return await client.ping()
        finally:
            await client.aclose()

    with connect(url) as redis:
        assert redis.ping()
        assert redis.connection_pool.get_connection()._sock.cipher() is not None
    assert asyncio.run(ping())


@pytest.mark.parametrize("way", ["direct", "sentinel"])
def test_a_client_without_a_certificate_is_refused(
    group: SentinelGroup, authority: Authority, way: str
) -> None:
    url = urls(group, f"ssl_ca_certs={authority.file}")[way]
    with connect(url) as redis, pytest.raises(RedisConnectionError):
        redis.ping()


@pytest.mark.parametrize("way", ["direct", "sentinel"])
def test_a_server_of_another_authority_is_refused(
    group: SentinelGroup, tmp_path: Path, way: str
) -> None:
    stranger = Authority(tmp_path)
    own = stranger.issue("client", "client.example")
    url = urls(group, f"ssl_ca_certs={stranger.file}&ssl_certfile={own}")[way]
    with (
        connect(url) as redis,
        pytest.raises(RedisConnectionError, match="certificate verify failed"),
    ):
        redis.ping()


def test_a_certificate_for_another_host_is_refused_unless_told(
    group: SentinelGroup, options: str
) -> None:
    url = urls(group, options)["direct"].replace(LOOPBACK, "localhost")
    with (
        connect(url) as redis,
        pytest.raises(RedisConnectionError, match="Hostname mismatch"),
    ):
        redis.ping()
    with connect(f"{url}&ssl_check_hostname=false") as redis:
        assert redis.ping()
