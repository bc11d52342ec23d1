"""Which addresses may be connected to."""

import asyncio

import pytest

from service.webhooks.ip_rules import AddressRefused, check_address, resolve

PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"]
INTERNAL = [
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "240.0.0.1",
    "::1",
    "2001:db8::1",
    "2001:2::1",
    "3fff::1",
    "100::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fec0::1",
]
NOBODYS = [
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "224.0.0.1",
    "239.255.255.250",
    "255.255.255.255",
    "::",
    "::8.8.8.8",
    "::ffff:8.8.8.8",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2002:7f00:1::1",
    "fe80::1",
    "fe80::1%eth0",
    "ff02::1",
]


@pytest.mark.parametrize("address", PUBLIC)
@pytest.mark.parametrize("private", [False, True])
def test_public_addresses_may_be_called(address: str, private: bool) -> None:
    check_address(address, private=private)


@pytest.mark.parametrize("address", INTERNAL)
def test_internal_addresses_only_where_that_is_wanted(address: str) -> None:
    check_address(address, private=True)
    with pytest.raises(AddressRefused, match=address):
        check_address(address, private=False)


@pytest.mark.parametrize("address", NOBODYS)
@pytest.mark.parametrize("private", [False, True])
def test_some_addresses_are_never_called(address: str, private: bool) -> None:
    with pytest.raises(AddressRefused):
        check_address(address, private=private)


def test_the_system_resolves_names_and_addresses() -> None:
    assert asyncio.run(resolve("127.0.0.1", 80)) == ["127.0.0.1"]
    assert asyncio.run(resolve("::1", 80)) == ["::1"]
    assert set(asyncio.run(resolve("localhost", 80))) <= {"127.0.0.1", "::1"}
