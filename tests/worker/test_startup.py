"""Nobody looks for garbage until the worker is ready, and then somebody does again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer

from worker import __main__ as entry
from worker import startup
from worker.errors import StartError
from worker.settings import WorkerSettings
from worker.startup import resting_collector


def test_it_rests_until_the_start_is_over() -> None:
    with resting_collector():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 100_000, "what was imported is not looked through again"
    assert gc.isenabled()


def test_what_was_made_within_is_not_looked_through_again_and_its_garbage_is_gone() -> None:
    class Node:
        pass

    with resting_collector():
        kept = [Node() for _ in range(1000)]
        cycle = Node()
        cycle.itself = cycle  # type: ignore[attr-defined]
        gone = weakref.ref(cycle)
        del cycle
        assert gone() is not None
    assert gone() is None
    looked_at = {id(each) for each in gc.get_objects()}
    assert looked_at.isdisjoint(map(id, kept))


def test_it_is_back_after_a_start_that_failed() -> None:
    with pytest.raises(KeyError), resting_collector():
        raise KeyError
    assert gc.isenabled()


def test_it_rests_while_the_worker_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # or it would be set for other tests
    enabled: list[bool] = []
    monkeypatch.setattr(typer, "run", lambda _main: enabled.append(gc.isenabled()))
    entry.run()
    assert enabled == [False]


@pytest.mark.parametrize("begin", [startup.start, startup.start_follower])
def test_it_rests_while_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, begin: Callable[..., object]
) -> None:
    enabled: list[bool] = []

    def load(_path: Path) -> None:
        enabled.append(gc.isenabled())
        raise StartError("enough seen")

    monkeypatch.setattr(startup, "load_config", load)
    monkeypatch.setenv("ARTIFACTS_URL", "file:///nowhere")
    with pytest.raises(StartError, match="enough seen"), ExitStack() as opened:
        begin(WorkerSettings(), Path("worker.toml"), opened)
    assert enabled == [False]
    assert gc.isenabled()
