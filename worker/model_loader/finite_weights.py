"""Refuse a model whose weights are not all finite, once, after they have been loaded.

A damaged file may still be of the right size. Of a NaN or an infinite number in it no video can be
made, or one that is black or noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from worker.errors import ModelUnusable
from worker.model_loader.components import Components
from worker.model_loader.loader import Mode

HOST_LIMIT_BYTES: Final = 1 << 30
"""A part on the host that is larger is not checked: reading 11 GB once more would take seconds. Its
results are checked in every job (`worker/engine/checks.py`)."""


@torch.no_grad()
def check_finite(components: Components, modes: Sequence[Mode]) -> None:
    """Refuse weights that are NaN or infinite, where checking them is cheap.

    Weights in 8 bits are left out: what a quantized linear computes with a wrong one is not finite
    either, which the job at the start shows (`worker/job/proof.py`).

    Raises:
        ModelUnusable: names the part, the first such tensor, and their number.
    """
    parts: dict[str, nn.Module] = {
        "text encoder": components.text_encoder,
        "VAE": components.vae,
    }
    parts |= {f"transformer of mode {mode.offer.name!r}": mode.transformer for mode in modes}
    checked: set[tuple[int, int]] = set()  # tensors have several names, and modes share some
    for part, module in parts.items():
        new: dict[str, Tensor] = {}
        for name, tensor in module.state_dict().items():
            place = tensor.data_ptr(), tensor.nbytes
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and place not in checked:
                checked.add(place)
                new[name] = tensor
        on_host = sum(each.nbytes for each in new.values() if each.device.type == "cpu")
        if new and on_host <= HOST_LIMIT_BYTES:
            _refuse_wrong(part, new)


def _refuse_wrong(part: str, tensors: dict[str, Tensor]) -> None:
    # A sum is finite only if every summand is, and takes no memory. A sum that is not finite may
    # also have overflowed.
    sums = torch.stack([tensor.sum().float() for tensor in tensors.values()]).isfinite().tolist()
    suspects = [name for name, is_finite in zip(tensors, sums, strict=True) if not is_finite]
    wrong = [name for name in suspects if not tensors[name].isfinite().all()]
    if wrong:
        others = f" and in {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelUnusable(
            f"The {part} has values that are NaN or infinite in the tensor {wrong[0]!r}{others}: "
            "its files are damaged; copy them again."
        )
