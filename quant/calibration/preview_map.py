"""Fit, write and read the map from a VAE's latents to small RGB pictures.

While a job denoises, a worker shows what the model predicts so far. The VAE would take longer than
a step; a linear map of the latent channels takes next to nothing, and is close for these VAEs: each
position of the latents becomes a few pixels of a picture that is smaller than the video. The map is
fitted by least squares on latents that the model itself has made, and their decoded videos. The
first frame of the latents stands for one frame of the video, later ones for four, and these VAEs
decode the second without the features of the one before. So each of these two has a map of its own.

The file is JSON, next to the scales. It names the VAE that the map is for by a fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from quant.errors import PreviewMapError
from quant.weights.fingerprint import vae_fingerprint
from quant.weights.writer import write_whole

FORMAT: Final = 2
READ_FORMATS: Final = (1, 2)
"""Format 1 has one map for all frames."""

LEADING: Final = 2
"""So many frames at the start of the latents have maps of their own."""

DEFAULT_NAME: Final = Path("scales") / "preview-map.json"
"""Where a worker looks for the map in a model's folder."""

PIXELS: Final = 2
"""The pixels of a picture, by side, that one position of the latents becomes."""

HELD_OUT_SHARE: Final = 3
"""One of so many videos is not fitted on, but measures the error."""

MIN_VIDEOS: Final = 6

_LEADING_NAMES: Final = ("first", "second")


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """A linear map from normalized latents, as a transformer has them, to RGB from 0 to 1.

    Attributes:
        vae_fingerprint: of the VAE (`quant.weights.fingerprint`).
        weight: [C, pixels * pixels * 3] float32; columns are rows, columns and colours of pixels.
        bias: [pixels * pixels * 3] float32.
        videos: how many videos it was fitted on.
        r2: the share of the variance of held-out videos' pixels that it explains.
        rms_error: the root mean square error on them, of 255.
        leading: weight and bias of each frame at the start that does not have those of the others.
    """

    vae_fingerprint: str
    pixels: int
    weight: Tensor
    bias: Tensor
    videos: int
    r2: float
    rms_error: float
    leading: tuple[tuple[Tensor, Tensor], ...] = ()

    def pictures(self, latents: Tensor) -> Tensor:
        """Turn latents [C, F, H, W] into pictures [F, pixels * H, pixels * W, 3], from 0 to 1."""
        channels, frames, height, width = latents.shape
        flat = latents.reshape(channels, -1).T.to(self.weight.dtype)
        mapped = torch.addmm(self.bias, flat, self.weight)
        area = height * width
        for frame, (weight, bias) in enumerate(self.leading[:frames]):
            own = slice(frame * area, (frame + 1) * area)
            mapped[own] = torch.addmm(bias, flat[own], weight)
        mapped = mapped.clamp(0, 1)
        side = self.pixels
        grid = mapped.view(frames, height, width, side, side, 3).permute(0, 1, 3, 2, 4, 5)
        return grid.reshape(frames, height * side, width * side, 3)

    def to(self, device: torch.device) -> PreviewMap:
        """Return the map on a device."""
        return PreviewMap(
            self.vae_fingerprint,
            self.pixels,
            self.weight.to(device),
            self.bias.to(device),
            self.videos,
            self.r2,
            self.rms_error,
            tuple((weight.to(device), bias.to(device)) for weight, bias in self.leading),
        )


@torch.no_grad()
def fit_preview_map(
    vae: Any, latents: Sequence[Tensor], fingerprint: str, pixels: int = PIXELS
) -> PreviewMap:
    """Fit a map on latents and what the VAE makes of them; every third video is held out.

    Args:
        vae: an `AutoencoderKLWan`, best in float32.
        latents: normalized latents of videos, [1, C, F, H, W] each.
        fingerprint: the VAE's.

    Raises:
        PreviewMapError: the videos are too few, or hold values that are not finite.
    """
    if len(latents) < MIN_VIDEOS:
        raise PreviewMapError(
            f"{len(latents)} videos are too few to fit a preview map and measure its error: make "
            f"at least {MIN_VIDEOS}"
        )
    pairs = [_pairs(vae, each.to(vae.device, vae.dtype), pixels) for each in latents]
    held_out = pairs[HELD_OUT_SHARE - 1 :: HELD_OUT_SHARE]
    fitted = [pair for index, pair in enumerate(pairs, start=1) if index % HELD_OUT_SHARE]
    if not all(part.isfinite().all() for pair in pairs for part in pair):
        raise PreviewMapError(
            "the model makes latents or videos with NaN or infinity, to which no map can be "
            "fitted: check the model's weights"
        )
    most = max(len(inputs) for inputs, _ in fitted)
    leading = [_solved(fitted, frame, frame + 1) for frame in range(min(LEADING, most))]
    weight, bias = _solved(fitted, LEADING, most) if most > LEADING else leading[-1]
    errors, values = [], []
    for inputs, targets in held_out:
        maps = [*leading, *[(weight, bias)] * len(inputs)][: len(inputs)]
        mapped = torch.stack(
            [each @ own[0] + own[1] for each, own in zip(inputs, maps, strict=True)]
        )
        errors.append((mapped.clamp(0, 1) - targets).flatten(0, 1))
        values.append(targets.flatten(0, 1))
    squared = torch.cat(errors).square().mean()
    variance = (torch.cat(values) - torch.cat(values).mean(0)).square().mean()
    return PreviewMap(
        vae_fingerprint=fingerprint,
        pixels=pixels,
        weight=weight.float(),
        bias=bias.float(),
        videos=len(fitted),
        r2=float(1 - squared / variance),
        rms_error=float(255 * squared.sqrt()),
        leading=tuple((own[0].float(), own[1].float()) for own in leading),
    )


