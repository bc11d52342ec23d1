"""Which addresses are taken, by their form and their host."""

import pytest

from jobs.spec import MAX_URL_CHARS
from service.webhooks.url_rules import HostRule, Target, TargetRefused, WebhookRules


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
