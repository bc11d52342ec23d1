"""Test that ranks on cards get their process groups from HCCL, beside gloo's on the host.

A simulated card has no HCCL, so there an exchange gets as far as the first call of its library.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.utils._python_dispatch import _disable_current_modes

from tests.npu.stand_in import simulated
from worker.device import Device

pytestmark = pytest.mark.npu


def test_an_exchange_between_cards_goes_to_hccl(npu: Device) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0], backend=npu.collectives)
        assert dist.get_backend(group) == "hccl"
        # As `RankGroup.warm_up` and Ulysses do it: whole numbers, parts of equal size.
        sent = torch.zeros(4, dtype=torch.int64, device=npu.torch_device)
        if simulated.active is None:
            dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
            return
        with (
            _disable_current_modes(),  # which would compute the exchange on the host
            pytest.raises(RuntimeError, match="Failed to find function HcclGetRootInfo"),
        ):
            dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
    finally:
        dist.destroy_process_group()
