"""Test connections through real sentinels: whom they reach, and what a fail-over leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.sentinel import MasterNotFoundError

from deploy.local.ports import LOOPBACK
from deploy.local.waiting import wait_until
from jobs.redis_client import BRIEF, connect, connect_async, explain, is_transient
from jobs.state import JobState
from jobs.store.durability import Durability
from jobs.store.job_store import JobStore
from tests.support.sentinel_group import SentinelGroup
from tests.support.worker_processes import (
    QUEUE,
    REQUEST,
    WorkerProcesses,
    has_ended,
    is_denoising,
    wait_for,
)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    with SentinelGroup(tmp_path_factory.mktemp("sentinels")) as group:
        yield group


def test_commands_reach_the_primary_though_a_sentinel_is_down(
    group: SentinelGroup, unused_port: int
) -> None:
    url = group.url().replace("@", f"@{LOOPBACK}:{unused_port},")

    async def role() -> object:
        client = connect_async(url, 2)
        try:
            return (await client.info("replication"))["role"]
        finally:
            await client.aclose()

    with connect(url, BRIEF) as redis:
        assert redis.info("replication")["role"] == "master"
        assert redis.connection_pool.get_connection().port == group.primary()
    assert asyncio.run(role()) == "master"


def test_a_name_that_no_sentinel_knows_is_said(group: SentinelGroup) -> None:
    with connect(group.url(name="other")) as redis, pytest.raises(MasterNotFoundError) as caught:
        redis.ping()
    assert "No sentinel knows a primary other that is up" in str(caught.value)
    assert f"{LOOPBACK}:{group.sentinel_ports[2]} does not know it (it knows wan)" in str(
        caught.value
    )
    assert is_transient(caught.value), "a sentinel may be set up in a moment"


def test_a_password_that_all_sentinels_refuse_is_no_outage(group: SentinelGroup) -> None:
    with (
        connect(group.url(sentinel_password="s3cret")) as redis,
        pytest.raises(AuthenticationError) as caught,
    ):
        redis.ping()
    assert not is_transient(caught.value)
    assert "sentinel_password" in explain(caught.value)
    assert "s3cret" not in str(caught.value)


def test_sentinels_that_are_all_away_are_waited_for(unused_port: int) -> None:
    url = f"redis+sentinel://:s3cret@{LOOPBACK}:{unused_port}/wan/0"
    with connect(url) as redis, pytest.raises(MasterNotFoundError) as caught:
        redis.ping()
    assert f"{LOOPBACK}:{unused_port}: Error 111 connecting" in str(caught.value)
    assert is_transient(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_primary_that_becomes_read_only_is_an_outage_and_asked_for_again(
    group: SentinelGroup,
) -> None:
    with connect(group.url()) as redis, group.client(group.primary()) as primary:
        redis.set("key", "1")
        primary.replicaof(LOOPBACK, 1)
        try:
            with pytest.raises(RedisConnectionError) as caught:
                redis.set("key", "2")
        finally:
            primary.replicaof("NO", "ONE")
        assert is_transient(caught.value)
        redis.set("key", "3")
        assert redis.get("key") == b"3"


def test_a_fail_over_keeps_accepted_jobs_and_the_one_in_hand(
    group: SentinelGroup, tmp_path: Path
) -> None:
    wait_until(group.replicas_in_step, 30)
    workers = WorkerProcesses(group.url(), tmp_path)
    with connect(group.url()) as redis:
        store = JobStore(redis, Durability(replicas=1))
        in_hand = store.create(REQUEST, QUEUE).job.id
        workers.start(seconds_per_step=0.5)
        try:
            wait_for(store, in_hand, is_denoising)
            waiting = store.create(REQUEST, QUEUE).job.id
            before = group.primary()
            asyncio.run(follow_across(group, before))
            wait_until(lambda: group.primary() != before, 30, "the first sentinel hears of it")
            for job_id in (in_hand, waiting):
                wait_for(store, job_id, has_ended)
                job = store.get(job_id)
                assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1), workers.log_text()
        finally:
            workers.stop()
    assert "Redis is away" in workers.log_text()
    assert "Redis is back" in workers.log_text()


async def follow_across(group: SentinelGroup, primary: int) -> None:
    """Kill the primary under a subscription: it breaks, and the next one hears the new primary."""
    client = connect_async(group.url(), 2)
    try:
        async with client.pubsub() as subscription:
            await subscription.subscribe("channel")
            group.kill(primary)
            with pytest.raises((RedisError, OSError)):
                await heard(subscription)
        refusals: list[RedisError] = []
        while not await hears_itself(client, refusals):
            await asyncio.sleep(0.1)
        assert all(map(is_transient, refusals))
    finally:
        await client.aclose()


async def heard(subscription: Any) -> object:
    while True:
        message = await subscription.get_message(timeout=5)
        if message is not None and message["type"] == "message":
            return message["data"]


async def hears_itself(client: Any, refusals: list[RedisError]) -> bool:
    try:
        async with client.pubsub() as subscription:
            await subscription.subscribe("channel")
            await client.publish("channel", "hello")
            return await heard(subscription) == b"hello"
    except RedisError as error:
        refusals.append(error)
        return False
