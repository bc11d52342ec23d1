"""Test that an offloaded module keeps its weights on the host after each use."""

import pytest
import torch
from torch import nn

from worker.engine.offload import OffloadedModule


def test_the_weights_are_on_the_host_again_after_each_use():
    module = nn.Linear(4, 4)
    module.again = module.weight  # under a second name
    x = torch.ones(1, 4)
    y = module(x)
    host_address = module.weight.data_ptr()
    offloaded = OffloadedModule(module, torch.device("cpu"))
    with offloaded.on_device() as on_device:
        assert on_device is module
        assert module.weight.data_ptr() != host_address
        assert torch.equal(module(x), y)
        assert module.again is module.weight
    assert module.weight.data_ptr() == host_address
    with pytest.raises(KeyboardInterrupt), offloaded.on_device():
        raise KeyboardInterrupt
    assert module.weight.data_ptr() == host_address
