"""Test that a cached value is read by one thread at a time, and shared by the others."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.lookups.cached import CachedValue


class Source:
    """A value that counts how often it is read; reading waits for `open`."""

    def __init__(self) -> None:
        self.reads = 0
        self.open = threading.Event()
        self.open.set()

    def read(self) -> int:
        self.reads += 1
        assert self.open.wait(10)
        if self.reads == 1:
            raise ConnectionError("the first time never works")
        return self.reads


def test_errors_are_passed_on_and_not_kept() -> None:
    source = Source()
    cached = CachedValue(source.read, ttl_s=60)
    with pytest.raises(ConnectionError):
        cached.get()
    assert cached.fresh() is None
    assert cached.get() == cached.get() == cached.fresh() == 2
    assert source.reads == 2


def test_nothing_is_kept_for_no_time() -> None:
    source = Source()
    source.reads = 1
    cached = CachedValue(source.read, ttl_s=0)
    assert [cached.get(), cached.get()] == [2, 3]
    assert cached.fresh() is None


def test_what_is_not_worth_it_is_not_kept() -> None:
    source = Source()
    source.reads = 1
    cached = CachedValue(source.read, ttl_s=60, worth_caching=lambda value: value > 2)
    assert [cached.get(), cached.get(), cached.get()] == [2, 3, 3]
    assert cached.fresh() == 3


@pytest.mark.parametrize("reads_before", [0, 1])
def test_those_who_ask_meanwhile_get_what_the_reader_gets(reads_before: int) -> None:
    source = Source()
    source.reads = reads_before
    source.open.clear()
    cached = CachedValue(source.read, ttl_s=60)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cached.get) for _ in range(8)]
        source.open.set()
        outcomes = [each.exception(10) or each.result() for each in asked]
    if reads_before:
        assert outcomes == [2] * 8
        assert source.reads == 2
    else:
        # One error for those who waited with the reader; one value for those who came later.
        assert {type(each) for each in outcomes} <= {ConnectionError, int}
        assert isinstance(outcomes[0], ConnectionError)
        assert source.reads <= 2
