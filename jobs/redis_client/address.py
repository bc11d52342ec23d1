"""Read REDIS_URL: one server, or sentinels that know which server is the primary.

    redis://user:password@host:6379/0              rediss:// with TLS, unix:///path by a socket
    redis+sentinel://user:password@host:26379,host:26379/mymaster/0      rediss+sentinel://

User and password are the server's; those of the sentinels, if they have any, are the options
`sentinel_username` and `sentinel_password`. The options of TLS (`ssl_...`) have redis-py's names
and hold for the server and for the sentinels. What is wrong is found here and not at the first
command, and no error repeats the URL: it may hold passwords.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from redis.connection import parse_url

SENTINEL_PORT: Final = 26379
_SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS: Final = frozenset(
    {
        *_FILES,
        *("ssl_ca_path", "ssl_password", "ssl_check_hostname", "ssl_cert_reqs"),
        *("ssl_min_version", "ssl_ciphers"),
    }
)
_VERIFICATION: Final = {
    "ssl_cert_reqs": ("none", "optional", "required"),
    "ssl_check_hostname": ("true", "false"),
}
_SENTINEL_OPTIONS: Final = frozenset({"sentinel_username", "sentinel_password"})
_OPTIONS: Final = frozenset({"db", "username", "password", "client_name", "protocol"})

_FORM: Final = "redis://:password@host:port/number"
_SENTINEL_FORM: Final = "redis+sentinel://:password@host:26379,host:26379/mymaster/0"
_UNREADABLE: Final = (
    f"it cannot be read as {_FORM}; write what is special in a password, like / or @, as %2F or %40"
)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A REDIS_URL that can be used.

    Attributes:
        url: the server's, for redis-py; with sentinels only its options count, not its host.
        sentinels: host and port of each sentinel; empty if the server is at a fixed address.
        primary: the name by which the sentinels know the primary.
        sentinel_options: keyword arguments of redis-py for connections to the sentinels.
    """

    url: str = field(repr=False)
    sentinels: tuple[tuple[str, int], ...] = ()
    primary: str = ""
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_encrypted(self) -> bool:
        """Whether connections use TLS."""
        return self.url.startswith("rediss:")

    def server_options(self) -> dict[str, Any]:
        """Return redis-py's keyword arguments for connections to the server, without its host."""
        options = cast("dict[str, Any]", parse_url(self.url))  # type: ignore[no-untyped-call]
        for name in ("host", "port", "connection_class"):
            options.pop(name, None)
        return options | ({"ssl": True} if self.is_encrypted else {})


def parse_address(url: str) -> RedisAddress:
    """Read a REDIS_URL, and the files that it names.

    Raises:
        ValueError: it cannot be used. The message is a sentence about "it", without the value.
    """
    scheme = url.partition("://")[0]
    if "cluster" in scheme:
        raise ValueError(
            "it names a sharded cluster, whose scripts cannot change several keys at once; use one "
            f"server, or sentinels as in {_SENTINEL_FORM}"
        )
    if scheme not in _SCHEMES or "://" not in url:
        raise ValueError(
            "it does not start with redis://, rediss:// or unix://, or with redis+sentinel:// or "
            "rediss+sentinel://"
        )
    parts = _split(url)
    options = _options(parts)
    _check_options(scheme, options)
    if scheme.endswith("+sentinel"):
        address = _with_sentinels(parts, options)
    else:
        _check_server(parts)
        address = RedisAddress(url)
    try:
        address.server_options()
    except ValueError:  # of redis-py, and it may quote a part of the password as the port
        raise ValueError(_UNREADABLE) from None
    return address


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(_UNREADABLE) from None
    # What follows the first of these is no password any more, so an @ says that a password was cut.
    beyond = f"{parts.path}{parts.query}{parts.fragment}"
    if parts.scheme != "unix" and ("@" in beyond or "#" in url):
        raise ValueError(_UNREADABLE)
    return parts


def _options(parts: SplitResult) -> dict[str, str]:
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError(_UNREADABLE) from None
    return dict(pairs)