def _solved(pairs: Sequence[tuple[Tensor, Tensor]], start: int, end: int) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the least squares over some frames of what `_pairs` returns."""
    inputs, targets = (
        torch.cat([each[start:end].flatten(0, 1) for each in part])
        for part in zip(*pairs, strict=True)
    )
    ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    solution = torch.linalg.lstsq(torch.cat([inputs, ones], 1), targets, driver="gelsd").solution
    return solution[:-1], solution[-1]


def shrunk(video: Tensor, latent_shape: torch.Size, pixels: int) -> Tensor:
    """Scale a video [1, 3, T, H, W] to the pictures that a map should give of its latents.

    Each is the mean of the frames that its latent frame stands for, and each pixel of an area.

    Args:
        latent_shape: [1, C, F, h, w].
    """
    _, _, count, height, width = latent_shape
    first, rest = video[:, :, :1], video[:, :, 1:]
    if count > 1:
        stride = rest.shape[2] // (count - 1)
        rest = functional.avg_pool3d(rest, (stride, 1, 1))
    frames = torch.cat([first, rest], 2)[0].transpose(0, 1)  # [F, 3, H, W]
    return functional.adaptive_avg_pool2d(frames, (height * pixels, width * pixels))


def save_preview_map(preview_map: PreviewMap, path: Path) -> None:
    """Write a map atomically.

    Raises:
        PreviewMapError: the folder does not exist or cannot be written.
    """
    values = {
        "format": FORMAT,
        "vae_fingerprint": preview_map.vae_fingerprint,
        "pixels": preview_map.pixels,
        "videos": preview_map.videos,
        "r2": round(preview_map.r2, 4),
        "rms_error": round(preview_map.rms_error, 2),
        "bias": _rounded(preview_map.bias),
        "weight": [_rounded(row) for row in preview_map.weight],
    }
    for name, (weight, bias) in zip(_LEADING_NAMES, preview_map.leading, strict=False):
        values[f"{name}_bias"] = _rounded(bias)
        values[f"{name}_weight"] = [_rounded(row) for row in weight]
    lines = (f"  {json.dumps(name)}: {_json(value)}" for name, value in values.items())
    try:
        write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    except OSError as error:
        raise PreviewMapError(f"cannot write {path}: {error.strerror or error}") from error


def load_preview_map(path: Path, model_folder: Path) -> PreviewMap:
    """Read a map, and check that it is for the VAE of a model.

    Raises:
        PreviewMapError: there is no such file, it is not a preview map, or it is another VAE's.
    """
    command = f"python -m quant preview-map --model {model_folder} --out {path}"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] not in READ_FORMATS:
            raise PreviewMapError(
                f"{path} has preview map format {values['format']}, this tool reads "
                f"{' and '.join(map(str, READ_FORMATS))}; make a fitting one with: {command}"
            )
        found = PreviewMap(
            vae_fingerprint=str(values["vae_fingerprint"]),
            pixels=int(values["pixels"]),
            weight=_tensor(values["weight"]),
            bias=_tensor(values["bias"]),
            videos=int(values["videos"]),
            r2=float(values["r2"]),
            rms_error=float(values["rms_error"]),
            leading=tuple(
                (_tensor(values[f"{name}_weight"]), _tensor(values[f"{name}_bias"]))
                for name in _LEADING_NAMES
                if f"{name}_weight" in values
            ),
        )
        _check_shapes(found)
    except FileNotFoundError:
        raise PreviewMapError(f"there is no preview map {path}; make one with: {command}") from None
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise PreviewMapError(f"{path} is not a preview map: {error!r}") from error
    expected = vae_fingerprint(model_folder)
    if found.vae_fingerprint != expected:
        raise PreviewMapError(
            f"{path} was fitted to the VAE {found.vae_fingerprint}, and the VAE of {model_folder} "
            f"is {expected}; make a fitting one with: {command}"
        )
    return found


def _pairs(vae: Any, latents: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Return latents [F, N, C] and the pixels [F, N, pixels * pixels * 3] they stand for."""
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(shape)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode(latents * std + mean).sample.clamp(-1, 1) / 2 + 0.5
    pictures = shrunk(video.float(), latents.shape, pixels)
    _, _, count, height, width = latents.shape
    grid = pictures.reshape(count, 3, height, pixels, width, pixels).permute(0, 2, 4, 3, 5, 1)
    inputs = latents[0].flatten(2).permute(1, 2, 0)
    return inputs.double().cpu(), grid.reshape(count, height * width, -1).double().cpu()


def _check_shapes(preview_map: PreviewMap) -> None:
    outputs = 3 * preview_map.pixels**2
    maps = [(preview_map.weight, preview_map.bias), *preview_map.leading]
    for weight, bias in maps:
        if weight.ndim != 2 or weight.shape[1] != outputs or tuple(bias.shape) != (outputs,):
            raise ValueError(
                f"weight {list(weight.shape)} and bias {list(bias.shape)} are not those of "
                f"{preview_map.pixels} x {preview_map.pixels} pixels"
            )
        if weight.shape != preview_map.weight.shape:
            raise ValueError("a map of one frame is for another number of channels")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError("it holds NaN or infinity")


def _tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _rounded(row: Tensor) -> list[float]:
    return [round(each, 6) for each in row.tolist()]


def _json(value: object) -> str:
    """Write a list of lists with a line for each, so that people can read and compare maps."""
    if isinstance(value, list) and isinstance(value[0], list):
        return "[\n    " + ",\n    ".join(json.dumps(row) for row in value) + "\n  ]"
    return json.dumps(value)
