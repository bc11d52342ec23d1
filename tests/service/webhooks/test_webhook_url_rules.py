"""Test which URLs are accepted, and which IP addresses may be connected to."""

import asyncio

import pytest

from jobs.spec import MAX_URL_CHARS
from service.webhooks.url_rules import (
    AddressRefused,
    HostRule,
    Target,
    TargetRefused,
    WebhookRules,
    check_address,
    resolve,
)


def rules(*hosts: str, http: bool = False) -> WebhookRules:
    return WebhookRules(tuple(map(HostRule.parse, hosts)), http=http)


HOOKS = rules("hooks.example.com", "*.example.org", "other.example.com:8443")


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://hooks.example.com", Target("https", "hooks.example.com", 443, "/")),
        ("https://hooks.example.com:443/", Target("https", "hooks.example.com", 443, "/")),
        ("HTTPS://Hooks.Example.COM/A/b%20c?d=e&f", None),
        ("https://hooks.example.com?a=/b", Target("https", "hooks.example.com", 443, "/?a=/b")),
        ("https://hooks.example.com/a@b:c", Target("https", "hooks.example.com", 443, "/a@b:c")),
        ("https://a.example.org/", Target("https", "a.example.org", 443, "/")),
        ("https://a.b-c.example.org/", Target("https", "a.b-c.example.org", 443, "/")),
        ("https://other.example.com:8443/x", Target("https", "other.example.com", 8443, "/x")),
    ],
)
def test_allowed(url: str, target: Target | None) -> None:
    expected = target or Target("https", "hooks.example.com", 443, "/A/b%20c?d=e&f")
    assert HOOKS.violation(url) is None
    assert HOOKS.target(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "https://example.org/",
        "https://xhooks.example.com/",
        "https://a.hooks.example.com/",
        "https://hooks.example.com.evil.test/",
        "https://hooks.example.com:8443/",
        "https://other.example.com/",
        "https://evil.test/?hooks.example.com",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://2130706433/",
        "https://localhost/",
    ],
)
def test_other_hosts_and_ports_are_refused(url: str) -> None:
    violation = HOOKS.violation(url)
    assert violation is not None
    assert violation.field == "webhook_url"
    assert violation.value == url
    assert "SERVICE_WEBHOOK_HOSTS" in violation.detail
    assert "*." not in violation.detail, "the list is not shown"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com",
        "//hooks.example.com/",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "https:/hooks.example.com/",
        "https:hooks.example.com",
        "https:///hooks.example.com/",
        "https://@hooks.example.com/",
        "https://user@hooks.example.com/",
        "https://user:secret@hooks.example.com/",
        "https://evil.test\\@hooks.example.com/",
        "https://hooks.example.com\\.evil.test/",
        "https://hooks.example.com/#",
        "https://hooks.example.com/#fragment",
        "https://hooks.example.com#@evil.test/",
        "https://hooks.example.com./",
        "https://.hooks.example.com/",
        "https://hooks..example.com/",
        "https://hooks.example.com:/",
        "https://hooks.example.com:0/",
        "https://hooks.example.com:65536/",
        "https://hooks.example.com:+443/",
        "https://hooks.example.com:443x/",
        "https://hooks.example.com/a b",
        "https://hooks.example.com/\r\nX: y",
        "https://hooks.example.com/\n",
        " https://hooks.example.com/",
        "https://hooks.example.com/ä",
        "https://höoks.example.com/",
        "https://hooks。example。com/",
        "https://hooks.example.com:\u0664\u0664\u0663/",
        "https://hooks.example.com/\x00",
        "https://hooks.example.com/" + "x" * MAX_URL_CHARS,
        "https://" + "x" * 64 + ".example.org/",
    ],
)
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    violation = HOOKS.violation(url)
    assert violation is not None
    assert "without user, password and fragment" in violation.bound


def test_http_is_taken_only_where_it_is_allowed() -> None:
    violation = HOOKS.violation("http://hooks.example.com/")
    assert violation is not None
    assert "SERVICE_WEBHOOK_HTTP=1" in violation.detail
    open_rules = rules("hooks.example.com", http=True)
    assert open_rules.target("http://hooks.example.com/").port == 80
    # A port belongs to its scheme.
    assert open_rules.violation("http://hooks.example.com:443/") is not None


def test_without_hosts_everything_is_refused_and_the_setting_named() -> None:
    violation = WebhookRules().violation("https://hooks.example.com/")
    assert violation is not None
    assert "SERVICE_WEBHOOK_HOSTS" in violation.detail
    with pytest.raises(TargetRefused):
        WebhookRules().target("https://hooks.example.com/")


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://hooks.example.com/", "hooks.example.com"),
        ("https://hooks.example.com:8443/", "hooks.example.com:8443"),
        ("http://127.0.0.1:80/", "127.0.0.1"),
        ("https://[::1]:9000/", "[::1]:9000"),
    ],
)
def test_the_host_header_names_other_ports_only(url: str, authority: str) -> None:
    hosts = ("hooks.example.com", "hooks.example.com:8443", "127.0.0.1", "[::1]:9000")
    assert rules(*hosts, http=True).target(url).authority == authority


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.com",
        "*.127.0.0.1",
        "*.*.example.com",
        "a*.example.com",
        "https://hooks.example.com",
        "hooks.example.com/",
        "hooks.example.com:0",
        "hooks.example.com:65536",
        "hooks.example.com:*",
        "user@hooks.example.com",
        "127.1",
        "2130706433",
        "0x7f000001",
        "[::::]",
        "hööks.example.com",
    ],
)
def test_odd_entries_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"host|address|domain"):
        HostRule.parse(entry)


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
    "fd00::1",
    "fec0::1",
]
NOBODYS = [
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "169.254.170.2",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "::ffff:168.63.129.16",
    "::ffff:100.100.100.200",
    "::ffff:192.0.0.192",
    "::ffff:a9fe:a9fe",
    "::ffff:0:a9fe:a9fe",
    "::ffff:0:8.8.8.8",
    "64:ff9b::168.63.129.16",
    "64:ff9b::6464:64c8",
    "64:ff9b::c000:c0",
    "64:ff9b:1::a83f:8110",
    "2606:4700:64::a9fe:a9fe",
    "fd64::168.63.129.16",
    "2002:a83f:8110::1",
    "fd00:42::42",
    "fd00:c1::a9fe:a9fe",
    "fd00:ec2::254",
    "fd00:ec2::254%eth0",
    "fd00:ec2::23",
    "fd20:ce::254",
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
