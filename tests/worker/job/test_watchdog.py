"""A job that shows no sign of life ends its process; everything else does not."""

import threading
import time

from worker.errors import EXIT_HUNG
from worker.job.watchdog import Watchdog


class Ends:
    """What would have ended the process."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.came = threading.Event()

    def __call__(self, status: int) -> None:
        self.status = status
        self.came.set()


def test_silence_ends_the_process_after_the_last_words() -> None:
    ends, words = Ends(), list[str]()
    with Watchdog(0.6, lambda: words.append("given up"), ends):
        assert ends.came.wait(10)
    assert ends.status == EXIT_HUNG
    assert words == ["given up"]


def test_last_words_that_hang_are_not_waited_for_long(monkeypatch) -> None:
    monkeypatch.setattr("worker.job.watchdog.LAST_WORDS_S", 0.2)
    ends, never = Ends(), threading.Event()
    with Watchdog(0.1, lambda: never.wait(30), ends):
        assert ends.came.wait(10)
    never.set()


def test_signs_of_life_and_a_larger_limit_keep_it_quiet() -> None:
    ends = Ends()
    with Watchdog(1.2, lambda: None, ends) as dog:
        for _ in range(12):
            time.sleep(0.2)
            dog.alive()
        dog.allow(60)
        time.sleep(2)
    assert ends.status is None
