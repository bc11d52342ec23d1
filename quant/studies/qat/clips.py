"""Keep clips for flow matching: the latents of real videos, with their embedded captions.

A folder has `clips.json`, one safetensors file for each clip and one for the negative prompt. It is
made from a folder of videos, whose `captions.txt` has the caption of the i-th video, in the order
of names, in its i-th line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant.calibration.prompts import PromptSet
from quant.errors import StudyError
from quant.studies.evaluation.video_files import Video
from quant.weights.writer import to_bytes, write_whole

FORMAT_VERSION = 1
_INDEX, _NEGATIVE = "clips.json", "negative.safetensors"


@dataclass(frozen=True, slots=True)
class Clip:
    """A video and its caption, as a transformer takes them.

    Attributes:
        latents: normalized, [C, F, H, W] float32.
        text: the embedded caption, [T, D] float32.
    """

    latents: Tensor
    text: Tensor


@dataclass(frozen=True, slots=True)
class ClipsInfo:
    """What clips were made from.

    Attributes:
        model: fingerprint of the model whose VAE and text encoder made them.
        captions: in order; the i-th file holds the i-th clip.
        negative_prompt: what guidance leads away from.
        text_tokens: length that captions are padded to.
        shape: of the latents of each clip, (C, F, H, W).
    """

    model: str
    captions: tuple[str, ...]
    negative_prompt: str
    text_tokens: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClipsFolder:
    """A folder of clips. Create it with `encode_clips` or `open_clips`."""

    path: Path
    info: ClipsInfo

    def clips(self) -> list[Clip]:
        """Read all clips.

        Raises:
            StudyError: a file is missing or damaged.
        """
        files = [self.path / f"{number:05d}.safetensors" for number in range(len(self))]
        return [
            Clip(*(_read(file)[name].float() for name in ("latents", "text"))) for file in files
        ]

    def negative(self) -> Tensor:
        """Read the embedded negative prompt, [T, D] float32.

        Raises:
            StudyError: the file is missing or damaged.
        """
        return _read(self.path / _NEGATIVE)["text"].float()

    def __len__(self) -> int:
        """Return how many clips there are."""
        return len(self.info.captions)

    def check_model(self, fingerprint: str) -> None:
        """Refuse clips of another model's VAE and text encoder.

        Raises:
            StudyError: they are of another model.
        """
        if self.info.model != fingerprint:
            raise StudyError(
                f"{self.path} was made with another model ({self.info.model[:19]}…, not "
                f"{fingerprint[:19]}…): encode the clips with this one"
            )

    def check_apart(self, texts: frozenset[str], what: str) -> None:
        """Refuse captions that are also in what is held out.

        Raises:
            StudyError: names the first shared one.
        """
        shared = [caption for caption in self.info.captions if caption in texts]
        if shared:
            raise StudyError(
                f"{len(shared)} captions of {self.path} are also in {what}, the first being "
                f"{shared[0]!r}: train and test on different ones"
            )


def open_clips(path: Path) -> ClipsFolder:
    """Open a folder of clips.

    Raises:
        StudyError: the folder is not one of clips, or of a newer version.
    """
    try:
        data: dict[str, Any] = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        version = data.pop("format_version")
        captions, shape = tuple(data.pop("captions")), tuple(data.pop("shape"))
        info = ClipsInfo(captions=captions, shape=shape, **data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{path} is not a folder of clips: make one with `python -m quant encode-clips`"
        ) from error
    if version != FORMAT_VERSION:
        raise StudyError(
            f"{path} has version {version!r} of the format; this tool reads {FORMAT_VERSION}"
        )
    return ClipsFolder(path, info)


def video_files(folder: Path, captions: PromptSet) -> list[Path]:
    """Return the videos of a folder in the order of names, one for each caption.

    Raises:
        StudyError: there are more or fewer than captions.
    """
    found = sorted(folder.glob("*.mp4"))
    if len(found) != len(captions.prompts):
        raise StudyError(
            f"{folder} holds {len(found)} videos (*.mp4) and captions.txt {len(captions.prompts)} "
            "captions: give one line for each video, in the order of names"
        )
    return found


@torch.no_grad()
def encode_clips(
    pipe: Any,
    files: list[Path],
    info: ClipsInfo,
    out: Path,
    after_clip: Callable[[], None],
) -> ClipsFolder:
    """Encode videos and captions into a folder that exists and is empty; the index comes last.

    Args:
        pipe: a `WanPipeline`; its VAE encodes in float32.
        info: its `shape` is what the first video gives.

    Raises:
        StudyError: a video cannot be read, or its size or length differs from the first one's or
            does not fit the VAE; or the disk is full.
    """
    pipe.vae.float()
    shape: tuple[int, ...] | None = None
    try:
        write_whole(
            out / _NEGATIVE, to_bytes({"text": _embedded(pipe, info.negative_prompt, info)}, {})
        )
        for number, (file, caption) in enumerate(zip(files, info.captions, strict=True)):
            latents = _latents(pipe.vae, file)
            shape = shape or tuple(latents.shape)
            if tuple(latents.shape) != shape:
                raise StudyError(
                    f"{file} gives latents of {tuple(latents.shape)}, {files[0].name} of {shape}: "
                    "all videos must have one size and length"
                )
            tensors = {"latents": latents.cpu(), "text": _embedded(pipe, caption, info)}
            write_whole(out / f"{number:05d}.safetensors", to_bytes(tensors, {}))
            after_clip()
        assert shape is not None, "there are captions"
        known = ClipsInfo(info.model, info.captions, info.negative_prompt, info.text_tokens, shape)
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(known)}, ensure_ascii=False)
        write_whole(out / _INDEX, f"{text}\n".encode())
    except OSError as error:
        raise StudyError(f"cannot write {out}: {error.strerror or error}") from error
    return ClipsFolder(out, known)


def _latents(vae: Any, file: Path) -> Tensor:
    """Encode a video: normalized latents, [C, F, H, W] float32."""
    frames = Video("", 0, file.with_suffix("")).frames()
    count, height, width, _ = frames.shape
    if count % 4 != 1 or height % 16 or width % 16:
        raise StudyError(
            f"{file} has {count} frames of {width}x{height}: the number of frames must be 4k + 1, "
            "and the sides multiples of 16"
        )
    video = torch.from_numpy(frames.copy()).to(vae.device).permute(3, 0, 1, 2).float() / 127.5 - 1
    mean, std = (
        torch.tensor(values, device=vae.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents: Tensor = (vae.encode(video.unsqueeze(0)).latent_dist.mode()[0] - mean) / std
    return latents.contiguous()


def _embedded(pipe: Any, text: str, info: ClipsInfo) -> Tensor:
    embedded, _ = pipe.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=info.text_tokens
    )
    return embedded[0].cpu().contiguous()  # type: ignore[no-any-return]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise StudyError(
            f"{file} cannot be read: make the folder again with `python -m quant encode-clips`"
        ) from error
    return tensors
