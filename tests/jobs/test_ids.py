"""Test that ids sort by their time, and those of one process in the order in which it made them."""

import threading
import time
from datetime import UTC, datetime
from itertools import pairwise

import pytest

from jobs import ids


def test_ids_of_one_millisecond_sort_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.1234)
    made = [ids.new_id()[0] for _ in range(2000)]
    assert made == sorted(set(made))
    assert {each[:12] for each in made} == {ids.id_prefix(1_800_000_000.1234)}
    steps = {int(b, 16) - int(a, 16) for a, b in pairwise(made)}
    assert len(steps) == len(made) - 1, "a neighbour cannot be guessed"


def test_threads_make_different_ids() -> None:
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.extend(ids.new_id()[0] for _ in range(500)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 2000
    assert all(ids.is_id(each) and len(each) == 32 for each in made)


def test_an_id_tells_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.5)
    made, moment = ids.new_id()
    assert ids.timestamp_of(made) == 1_800_000_000.5
    assert moment == datetime.fromtimestamp(1_800_000_000.5, UTC)


def test_a_clock_that_is_set_back_makes_ids_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    later, _ = ids.new_id()
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    made, _ = ids.new_id()
    assert ids.timestamp_of(made) == 1_000_000_000.0
    assert made < later
