"""Run a Wan transformer with its blocks on the device one at a time.

A reference in float32 of the 14B takes 57 GB of weights. Here each block is copied to the device in
the wanted dtype, runs, and is dropped, so that the device holds one or two blocks and the stream of
activations. The whole transformer stays on the host in its own dtype. A pass can begin at any
block, from the residual stream that an earlier pass had there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.studies.points import Point

SMALL_BYTES = 2 << 30
"""A transformer of fewer bytes may be in memory several times, in other dtypes or quantized."""

Change = Callable[[int, nn.Module], nn.Module]
"""Called with a block's number and its copy on the device; returns the block to run.

It must not change the copy, which later passes may use; `quant.transformer.module_tree.share_tree`
makes another that shares what is not replaced."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What every block of a pass is given besides the stream.

    Attributes:
        text: the embedded prompts, [B, T, K].
        timestep: [B, 6, K], the modulation of each block.
        rope: cosines and sines.
        time: [B, K], what the head is modulated by.
        grid: (frames, height, width) of the stream's tokens.
    """

    text: Tensor
    timestep: Tensor
    rope: Any
    time: Tensor
    grid: tuple[int, int, int]

    def tiled(self, times: int) -> Conditions:
        """Return the conditions of a batch that holds all samples in their order, `times` times."""
        text, timestep, time = (
            each.repeat(times, *(1,) * (each.dim() - 1))
            for each in (self.text, self.timestep, self.time)
        )
        return Conditions(text, timestep, self.rope, time, self.grid)


def stream_bytes(transformer: Any, latents: Tensor) -> int:
    """Return the bytes of a `WanTransformer3DModel`'s float32 stream of latents [B, C, F, H, W]."""
    config = transformer.config
    tokens = latents[:, 0].numel() // math.prod(config.patch_size)
    return int(4 * tokens * config.num_attention_heads * config.attention_head_dim)


class BlockStream:
    """Runs passes of a transformer on a device, block by block."""

    def __init__(
        self,
        transformer: Any,
        device: torch.device,
        dtype: torch.dtype | None = torch.float32,
        *,
        keep: bool = False,
    ) -> None:
        """Copy what is not a block to the device.

        Args:
            transformer: a `WanTransformer3DModel` on the host, in evaluation mode.
            dtype: of weights and stream; None keeps each weight's own, as in service.
            keep: keep the blocks on the device, which is faster where all of them fit.
        """
        self._kept: dict[int, nn.Module] | None = {} if keep else None
        self.transformer = transformer
        self.device = device
        self.dtype = dtype
        self._rope = self._on_device(transformer.rope, None)
        self._patch = self._on_device(transformer.patch_embedding, dtype)
        self._embedder = self._on_device(transformer.condition_embedder, dtype)
        self._norm = self._on_device(transformer.norm_out, dtype)
        self._head = self._on_device(transformer.proj_out, dtype)
        self._head_table = self._moved(transformer.scale_shift_table, dtype)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.transformer.blocks)

    def stream_bytes(self, latents: Tensor) -> int:
        """Return the bytes of the float32 stream of latents [B, C, F, H, W]."""
        return stream_bytes(self.transformer, latents)

    def block(self, index: int) -> nn.Module:
        """Return a copy of a block on the device."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        block = self._on_device(self.transformer.blocks[index], self.dtype)
        if self._kept is not None:
            self._kept[index] = block
        return block

    @torch.no_grad()
    def begin(self, points: Sequence[Point]) -> tuple[Tensor, Conditions]:
        """Embed points: return the stream [B, S, K] before the first block, and the conditions."""
        dtype = next(self._patch.parameters()).dtype
        latents = torch.cat([each.latents for each in points]).to(self.device, dtype)
        timesteps = torch.cat([each.timestep for each in points]).to(self.device)
        texts = torch.cat([each.text for each in points]).to(self.device, dtype)
        sizes = zip(latents.shape[2:], self.transformer.config.patch_size, strict=True)
        frames, height, width = (size // patch for size, patch in sizes)
        rope = self._rope(latents)
        # torch would convolve float32 with 10 bits of mantissa on a GPU.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            patches = self._patch(latents)
        stream = patches.flatten(2).transpose(1, 2).contiguous()
        time, timestep, text, _ = self._embedder(timesteps, texts, None)
        conditions = Conditions(
            text, timestep.unflatten(1, (6, -1)), rope, time, (frames, height, width)
        )
        return stream, conditions

    @torch.no_grad()
    def passes(
        self, stream: Tensor, conditions: Conditions, first: int = 0, change: Change | None = None
    ) -> Iterator[Tensor]:
        """Run the blocks from number `first` on; yield the stream after each.

        Args:
            stream: [B, S, K] before block `first`.
            change: may replace a block, for example by a quantized one.
        """
        for index in range(first, self.blocks):
            block = self.block(index)
            if change is not None:
                block = change(index, block)
            stream = block(stream, conditions.text, conditions.timestep, conditions.rope)
            yield stream

    @torch.no_grad()
    def end(self, stream: Tensor, conditions: Conditions) -> Tensor:
        """Return the velocity [B, C, F, H, W] of the stream after the last block."""
        shift, scale = (self._head_table + conditions.time.unsqueeze(1)).chunk(2, dim=1)
        normed = self._norm(stream.float()) * (1 + scale) + shift
        tokens = self._head(normed.to(stream.dtype))
        frames, height, width = conditions.grid
        t, h, w = self.transformer.config.patch_size
        parts = tokens.reshape(len(tokens), frames, height, width, t, h, w, -1).permute(
            0, 7, 1, 4, 2, 5, 3, 6
        )
        velocity: Tensor = parts.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return velocity

    def velocity(self, points: Sequence[Point], change: Change | None = None) -> Tensor:
        """Run a whole pass: return the velocity [B, C, F, H, W] at points."""
        stream, conditions = self.begin(points)
        for after in self.passes(stream, conditions, change=change):
            stream = after
        return self.end(stream, conditions)

    def _on_device(self, module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        copied: nn.Module = copy.deepcopy(module, memo)  # new modules, the same tensors
        for each in copied.modules():
            for registry in (each._parameters, each._buffers):
                for name, tensor in registry.items():
                    if tensor is not None:
                        registry[name] = self._moved(tensor, dtype)
        return copied

    def _moved(self, tensor: Tensor, dtype: torch.dtype | None) -> Any:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # First moved and then converted: torch would convert on the host, and copy more bytes.
        moved = tensor.detach().to(self.device).to(wanted)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(moved, requires_grad=False) if is_parameter else moved
