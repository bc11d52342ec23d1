"""Compute self-attention on E4M3 through cuDNN's graph interface, with static scales.

cuDNN's kernels are faster with a multiple of 128 keys, the last few of them masked, than with any
other number (H100, cuDNN 9.19: 23.4 ms against 26.4 ms for 32,760 tokens). Keys and values are
therefore padded, and the graph gets the number of valid keys. In BF16, where the GPU's power limit
is the bound, padding gains nothing, and torch's own binding to cuDNN suffices.

The softmax's numerators, which are at most 1, are multiplied by 256 and rounded to E4M3 as well. A
graph is built once for each shape and cached.
"""

from __future__ import annotations

import math
from typing import Any

import cudnn
import torch
from torch import Tensor

from quant.kernels.eager import P_SCALE
from quant.kernels.interface import AttentionScales
from quant.kernels.triton_fused import padded_length

_FLOAT = cudnn.data_type.FLOAT
_FP8 = cudnn.data_type.FP8_E4M3
_DESCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


class Fp8Attention:
    """Attends q [B, S, heads, D] to the first `tokens` of k, v [B, T, heads, D], all in E4M3."""

    def __init__(self) -> None:
        self._handles: dict[torch.device, Any] = {}
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._scalars: dict[tuple[torch.device, float], Tensor] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales, tokens: int
    ) -> Tensor:
        """Return [B, S, heads, D] in E4M3, under `scales.out`."""
        k, v = _padded(k), _padded(v)
        handle = self._handle(q.device)
        key = (q.device, q.shape, q.stride(), k.shape, k.stride(), tokens)
        if key not in self._graphs:
            self._graphs[key] = _Graph(handle, q, k, tokens)
        out = torch.empty_like(q)
        values = (scales.q, scales.k, scales.v, P_SCALE, 1 / P_SCALE, 1 / scales.out)
        scalars = [self._scalar(q.device, value) for value in values]
        self._graphs[key].run(handle, (q, k, v), scalars, out)
        return out

    def _handle(self, device: torch.device) -> Any:
        if device not in self._handles:
            self._handles[device] = cudnn.create_handle()
        handle = self._handles[device]
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        return handle

    def _scalar(self, device: torch.device, value: float) -> Tensor:
        if (device, value) not in self._scalars:
            self._scalars[device, value] = torch.full((1, 1, 1, 1), value, device=device)
        return self._scalars[device, value]


def _padded(x: Tensor) -> Tensor:
    length = padded_length(x.shape[1])
    if length == x.shape[1]:
        return x
    padded = x.new_zeros(x.shape[0], length, *x.shape[2:])
    padded[:, : x.shape[1]] = x
    return padded


class _Graph:
    def __init__(self, handle: Any, q: Tensor, k: Tensor, tokens: int) -> None:
        graph = cudnn.pygraph(
            io_data_type=_FP8,
            intermediate_data_type=_FLOAT,
            compute_data_type=_FLOAT,
            handle=handle,
        )
        self._graph = graph
        self._device = q.device
        self._inputs = [_like(graph, name, x) for name, x in (("q", q), ("k", k), ("v", k))]
        self._extras: dict[Any, Tensor] = {}
        options: dict[str, Any] = dict(zip(("q", "k", "v"), self._inputs, strict=True))
        options |= {"generate_stats": False, "attn_scale": 1 / math.sqrt(q.shape[-1])}
        if tokens < k.shape[1]:
            options |= {
                "use_padding_mask": True,
                "seq_len_q": self._lengths("seq_len_q", q.shape[0], q.shape[1]),
                "seq_len_kv": self._lengths("seq_len_kv", q.shape[0], tokens),
            }
        self._scalars = [_scalar(graph, name) for name in _DESCALES]
        options |= dict(zip(_DESCALES, self._scalars, strict=True))
        out, _, *largest = graph.sdpa_fp8(**options)
        for amax in largest:
            amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(_FLOAT)
            self._extras[amax] = torch.zeros(1, 1, 1, 1, device=q.device)
        dim, stride = _heads_first(torch.empty_like(q, device="meta"))
        self._out = out.set_output(True).set_dim(dim).set_stride(stride).set_data_type(_FP8)
        graph.build([cudnn.heur_mode.A])
        size = max(1, graph.get_workspace_size())
        self._workspace = torch.empty(size, dtype=torch.uint8, device=q.device)

    def run(
        self, handle: Any, inputs: tuple[Tensor, ...], scalars: list[Tensor], out: Tensor
    ) -> None:
        pack = dict(zip(self._inputs, inputs, strict=True))
        pack |= dict(zip(self._scalars, scalars, strict=True))
        pack |= self._extras | {self._out: out}
        self._graph.execute(pack, self._workspace, handle=handle)

    def _lengths(self, name: str, batch: int, length: int) -> Any:
        lengths = self._graph.tensor(
            name=name, dim=[batch, 1, 1, 1], stride=[1] * 4, data_type=cudnn.data_type.INT32
        )
        self._extras[lengths] = torch.full(
            (batch, 1, 1, 1), length, dtype=torch.int32, device=self._device
        )
        return lengths


def _scalar(graph: Any, name: str) -> Any:
    return graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=_FLOAT)


def _like(graph: Any, name: str, x: Tensor) -> Any:
    dim, stride = _heads_first(x)
    return graph.tensor(name=name, dim=dim, stride=stride, data_type=_FP8)


def _heads_first(x: Tensor) -> tuple[list[int], list[int]]:
    """Return dimensions and strides of x [B, S, heads, D] in the order [B, heads, S, D]."""
    batch, tokens, heads, width = x.stride()
    return [x.shape[0], x.shape[2], x.shape[1], x.shape[3]], [batch, heads, tokens, width]
