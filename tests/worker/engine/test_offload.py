"""A module that visits a device leaves its host copy where it was."""

import pytest
import torch
from torch import nn

from worker.engine.offload import OffloadedModule


def test_a_visitor_is_home_again_after_each_visit():
    module = nn.Linear(4, 4)
    module.again = module.weight  # under a second name
    x = torch.ones(1, 4)
    y = module(x)
    home = module.weight.data_ptr()
    visitor = OffloadedModule(module, torch.device("cpu"))
    with visitor.on_device() as guest:
        assert guest is module
        assert module.weight.data_ptr() != home
        assert torch.equal(module(x), y)
        assert module.again is module.weight
    assert module.weight.data_ptr() == home
    with pytest.raises(KeyboardInterrupt), visitor.on_device():
        raise KeyboardInterrupt
    assert module.weight.data_ptr() == home
