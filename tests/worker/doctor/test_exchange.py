"""Test the exchange between devices, by gloo between processes on the CPU."""

from __future__ import annotations

import pytest

from worker.device import Device
from worker.doctor import exchange
from worker.doctor.report import Fault


def test_ranks_exchange_and_the_first_one_says_how_long_it_took() -> None:
    found = exchange.between_cards(Device("cpu", "cpu"), 2)()
    assert found is not None
    assert found.detail == "2 devices exchange tensors by GLOO"
    assert float(found.figures["all_to_all_ms"]) > 0


def test_one_device_has_nothing_to_exchange() -> None:
    assert exchange.between_cards(Device("cpu", "cpu"), 1)() is None


def test_ranks_that_fail_say_why_and_none_is_left_waiting() -> None:
    with pytest.raises(Fault, match=r"ranks ended with \[1, 1\].*no usable cuda device") as caught:
        exchange.run_ranks("cuda", 2)
    assert "NCCL_DEBUG=INFO" in caught.value.remedy
