"""Define the options that several studies have, and what they load by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from quant.device import backend, usable_device
from quant.errors import StudyError
from quant.studies.block_stream import SMALL_BYTES, stream_bytes
from quant.studies.host import available_bytes, check_host, fits
from quant.studies.points import Point
from quant.transformer.lora.merge import NO_LORAS, LoraSet
from quant.weights.model_folder import check_model_kind

Model = Annotated[Path, typer.Option(help="Pipeline folder in diffusers format.")]
Device = Annotated[Literal["cpu", "cuda", "npu"], typer.Option(help="Where to run.")]
Points = Annotated[Path, typer.Option(help="Folder of points, made by `record`.")]
Out = Annotated[Path, typer.Option(help="Folder to make, or to go on with.")]

Batch = Annotated[int, typer.Option(min=1, help="Points that run together; 1 for the 14B.")]


def load_transformer(model: Path, loras: LoraSet = NO_LORAS) -> Any:
    """Load a transformer in BF16 on the host, to be used block by block, with LoRAs merged.

    Raises:
        StudyError: the folder does not load.
        WeightsError: it holds another kind of model than Wan2.1 text-to-video.
    """
    check_model_kind(model)
    # Takes seconds to import, so it is imported only when a model is really loaded.
    from diffusers import WanTransformer3DModel  # noqa: PLC0415

    try:
        transformer = WanTransformer3DModel.from_pretrained(
            model / "transformer", torch_dtype=torch.bfloat16
        )
    except (OSError, ValueError) as error:
        raise StudyError(f"{model}'s transformer does not load: {error}") from error
    loras.merge(transformer)
    return transformer.eval().requires_grad_(False)


def study_device(
    name: str, transformer: Any, points: Sequence[Point] = ()
) -> tuple[torch.device, bool]:
    """Return a usable device, and whether model and streams fit there.

    The model must fit in BF16 and in float32 at once.

    Args:
        points: those whose streams are kept all at once, on the device or on the host.

    Raises:
        QuantError: the device cannot be used.
        StudyError: neither has memory for the streams.
    """
    device = usable_device(name)
    size = sum(each.nbytes for each in transformer.parameters())
    streams = sum(stream_bytes(transformer, each.latents) for each in points)
    if device.type == "cpu":
        keep = size < SMALL_BYTES
    else:
        free, _ = backend(device.type).mem_get_info()  # type: ignore[arg-type]
        keep = fits(size, streams, free)
        if keep:
            return device, keep
    check_host(streams, len(points), available_bytes())
    return device, keep
