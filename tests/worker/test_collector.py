"""Nobody looks for garbage until the worker is ready, and then somebody does again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import typer

from worker import __main__ as entry
from worker.collector import resting_collector


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_it_rests_until_the_start_is_over() -> None:
    with resting_collector():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 100_000, "what was imported is not looked through again"
    assert gc.isenabled()


def test_it_is_back_after_a_start_that_failed() -> None:
    with pytest.raises(KeyError), resting_collector():
        raise KeyError
    assert gc.isenabled()


def test_it_rests_while_the_worker_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    monkeypatch.setattr(typer, "run", lambda _main: enabled.append(gc.isenabled()))
    entry.run()
    assert enabled == [False]
