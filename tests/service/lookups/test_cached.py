"""What many threads ask for is read once in a while, by one of them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.lookups.cached import CachedValue


class Source:
    """Counts how often it is read; reading waits for `open`."""

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
    remembered = CachedValue(source.read, kept_s=60)
    with pytest.raises(ConnectionError):
        remembered.get()
    assert remembered.fresh() is None
    assert remembered.get() == remembered.get() == remembered.fresh() == 2
    assert source.reads == 2


def test_nothing_is_kept_for_no_time() -> None:
    source = Source()
    source.reads = 1
    remembered = CachedValue(source.read, kept_s=0)
    assert [remembered.get(), remembered.get()] == [2, 3]
    assert remembered.fresh() is None


def test_what_is_not_worth_it_is_not_kept() -> None:
    source = Source()
    source.reads = 1
    remembered = CachedValue(source.read, kept_s=60, worth_keeping=lambda value: value > 2)
    assert [remembered.get(), remembered.get(), remembered.get()] == [2, 3, 3]
    assert remembered.fresh() == 3


@pytest.mark.parametrize("reads_before", [0, 1])
def test_those_who_ask_meanwhile_get_what_the_reader_gets(reads_before: int) -> None:
    source = Source()
    source.reads = reads_before
    source.open.clear()
    remembered = CachedValue(source.read, kept_s=60)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(remembered.get) for _ in range(8)]
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
