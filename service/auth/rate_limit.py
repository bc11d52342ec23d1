"""Limit how many requests a key may send, and how often somebody may try to sign in.

The windows slide, and are in Redis, so that all processes count together.
"""

import ipaddress
import logging
import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from limits import RateLimitItem, parse
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import NoScriptError, OutOfMemoryError

from jobs import redis_keys
from jobs.errors import RateLimited, TooManySignIns

logger = logging.getLogger(__name__)

RATE_BOUND: Final = 'like "600/minute" or "5/second", for a second to a day'
LONGEST_WINDOW_S: Final = 24 * 60 * 60

LONGEST_ADDRESS: Final = 64
"""What a proxy sends may not be an address; no more of it is kept in Redis."""

SIGN_INS_PER_ADDRESS: Final = "30/minute"
SIGN_INS_PER_KEY: Final = "60/minute"
"""More than one address may have, so that no single one keeps a key's owner from signing in."""


_parsed = lru_cache(maxsize=256)(parse)


class _Windows(RedisStorage):
    """limits' storage, whose counting can also be asked for in a pipeline."""

    def queue(self, pipe: Pipeline, item: RateLimitItem, name: str, requests: int) -> None:
        """Ask what `acquire_sliding_window_entry` does; the pipeline has one more result."""
        key = item.key_for(name)
        keys = (self._previous_window_key(key), self._current_window_key(key))
        script = self.lua_acquire_sliding_window
        pipe.evalsha(
            script.sha,
            len(keys),
            *map(self.prefixed_key, keys),
            *map(str, (item.amount, item.get_expiry(), requests)),
        )


class RateLimiter:
    """Counts requests by key. Safe to share between threads; Redis errors are raised."""

    def __init__(self, redis: Redis, default: str) -> None:
        """Create the limiter of one process; `default` is the rate of keys without their own."""
        self._default = default
        # The client's own pool, so that its time limits and retries apply here, too.
        self._storage = _Windows(
            "redis://", connection_pool=redis.connection_pool, key_prefix=redis_keys.RATE_PREFIX
        )
        self._window = SlidingWindowCounterRateLimiter(self._storage)
        self._is_full = False

    def count(self, key_id: str, rate: str | None) -> None:
        """Count one request of a key.

        Raises:
            RateLimited: the key has used up its requests.
        """
        (refusal,) = self.count_all(key_id, rate, 1)
        if refusal is not None:
            raise refusal

    def count_all(self, key_id: str, rate: str | None, requests: int) -> list[RateLimited | None]:
        """Count requests of a key, against its own rate if it has one; returns a result for each.

        A refused request does not count. The number of requests left is read only once they are
        used up, because reading it costs another call to Redis.
        """
        item = _parsed(rate or self._default)
        if self._hit(item, key_id, requests):
            return [None] * requests
        return self._refuse_rest(item, key_id, requests)

    def queue(self, pipe: Pipeline, key_id: str, requests: int) -> None:
        """Ask in a pipeline to count requests against the default rate; see `queued`."""
        self._storage.queue(pipe, _parsed(self._default), key_id, requests)

    def queued(self, counted: object, key_id: str, requests: int) -> Sequence[RateLimited | None]:
        """Return what `count_all` does, from the result of `queue`: a value or an exception."""
        if isinstance(counted, NoScriptError):  # Redis was restarted; this loads the script
            return self.count_all(key_id, None, requests)
        if isinstance(counted, OutOfMemoryError):
            self._note_full()
        elif isinstance(counted, Exception):
            raise counted
        elif not counted:
            return self._refuse_rest(_parsed(self._default), key_id, requests)
        else:
            self._note_room()
        return [None] * requests

    def _refuse_rest(
        self, item: RateLimitItem, key_id: str, requests: int
    ) -> list[RateLimited | None]:
        """Together they exceed the rate, but the first ones may still pass one by one."""
        passed = [requests > 1 and self._hit(item, key_id) for _ in range(requests)]
        return [None if may_pass else self._refusal(item, key_id) for may_pass in passed]

    def count_sign_in(self, address: str, key_id: str | None) -> None:
        """Count an attempt to sign in, against the client's address and against the key's id.

        Raises:
            TooManySignIns: there were too many attempts of either kind.
        """
        self._count_attempt(SIGN_INS_PER_ADDRESS, f"address:{network_of(address)}", "this address")
        if key_id is not None:
            self._count_attempt(SIGN_INS_PER_KEY, f"key:{key_id}", "this key")

    def _count_attempt(self, rate: str, counted: str, shown: str) -> None:
        item, name = parse(rate), f"sign-in:{counted}"
        if self._hit(item, name):
            return
        wait_s = self._wait_s(item, name)
        raise TooManySignIns(
            f"There were {item.amount} attempts to sign in with {shown} in {item.get_expiry()} s, "
            f"which is the most; try again in {wait_s} s.",
            retry_after_s=wait_s,
        )

    def _refusal(self, item: RateLimitItem, key_id: str) -> RateLimited:
        wait_s = self._wait_s(item, key_id)
        return RateLimited(
            f"This key may send {item.amount} requests in {item.get_expiry()} s and has sent them; "
            f"come back in {wait_s} s.",
            retry_after_s=wait_s,
            rate_amount=item.amount,
            rate_window_s=item.get_expiry(),
        )

    def _wait_s(self, item: RateLimitItem, name: str) -> int:
        reset_at, _ = self._window.get_window_stats(item, name)
        return max(1, math.ceil(reset_at - time.time()))

    def _hit(self, item: RateLimitItem, key_id: str, requests: int = 1) -> bool:
        try:
            may_pass = self._window.hit(item, key_id, cost=requests)
        except OutOfMemoryError:
            self._note_full()
            return True
        self._note_room()
        return may_pass

    def _note_full(self) -> None:
        # Requests that only read must go on, or nobody could see what there is to delete.
        if not self._is_full:
            self._is_full = True
            logger.error("Redis is full, so requests are not counted until it has room again.")

    def _note_room(self) -> None:
        if self._is_full:
            self._is_full = False
            logger.info("Redis has room again, and requests are counted.")


def network_of(address: str) -> str:
    """Return what is counted for an address: for IPv6 its /64, which one client has as a whole."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:LONGEST_ADDRESS]
    if parsed.version == 4:
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed), 64), strict=False))


def check_rate(rate: str) -> str:
    """Return a rate unchanged if it is valid.

    Raises:
        ValueError: it is not.
    """
    try:
        item = parse(rate)
        sound = item.amount > 0 and ";" not in rate and 1 <= item.get_expiry() <= LONGEST_WINDOW_S
    except (ValueError, OverflowError):
        sound = False
    if not sound:
        raise ValueError(f"{rate!r} is not a rate; write it {RATE_BOUND}")
    return rate
