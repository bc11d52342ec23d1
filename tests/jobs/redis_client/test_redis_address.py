"""Test REDIS_URL: what it may say, and that what is wrong is named without showing a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fixtures.certificates import Authority
from jobs.redis_client import connect, parse_address

SENTINELS = "redis+sentinel://:s3cret@a:26380,b,[::1]:26379/wan/2"


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://:s3cret@host:6379/1",
        "redis://user:p%40ss%2F@host/0?client_name=wan&protocol=2",
        "rediss://host:6380?ssl_check_hostname=false&ssl_cert_reqs=none",
        "unix:///run/valkey.sock?db=1&password=s3cret",
    ],
)
def test_a_single_server_has_no_sentinels(url: str) -> None:
    address = parse_address(url)
    assert (address.url, address.sentinels) == (url, ())
    assert address.is_encrypted == url.startswith("rediss")


def test_sentinels_the_name_of_the_primary_and_its_database() -> None:
    address = parse_address(SENTINELS)
    assert address.sentinels == (("a", 26380), ("b", 26379), ("::1", 26379))
    assert address.primary == "wan"
    assert address.server_options() == {"password": "s3cret", "db": 2}
    assert address.sentinel_options == {}
    assert not address.is_encrypted


def test_sentinels_have_users_and_passwords_of_their_own() -> None:
    query = "sentinel_username=watcher&sentinel_password=p%26w&client_name=wan"
    address = parse_address(f"redis+sentinel://bob:s3cret@a/wan?{query}")
    assert address.sentinel_options == {"username": "watcher", "password": "p&w"}
    assert address.server_options() == {
        "username": "bob",
        "password": "s3cret",
        "client_name": "wan",
        "db": 0,
    }


def test_the_options_of_tls_hold_for_server_and_sentinels(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("worker", "localhost")
    query = f"ssl_ca_certs={authority.file}&ssl_certfile={own}&ssl_check_hostname=false"
    address = parse_address(f"rediss+sentinel://a,b/wan/0?{query}&sentinel_password=s3cret")
    options = {
        "ssl": True,
        "ssl_ca_certs": str(authority.file),
        "ssl_certfile": str(own),
        "ssl_check_hostname": False,
    }
    assert address.server_options() == options | {"db": 0}
    assert address.sentinel_options == options | {"password": "s3cret"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://:s3cret@x", "does not start with redis://"),
        ("redis", "does not start with redis://"),
        ("redis+cluster://:s3cret@a,b/0", "names a sharded cluster"),
        ("rediss+cluster://a,b/0", "names a sharded cluster"),
        ("redis://:s3cret@a:6379,b:6379/0", "several hosts; those of sentinels are written"),
        ("redis://:s3c/ret@a:6379/0", "write what is special in a password"),
        ("redis://:s3c?ret@a:6379/0", "write what is special in a password"),
        ("redis://:12?s3cret@a:6379/0", "write what is special in a password"),
        ("redis://:s3c#ret@a:6379/0", "write what is special in a password"),
        ("redis://:12#s3cret@a:6379/0", "write what is special in a password"),
        ("redis://a:s3cret", "cannot be read as redis://"),
        ("redis://[s3cret", "cannot be read as redis://"),
        ("redis://a/s3cret", "cannot be read as redis://"),
        ("redis://a/0?protocol=s3cret", "cannot be read as redis://"),
        ("redis://a/0?s3cret", "cannot be read as redis://"),
        ("redis://a/0?socket_timeout=60", "option socket_timeout is not known; known are client_"),
        ("redis://a/0?ssl_ca_certs=/ca.pem", "ssl_ca_certs needs TLS: write rediss://"),
        ("redis+sentinel://a/m/0?ssl_ca_certs=/c", "needs TLS: write rediss[+]sentinel://"),
        ("redis://a/0?sentinel_password=s3cret", "sentinel_password needs sentinels"),
        ("rediss://a/0?ssl_cert_reqs=maybe", "is maybe; it takes none, optional, required"),
        ("rediss://a/0?ssl_check_hostname=maybe", "is maybe; it takes true, false"),
        ("redis+sentinel://:s3cret@a:26379,b:26379", "by which name the sentinels know"),
        ("redis+sentinel://:s3cret@a:26379/0", "by which name the sentinels know"),
        ("redis+sentinel://:s3cret@a,,b/m/0", "lacks the host of a sentinel"),
        ("redis+sentinel://:s3cret@/m/0", "lacks the host of a sentinel"),
        ("redis+sentinel://:s3cret@a:x/m/0", "cannot be read as"),
        ("redis+sentinel://:s3cret@a/m/zero", "cannot be read as"),
    ],
)
def test_what_cannot_be_used_is_refused_and_not_shown(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        connect(url)
    assert "s3c" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_files_of_tls_are_read_at_once(tmp_path: Path) -> None:
    authority, missing = Authority(tmp_path), tmp_path / "missing.pem"
    first, second = (authority.issue(name, "localhost") for name in ("first", "second"))
    empty = tmp_path / "empty.pem"
    empty.touch()
    for query, reason in {
        f"ssl_ca_certs={missing}": f"ssl_ca_certs is {missing}, which cannot be read (No such file",
        f"ssl_ca_certs={empty}": f"ssl_ca_certs is {empty}, which holds no certificate",
        f"ssl_keyfile={first}": f"ssl_keyfile is {first}, and ssl_certfile is missing",
        f"ssl_certfile={first}&ssl_keyfile={second}": f"ssl_certfile is {first}, which does not go "
        f"with the key in {second}",
        f"ssl_certfile={authority.file}": "does not go with the key in the same file",
    }.items():
        with pytest.raises(ValueError) as refused:  # noqa: PT011  # the text is compared below
            parse_address(f"rediss://host/0?{query}")
        assert reason in str(refused.value)
