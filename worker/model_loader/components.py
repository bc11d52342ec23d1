"""Load the components that all modes share: tokenizer, text encoder, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5EncoderModel

from quant import BackgroundReader, TensorReader
from quant.transformer.meta_model import allocate, check_stored
from quant.transformer.pipeline_weights import empty_encoder_and_vae
from quant.weights.reader import ReadRequest
from quant.weights.weight_files import stored_weights
from worker.device import Device
from worker.model_loader.component_files import (
    WEIGHTS,
    check_files,
)
from worker.model_loader.latent_preview import LatentPreview
from worker.model_loader.scheduler import read_scheduler
from worker.model_loader.tokenizer import ModelTokenizer, read_tokenizer


@dataclass(frozen=True, slots=True)
class Components:
    """The components that all modes share.

    Attributes:
        scheduler: a template; each run creates its own from its configuration.
        text_encoder_placement: "device", "host" or "encode", as in
            `worker.model_loader.memory_plan.Placement`; loaded on the host unless "device".
        vae_tiling: whether the VAE decodes in tiles.
        preview: makes previews of the VAE's latents; None to make none.
    """

    tokenizer: ModelTokenizer
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    scheduler: Any
    text_encoder_placement: str = "device"
    vae_tiling: bool = False
    preview: LatentPreview | None = None


class ComponentLoader:
    """Loads the shared components in three steps: check and allocate, copy, finish.

    The constructor does everything that depends on global settings of torch and the libraries.
    `copy` only copies and may therefore run in another thread.
    """

    def __init__(
        self, path: Path, device: Device, text_encoder_device: torch.device | None = None
    ) -> None:
        """Check the weights of text encoder and VAE in the folder `path` and allocate their memory.

        Args:
            text_encoder_device: where the text encoder is loaded; by default `device`.

        Raises:
            ModelUnusable: a component lacks a file, or one cannot be read.
            quant.WeightsError: names the tensor that is missing, has no place or has a wrong shape
                or type; or a configuration describes no such component.
        """
        self._path = path
        for part in ("text_encoder", "vae"):
            check_files(path / part, WEIGHTS)
        self.text_encoder, self.vae = empty_encoder_and_vae(path)
        self._copies: list[tuple[TensorReader, list[ReadRequest]]] = []
        encoder_device = text_encoder_device or device.torch_device
        self._allocate(self.text_encoder, path / "text_encoder", device.dtype, encoder_device)
        self._allocate(self.vae, path / "vae", device.vae_dtype, device.torch_device)

    def copy(self, background: BackgroundReader | None = None) -> None:
        """Copy the weights, now or in the thread of `background`.

        Raises:
            quant.WeightsError: a file cannot be read, or has become shorter.
        """
        for reader, requests in self._copies:
            if background is None:
                reader.read(requests)
            else:
                background.read(requests, reader)

    def finish(self, tokenizer: Callable[[], ModelTokenizer] | None = None) -> Components:
        """Read the remaining components; `copy` may still be running in the background.

        Args:
            tokenizer: returns the tokenizer that another thread reads; by default it is read here.

        Raises:
            ModelUnusable: a component lacks a file, or one cannot be read.
        """
        return Components(
            tokenizer=tokenizer() if tokenizer else read_tokenizer(self._path / "tokenizer"),
            text_encoder=self.text_encoder.eval(),
            vae=self.vae.eval(),
            scheduler=read_scheduler(self._path),
        )

    def _allocate(
        self, module: nn.Module, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        stored = stored_weights(folder)
        check_stored(module.state_dict(keep_vars=True), stored, source=str(folder), exact=False)
        reader = TensorReader(device)
        # Allocate everything now. Memory that is freed while earlier work on the device still uses
        # it must not be reused for this.
        self._copies.append((reader, list(allocate(module, stored, reader.device))))
