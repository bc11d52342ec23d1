"""Hold a LoRA for all linears of a transformer's blocks, as trained and as stored.

A step merges it into the weights as a worker does when it loads the file: the sum is made in FP32
and rounded to BF16. So the LoRA is trained for the weights that will be served. Linears of equal
shape are stacked, so that a few batched products merge all 400.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STORED = torch.float16
"""LoRAs are small numbers, of which FP16 keeps three more bits than BF16."""


class _Stack(nn.Module):
    """The LoRA of N linears of one shape: B [N, out, rank] @ A [N, rank, in]; B is zero at first.

    Attributes:
        weights: of the linears, [N, out, in] BF16.
    """

    def __init__(self, names: list[str], weights: Tensor, rank: int) -> None:
        super().__init__()
        self.names, self.weights = names, weights
        count, width_out, width_in = weights.shape
        down = torch.randn(count, rank, width_in) / width_in**0.5
        self.down = nn.Parameter(down.to(weights.device))
        self.up = nn.Parameter(torch.zeros(count, width_out, rank, device=weights.device))

    def merged(self) -> Tensor:
        """Return the weights with the LoRA, [N, out, in] BF16."""
        return torch.baddbmm(self.weights.float(), self.up, self.down).to(self.weights.dtype)


class Adapters:
    """A LoRA of one rank for every linear of the blocks; its scale is 1.

    Attributes:
        trained: the module that holds what is trained.
    """

    def __init__(self, transformer: WanTransformer3DModel, rank: int, seed: int) -> None:
        """Make one that changes nothing yet.

        Args:
            seed: of its first weights.
        """
        self._dtype = transformer.dtype
        shapes: dict[torch.Size, dict[str, Tensor]] = {}
        for name, linear in block_linears(transformer):
            shapes.setdefault(linear.weight.shape, {})[name] = linear.weight.detach()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._stacks = [
                _Stack(list(named), torch.stack(list(named.values())).bfloat16(), rank)
                for named in shapes.values()
            ]
        self.trained = nn.ModuleList(self._stacks)

    def merged(self) -> dict[str, Tensor]:
        """Return the weights of all linears by parameter, in the dtype that the model computes."""
        found = {}
        for stack in self._stacks:
            weights = stack.merged().to(self._dtype).unbind()
            found.update(
                {f"{name}.weight": w for name, w in zip(stack.names, weights, strict=True)}
            )
        return found

    def stored_bytes(self) -> int:
        """Return the size of the stored tensors, without the file's header."""
        return sum(each.numel() for each in self.trained.parameters()) * STORED.itemsize

    def save(self, file: Path) -> None:
        """Write the file that diffusers' `load_lora_weights` and workers read.

        It has one fact as metadata, because safetensors writes several in a random order.
        """
        tensors = {}
        for stack in self._stacks:
            for layer, stacked in (("lora_A", stack.down), ("lora_B", stack.up)):
                for name, each in zip(stack.names, stacked.detach(), strict=True):
                    tensors[f"transformer.{name}.{layer}.weight"] = each.to("cpu", STORED)
        contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
        save_file(contiguous, file, {"format": "pt"})


def block_linears(transformer: WanTransformer3DModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears of all blocks with their names in the transformer."""
    for name, module in transformer.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            yield name, module


@torch.no_grad()
def merge_file(transformer: WanTransformer3DModel, file: Path) -> None:
    """Add a file of `Adapters.save` to the transformer's weights, in FP32, rounded once."""
    stored = load_file(file, device=str(transformer.device))
    for name, linear in block_linears(transformer):
        down, up = (stored[f"transformer.{name}.{layer}.weight"] for layer in ("lora_A", "lora_B"))
        linear.weight.copy_(linear.weight.float() + up.float() @ down.float())
