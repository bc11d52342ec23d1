"""Test the capacity model against queueing theory, against the real queue, and its own inputs."""

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue

from benchmarks.report import RESULTS
from benchmarks.serving.capacity import workload
from benchmarks.serving.capacity.queue_model import Arrival, Fleet, WaitingList, simulate
from benchmarks.serving.capacity.waits import expected_waits, percentile
from benchmarks.serving.capacity.workload import Kind, parse_kind, poisson, recorded, scaled
from jobs.redis_keys import LEASE_S
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.recovery import INTERVAL_S
from jobs.store.submission import Submission


def test_waits_of_random_services_are_those_of_erlangs_formula() -> None:
    cards, share, mean_s = 3, 0.8, 10.0
    kinds = scaled([Kind("any", 1.0, mean_s)], cards, share)
    waits: list[float] = []
    for seed in range(4):
        source, drawn = random.Random(100 + seed), poisson(kinds, 20_000, seed)
        arrivals = [replace(each, seconds=source.expovariate(1 / mean_s)) for each in drawn]
        waits += simulate(arrivals, Fleet(cards)).waits_s
    load = cards * share
    terms = [load**k / math.factorial(k) for k in range(cards)]
    last = load**cards / math.factorial(cards) / (1 - share)
    must_wait = last / (sum(terms) + last)
    expected_s = must_wait * mean_s / (cards * (1 - share))
    assert statistics.fmean(waits) == pytest.approx(expected_s, rel=0.08)
    assert sum(wait > 0 for wait in waits) / len(waits) == pytest.approx(must_wait, rel=0.05)


def test_jobs_with_priority_wait_as_cobham_says() -> None:
    first, second = Kind("first", 72.0, 10.0, priority=True), Kind("second", 216.0, 10.0)
    arrivals = poisson([first, second], 40_000, 1)
    waits = simulate(arrivals, Fleet(1)).waits_s
    rest_s = (72 + 216) / 3600 * 10.0**2 / 2
    expected = {True: rest_s / (1 - 0.2), False: rest_s / (1 - 0.2) / (1 - 0.8)}
    for priority, expected_s in expected.items():
        found = [w for w, each in zip(waits, arrivals, strict=True) if each.priority is priority]
        assert statistics.fmean(found) == pytest.approx(expected_s, rel=0.08)


def test_jobs_wait_in_the_order_of_the_real_queue(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    """Create, take and give back jobs at random, here and there."""
    source, waiting = random.Random(11), WaitingList()
    client: Any = redis
    key, names = Queue("q", connection=redis).key, {}
    running = []
    for number in range(400):
        choice = source.choice(["add", "add", "take", "put back"])
        if choice == "add":
            priority = source.random() < 0.4
            made = store.create(request_for_video, "q", Submission(priority=priority))
            names[made.job.id] = number
            waiting.add(number, priority)
        elif choice == "take" and len(waiting):
            job_id = client.lpop(key).decode()
            running.append(store.claim(job_id, "worker-1"))
            assert waiting.take() == names[job_id]
        elif choice == "put back" and running:
            attempt = running.pop(source.randrange(len(running)))
            store.release(attempt)
            waiting.put_back(names[attempt.job_id])
    while len(waiting):
        assert waiting.take() == names[client.lpop(key).decode()]
    assert client.llen(key) == 0
    assert len(names) > 100


def test_a_lost_worker_costs_its_job_a_lease_and_a_second_one_the_job() -> None:
    always = Fleet(1, losses_per_hour=3_600_000, restart_s=100)
    run = simulate([Arrival(0.0, 50.0)], always)
    assert run.failed == 1
    # The second attempt begins when the only worker is back, and is found as the first was.
    assert 100 + LEASE_S <= run.ends_s[0] <= 100 + LEASE_S + INTERVAL_S + 1
    safe = simulate([Arrival(0.0, 50.0)], Fleet(1))
    assert (safe.failed, safe.ends_s, safe.waits_s) == (0, [50.0], [0.0])


def test_more_than_the_cards_can_do_has_no_waits() -> None:
    kind = Kind("any", 10.0, 3600.0)
    assert expected_waits([kind], Fleet(10)).percentiles is None
    found = expected_waits([kind], Fleet(12), jobs=2000, runs=2).percentiles
    assert found is not None
    assert found[50].value <= found[90].value <= found[99].value
    with pytest.raises(ValueError, match="give 1 or more"):
        Fleet(0)


def test_kinds_are_read_as_they_are_documented() -> None:
    assert parse_kind("40:173") == Kind("173", 40.0, 173.0)
    fast = parse_kind("2.5:w8a8-fp8:832x480:25:priority")
    assert (fast.per_hour, fast.priority) == (2.5, True)
    assert fast.seconds == workload.job_s("w8a8-fp8", "832x480", 25)
    for bad in ("40", "x:3", "40:int8:832x480", "0:3", "40:w8a8:832x480:x", "40:-1", "40:nan"):
        with pytest.raises(ValueError, match=r"not RATE:SECONDS|above 0"):
            parse_kind(bad)


def test_the_seconds_of_the_14b_are_those_that_were_measured() -> None:
    name = "2026-11-30-nvidia-h200-forward.json"
    rows = {row["what"]: row for row in json.loads((RESULTS / name).read_text())["rows"]}
    for (mode, size), seconds in workload.PASS_S.items():
        measured = rows[f"{size}: {mode.replace('-fp8', ', FP8 attention')}"]["value"]
        assert seconds == pytest.approx(measured / 1000, abs=6e-4), (mode, size)


def test_recorded_jobs_arrive_when_they_were_created(tmp_path: Path) -> None:
    def job(created: str, started: str | None, finished: str | None) -> dict[str, object]:
        times = {"created_at": created, "started_at": started, "finished_at": finished}
        return times | {"priority": False, "request": {"mode": "w8a8", "size": "832x480"}}

    day = "2026-12-01T10:0"
    first = job(f"{day}0:00Z", f"{day}0:01Z", f"{day}0:31Z")
    second = job(f"{day}0:10Z", f"{day}0:31Z", f"{day}1:31Z")
    never_begun = job(f"{day}0:05Z", None, f"{day}0:06Z")
    path = tmp_path / "jobs.jsonl"
    lines = [json.dumps({"jobs": [second, never_begun]}), json.dumps(first)]
    path.write_text("\n".join(lines))
    assert recorded(path) == [
        Arrival(0.0, 30.0, False, "w8a8:832x480"),
        Arrival(10.0, 60.0, False, "w8a8:832x480"),
    ]
    path.write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="line 1"):
        recorded(path)


def test_a_percentile_is_a_value_that_was_there() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], each) for each in (25, 50, 51, 99)] == [1, 2, 3, 4]
