"""Hold what the product takes from torch_npu to the module that was imported."""

from typing import Any

import pytest
import torch

from tests.npu.stand_in.calls import Schemas, problems, uses_in
from tests.npu.stand_in.environment import ROOT
from worker.device import Device

pytestmark = pytest.mark.npu


def test_every_operator_that_is_called_is_registered_as_it_is_called(npu: Device) -> None:
    import torch_npu  # noqa: PLC0415 — as the product does, when a card is asked for

    calls = uses_in(ROOT).calls
    schemas: Schemas = {}
    for name in {call.operator for call in calls}:
        assert hasattr(torch_npu, name), f"torch_npu has no function {name}"
        packet = getattr(torch.ops.npu, name)
        schemas[name] = [getattr(packet, each)._schema for each in packet.overloads()]
    assert problems(calls, schemas) == []


def test_everything_else_that_is_taken_from_torch_npu_is_there(npu: Device) -> None:
    import torch_npu  # noqa: PLC0415

    uses = uses_in(ROOT).attributes
    missing = []
    for each in uses:
        found: Any = torch_npu if each.module == "torch_npu" else vars(torch)["npu"]
        for name in each.path.split("."):
            if not hasattr(found, name):
                if name in type(found).__setattr__.__code__.co_consts:
                    break  # an option that can only be set
                missing.append(f"{each.where}: {each.module}.{each.path}")
                break
            found = getattr(found, name)
    assert missing == []
    paths = sorted({f"{each.module}.{each.path}" for each in uses})
    print(f"\n{len(uses)} other uses of torch_npu, of {len(paths)} names: {paths}")
    assert len(paths) > 10
