"""Self-attention on E4M3 through cuDNN's graph interface, with static scales.

The softmax's numerators, at most 1, are rounded to E4M3 too, times 256. cuDNN picks the kernel; a
graph is built once for each shape and kept.
"""

from __future__ import annotations

import math
from typing import Any

import cudnn
import torch
from torch import Tensor

from quant.kernels.interface import AttentionScales

P_SCALE = 2.0**-8
_FP8 = cudnn.data_type.FP8_E4M3
_FLOAT = cudnn.data_type.FLOAT


class Fp8Attention:
    """Callable on q, k, v [B, S, heads, D] E4M3, S of q and of k and v; returns the same form."""

    def __init__(self) -> None:
        self._handles: dict[torch.device, Any] = {}
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._scalars: dict[tuple[torch.device, float], Tensor] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales) -> Tensor:
        key = (q.device, q.shape, k.shape)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self._handle(q.device), q, k)
        graph = self._graphs[key]
        out = torch.empty_like(q)
        values = (scales.q, scales.k, scales.v, P_SCALE, 1 / P_SCALE, 1 / scales.out)
        graph.run(
            self._handle(q.device), (q, k, v), [self._scalar(q.device, x) for x in values], out
        )
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


class _Graph:
    def __init__(self, handle: Any, q: Tensor, k: Tensor) -> None:
        graph = cudnn.pygraph(
            io_data_type=_FP8,
            intermediate_data_type=_FLOAT,
            compute_data_type=_FLOAT,
            handle=handle,
        )
        self._inputs = [_like(graph, name, x) for name, x in (("q", q), ("k", k), ("v", k))]
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        self._scalars = [
            graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=_FLOAT) for name in names
        ]
        out, _, amax_s, amax_o = graph.sdpa_fp8(
            **dict(zip(("q", "k", "v"), self._inputs, strict=True)),
            **dict(zip(names, self._scalars, strict=True)),
            generate_stats=False,
            attn_scale=1 / math.sqrt(q.shape[-1]),
            use_causal_mask=False,
        )
        dim, stride = _heads_first(q)
        out.set_output(True).set_dim(dim).set_stride(stride).set_data_type(_FP8)
        self._out = out
        self._amax = []
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(_FLOAT)
            self._amax.append((amax, torch.zeros(1, 1, 1, 1, device=q.device)))
        graph.build([cudnn.heur_mode.A])
        self._graph = graph
        size = max(1, graph.get_workspace_size())
        self._workspace = torch.empty(size, dtype=torch.uint8, device=q.device)

    def run(
        self, handle: Any, inputs: tuple[Tensor, ...], scalars: list[Tensor], out: Tensor
    ) -> None:
        pack = dict(zip(self._inputs, inputs, strict=True))
        pack |= dict(zip(self._scalars, scalars, strict=True))
        pack |= dict(self._amax) | {self._out: out}
        self._graph.execute(pack, self._workspace, handle=handle)


def _like(graph: Any, name: str, x: Tensor) -> Any:
    dim, stride = _heads_first(x)
    return graph.tensor(name=name, dim=dim, stride=stride, data_type=_FP8)


def _heads_first(x: Tensor) -> tuple[list[int], list[int]]:
    """[B, S, heads, D] as cuDNN counts: [B, heads, S, D] and the strides to match."""
    batch, tokens, heads, width = x.stride()
    return [x.shape[0], x.shape[2], x.shape[1], x.shape[3]], [batch, heads, tokens, width]