def _check_options(scheme: str, options: Mapping[str, str]) -> None:
    known = _OPTIONS
    known |= _TLS_OPTIONS if scheme.startswith("rediss") else frozenset()
    known |= _SENTINEL_OPTIONS if scheme.endswith("+sentinel") else frozenset()
    for name in options:
        if name in known:
            continue
        if name in _TLS_OPTIONS:
            raise ValueError(f"its option {name} needs TLS: write {_encrypted(scheme)}://")
        if name in _SENTINEL_OPTIONS:
            raise ValueError(f"its option {name} needs sentinels: write {_SENTINEL_FORM}")
        raise ValueError(f"its option {name} is not known; known are {', '.join(sorted(known))}")
    if scheme.startswith("rediss"):
        _check_verification(options)
        _check_files(options)


def _check_verification(options: Mapping[str, str]) -> None:
    for name, values in _VERIFICATION.items():
        value = options.get(name)
        if value is not None and value.lower() not in values:
            raise ValueError(f"its option {name} is {value}; it takes {', '.join(values)}")


def _encrypted(scheme: str) -> str:
    return "rediss" + scheme.removeprefix("redis").removeprefix("unix")


def _check_files(options: Mapping[str, str]) -> None:
    """Load certificates and key as a connection will; redis-py would name no file."""
    for name in _FILES:
        path = options.get(name)
        if path is None:
            continue
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ValueError(
                f"its option {name} is {path}, which cannot be read ({error.strerror}); name a "
                f"file that this user may read"
            ) from None
    authorities, certificate = options.get("ssl_ca_certs"), options.get("ssl_certfile")
    key = options.get("ssl_keyfile")
    try:
        context = ssl.create_default_context(cafile=authorities)
    except ssl.SSLError:
        raise ValueError(
            f"its option ssl_ca_certs is {authorities}, which holds no certificate; name a file "
            f"with certificates of authorities in PEM form"
        ) from None
    if certificate is None and key is None:
        return
    if certificate is None:
        raise ValueError(f"its option ssl_keyfile is {key}, and ssl_certfile is missing; name both")
    try:
        # A function, because without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, lambda: options.get("ssl_password", ""))
    except ssl.SSLError:
        raise ValueError(
            f"its option ssl_certfile is {certificate}, which does not go with the key in "
            f"{key or 'the same file'}; name the certificate's own key, and ssl_password if it "
            f"has one"
        ) from None


def _check_server(parts: SplitResult) -> None:
    if parts.scheme == "unix":
        return
    if "," in parts.netloc.rpartition("@")[2]:
        raise ValueError(f"it names several hosts; those of sentinels are written {_SENTINEL_FORM}")
    _host_and_port(parts.netloc.rpartition("@")[2], 6379)
    _check_database(parts.path.strip("/"))


def _check_database(text: str) -> None:
    if text and not (text.isascii() and text.isdecimal()):
        raise ValueError(_UNREADABLE)


def _host_and_port(text: str, usual_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        raise ValueError(_UNREADABLE) from None
    return parts.hostname or "localhost", usual_port if port is None else port


def _with_sentinels(parts: SplitResult, options: dict[str, str]) -> RedisAddress:
    credentials, at, hosts = parts.netloc.rpartition("@")
    if not all(hosts.split(",")):
        raise ValueError(f"it lacks the host of a sentinel; write {_SENTINEL_FORM}")
    sentinels = tuple(_host_and_port(each, SENTINEL_PORT) for each in hosts.split(","))
    primary, _, database = parts.path.strip("/").partition("/")
    _check_database(database)
    if not primary or primary.isdecimal():
        raise ValueError(
            f"it does not say by which name the sentinels know the primary; write {_SENTINEL_FORM}"
        )
    sentinel_options: dict[str, Any] = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in _SENTINEL_OPTIONS & options.keys()
    }
    scheme = parts.scheme.removesuffix("+sentinel")
    query = urlencode(options, quote_via=quote)
    server = f"{scheme}://{credentials}{at}/{database or 0}" + (f"?{query}" if query else "")
    if scheme == "rediss":
        tls = parse_url(server)  # type: ignore[no-untyped-call]
        sentinel_options = {
            "ssl": True,
            **{name: value for name, value in tls.items() if name in _TLS_OPTIONS},
            **sentinel_options,
        }
    return RedisAddress(server, sentinels, unquote(primary), sentinel_options)
