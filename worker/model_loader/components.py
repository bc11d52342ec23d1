"""What all modes of a model share: tokenizer, text encoder, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from quant import BackgroundReader, TensorReader
from quant.transformer.meta_model import allocate, check_stored, without_weights
from quant.weights.header import stored_tensors
from quant.weights.reader import ReadRequest
from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader.component_files import CONFIG, WEIGHTS, check_files, read_json, read_part
from worker.model_loader.tokenizer import ModelTokenizer, read_tokenizer


@dataclass(frozen=True, slots=True)
class Components:
    """What all modes use.

    Attributes:
        scheduler: a pattern: a run makes its own from its configuration. text_encoder_place: as
        `worker.model_loader.memory_plan.Placement` has it; on the host but for "device".
        vae_tiling: whether the VAE decodes in tiles.
    """

    tokenizer: ModelTokenizer
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    scheduler: Any
    text_encoder_place: str = "device"
    vae_tiling: bool = False


class ComponentLoader:
    """Shared parts on their way: checked, then copied, by another thread if one likes, then there.

    Everything that torch's and the libraries' global switches could get into the way of happens
    where the object is made; `copy` only copies.
    """

    def __init__(
        self, path: Path, device: Device, text_encoder_on: torch.device | None = None
    ) -> None:
        """Check the weights of text encoder and VAE in the folder `path` and make room for them.

        Args:
            text_encoder_on: where the text encoder goes; by default to the device.

        Raises:
            ModelUnusable: a part lacks a file, or one cannot be read.
            quant.WeightsError: naming the tensor that is not as it should be.
        """
        self._path = path
        encoder = read_part(UMT5Config.from_pretrained, path / "text_encoder", WEIGHTS)
        check_files(path / "vae", WEIGHTS)
        try:
            with without_weights():
                self.text_encoder = UMT5EncoderModel(encoder)
                self.vae = AutoencoderKLWan.from_config(read_json(path / "vae" / "config.json"))
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise ModelUnusable(
                f"The configurations of text encoder and VAE in {path} describe none: {error!r}"
            ) from error
        self.text_encoder.tie_weights()
        self._copies: list[tuple[TensorReader, list[ReadRequest]]] = []
        place = text_encoder_on or device.torch_device
        self._expect(self.text_encoder, path / "text_encoder", device.dtype, place)
        self._expect(self.vae, path / "vae", device.vae_dtype, device.torch_device)

    def copy(self, beside: BackgroundReader | None = None) -> None:
        """Copy the weights, at once or by a thread beside.

        Raises:
            quant.WeightsError: a file cannot be read, or has become shorter.
        """
        for copier, wanted in self._copies:
            if beside is None:
                copier.read(wanted)
            else:
                beside.read(wanted, copier)

    def finish(self, tokenizer: Callable[[], ModelTokenizer] | None = None) -> Components:
        """Read what is left; `copy` may still be under way.

        Args:
            tokenizer: gives the one that somebody else is reading; by default it is read here.

        Raises:
            ModelUnusable: a part lacks a file, or one cannot be read.
        """
        index: Mapping[str, Any] = read_json(self._path / "model_index.json")
        scheduler = getattr(diffusers, index["scheduler"][1])
        return Components(
            tokenizer=tokenizer() if tokenizer else read_tokenizer(self._path / "tokenizer"),
            text_encoder=self.text_encoder.eval(),
            vae=self.vae.eval(),
            scheduler=read_part(scheduler.from_pretrained, self._path / "scheduler", CONFIG),
        )

    def _expect(
        self, module: nn.Module, folder: Path, dtype: torch.dtype, place: torch.device
    ) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        stored = stored_tensors(sorted(folder.glob(WEIGHTS)))
        wanted = dict(module.named_parameters())  # a parameter under two names counts once
        check_stored(wanted, stored, source=str(folder), exact=False)
        copier = TensorReader(place)
        # All room is made now: memory that is freed under work still running must not be among it.
        self._copies.append((copier, list(allocate(module, stored, copier.device))))


def load_shared_parts(
    path: Path, device: Device, text_encoder_on: torch.device | None = None
) -> Components:
    """Load tokenizer, text encoder, VAE and scheduler from the folder `path`.

    Args:
        text_encoder_on: where the text encoder goes; by default to the device.

    Raises:
        ModelUnusable, quant.WeightsError: as `ComponentLoader`.
    """
    parts = ComponentLoader(path, device, text_encoder_on)
    parts.copy()
    return parts.finish()
