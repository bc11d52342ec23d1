"""Test that a worker tells systemd that it serves and is alive, whatever Redis and the job do."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.process.systemd import SystemdNotifier


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket on which systemd listens; the environment names it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            monkeypatch.delenv(name, raising=False)
        yield listener


def drain(told: socket.socket) -> list[str]:
    told.setblocking(False)
    found = []
    try:
        while True:
            found.append(told.recv(100).decode())
    except BlockingIOError:
        return found


def test_it_is_ready_inside_and_stopping_after(told: socket.socket) -> None:
    with SystemdNotifier():
        assert told.recv(100) == b"READY=1"
    assert told.recv(100) == b"STOPPING=1"
    assert drain(told) == [], "nobody asked for signs of life"


def test_signs_of_life_come_three_times_in_the_limit(
    told: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    with SystemdNotifier():
        assert told.recv(100) == b"READY=1"
        for _ in range(3):
            assert told.recv(100) == b"WATCHDOG=1"
    end = drain(told)
    assert end[-1] == "STOPPING=1"
    time.sleep(0.2)
    assert drain(told) == []


def test_signs_of_life_of_another_process_are_not_given(
    told: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    with SystemdNotifier():
        time.sleep(0.1)
    assert drain(told) == ["READY=1", "STOPPING=1"]


def test_an_abstract_socket_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"wan-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        with SystemdNotifier():
            assert listener.recv(100) == b"READY=1"


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with SystemdNotifier():
        pass


def test_a_systemd_that_is_gone_costs_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with SystemdNotifier():
        pass
    assert "systemd is not told READY=1" in caplog.text
