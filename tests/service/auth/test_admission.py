"""Test that requests with the same key are admitted in batches, and that each is counted."""

import asyncio

import pytest
from redis import Redis

from jobs.errors import RateLimited, Unauthenticated
from service.auth.admission import Admission
from service.auth.api_keys import KeyStore, Role
from service.auth.gate import Gate, Principal
from service.auth.rate_limit import RateLimiter
from service.auth.sessions import SessionStore


@pytest.fixture
def keys(redis: Redis) -> KeyStore:
    return KeyStore(redis)


@pytest.fixture
def gate(redis: Redis, keys: KeyStore) -> Gate:
    return Gate(keys, RateLimiter(redis, "1000/minute"), SessionStore(redis), may_be_open=False)


async def crowd(gate: Gate, tokens: list[str | None]) -> list[Principal | BaseException]:
    admission = Admission(gate)
    return await asyncio.gather(*map(admission.admit, tokens), return_exceptions=True)


def script_calls(redis: Redis) -> int:
    return int(redis.info("commandstats")["cmdstat_evalsha"]["calls"])


def test_a_crowd_with_one_key_costs_few_calls(redis: Redis, keys: KeyStore, gate: Gate) -> None:
    _, token = keys.add("ann", Role.USER)
    gate.admit(token)
    before = script_calls(redis)
    answers = asyncio.run(crowd(gate, [token] * 50))
    assert {answer.name for answer in answers if isinstance(answer, Principal)} == {"ann"}
    assert len(answers) == 50
    assert 1 <= script_calls(redis) - before <= 2, "at most the first alone, the others together"


def test_exactly_as_many_pass_as_may(keys: KeyStore, gate: Gate) -> None:
    _, token = keys.add("ann", Role.USER, rate="30/minute")
    answers = asyncio.run(crowd(gate, [token] * 50))
    assert [isinstance(each, Principal) for each in answers] == [True] * 30 + [False] * 20
    assert all(isinstance(each, RateLimited) for each in answers[30:])


def test_each_is_answered_for_its_own_key(keys: KeyStore, gate: Gate) -> None:
    _, anns = keys.add("ann", Role.USER)
    _, bobs = keys.add("bob", Role.OPS)
    answers = asyncio.run(crowd(gate, [anns, None, bobs, "wan_nobody", anns, None]))
    names = [each.name if isinstance(each, Principal) else type(each) for each in answers]
    assert names == ["ann", Unauthenticated, "bob", Unauthenticated, "ann", Unauthenticated]


def test_whoever_leaves_meanwhile_leaves_the_others_waiting_for_nothing(
    keys: KeyStore, gate: Gate
) -> None:
    _, token = keys.add("ann", Role.USER)

    async def leave() -> list[Principal]:
        admission = Admission(gate)
        tasks = [asyncio.create_task(admission.admit(token)) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks[1:]), timeout=10)

    assert [principal.name for principal in asyncio.run(leave())] == ["ann", "ann"]
