"""Make small moving pictures of a video from the latents that are being denoised.

A linear map, fitted to the VAE once (`quant/calibration/preview_map.py`), turns what the scheduler
predicts as the finished latents into pictures. That is one small matrix product on the device and a
copy of a few hundred kilobytes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quant
from quant.calibration.preview_map import DEFAULT_NAME
from worker.config import WorkerConfig
from worker.device import Device
from worker.errors import ConfigError
from worker.interface import PreviewClip, PreviewPace

logger = logging.getLogger(__name__)


class LatentPreview:
    """Makes pictures of the latents of one model on its device.

    Attributes:
        pace: how often they are to be made.
    """

    def __init__(
        self,
        preview_map: quant.PreviewMap,
        device: torch.device,
        fps: float,
        pace: PreviewPace,
    ) -> None:
        """Put the map on the device.

        Args:
            fps: how many latent frames a second of video has.
        """
        self.pace = pace
        self._map = preview_map.to(device)
        self._fps = fps

    @torch.no_grad()
    def clip(self, latents: Tensor) -> PreviewClip:
        """Turn normalized latents [1, C, F, H, W] into a moving picture of F frames."""
        pictures = (self._map.pictures(latents[0]) * 255).round().to(torch.uint8)
        return PreviewClip(pictures.cpu().numpy(), self._fps)


def load_latent_preview(config: WorkerConfig, device: Device, vae: Any) -> LatentPreview | None:
    """Read the model's preview map; None, with a line in the log, if previews cannot be made.

    Raises:
        ConfigError: the configuration names a map that is not there.
        quant.PreviewMapError: the map cannot be read, or was fitted to another VAE.
    """
    if not config.preview.enabled:
        logger.info("previews are off, as the configuration says")
        return None
    path = config.preview.map or config.model.path / DEFAULT_NAME
    if not path.is_file():
        _refuse_or_warn(path, config)
        return None
    preview_map = quant.load_preview_map(path, config.model.path)
    if preview_map.weight.shape[0] != vae.config.z_dim:
        raise ConfigError(
            f"The preview map {path} is for {preview_map.weight.shape[0]} latent channels, and the "
            f"VAE has {vae.config.z_dim}; {_remedy(path, config)}."
        )
    fps = config.model.fps / vae.config.scale_factor_temporal
    pace = PreviewPace(config.preview.every_steps, config.preview.every_s)
    return LatentPreview(preview_map, device.torch_device, fps, pace)


def _refuse_or_warn(path: Path, config: WorkerConfig) -> None:
    if config.preview.map is not None:
        raise ConfigError(f"There is no preview map {path}; {_remedy(path, config)}.")
    logger.warning(
        "jobs have no previews, because there is no preview map %s; %s", path, _remedy(path, config)
    )


def _remedy(path: Path, config: WorkerConfig) -> str:
    return f"make one with: python -m quant preview-map --model {config.model.path} --out {path}"
