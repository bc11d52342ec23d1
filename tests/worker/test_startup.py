"""Test that garbage collection is paused until the worker is ready, and then runs again."""

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
from worker.startup import paused_gc


def test_it_is_paused_until_the_start_is_over() -> None:
    with paused_gc():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 100_000, "imported objects are excluded"
    assert gc.isenabled()


def test_objects_made_meanwhile_are_excluded_and_their_garbage_is_freed() -> None:
    class Node:
        pass

    with paused_gc():
        kept = [Node() for _ in range(1000)]
        cycle = Node()
        cycle.itself = cycle  # type: ignore[attr-defined]
        gone = weakref.ref(cycle)
        del cycle
        assert gone() is not None
    assert gone() is None
    tracked = {id(each) for each in gc.get_objects()}
    assert tracked.isdisjoint(map(id, kept))


def test_it_runs_again_after_a_start_that_failed() -> None:
    with pytest.raises(KeyError), paused_gc():
        raise KeyError
    assert gc.isenabled()


def test_it_is_paused_while_the_worker_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # or it would be set for other tests
    enabled: list[bool] = []
    monkeypatch.setattr(typer, "run", lambda _main: enabled.append(gc.isenabled()))
    entry.run()
    assert enabled == [False]


@pytest.mark.parametrize("begin", [startup.start, startup.start_follower])
def test_it_is_paused_while_the_model_is_loaded(
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
