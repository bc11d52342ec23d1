"""Define `python -m quant encode-clips`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quant.calibration import sampler_options as options
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings, default_sampler
from quant.calibration.sampling import check_prompt_lengths, load_pipeline, load_tokenizer
from quant.console import errors_as_sentences, progress_bar
from quant.studies.commands.options import Device, Model
from quant.studies.qat.clips import ClipsInfo, encode_clips, video_files
from quant.weights.fingerprint import model_fingerprint, read_transformer_config
from quant.weights.model_folder import check_model_kind
from quant.weights.new_folder import check_new_folder, new_folder


def encode_clips_command(
    model: Model,
    videos: Annotated[
        Path, typer.Option(help="Folder of MP4 files of one size, and captions.txt.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    text_tokens: options.TextTokens = None,
    negative_prompt: options.NegativePrompt = None,
    device: Device = "cpu",
) -> None:
    """Encode VIDEOS and their captions with MODEL's VAE and text encoder, to train on by `qat`.

    The i-th line of captions.txt is the caption of the i-th video, in the order of names. A video
    has 4k + 1 frames, and sides that are multiples of 16.
    """
    with errors_as_sentences():
        check_new_folder(out)
        check_model_kind(model)
        sampler = _sampler(model, text_tokens, negative_prompt or "")
        captions = PromptSet.read(videos / "captions.txt")
        files = video_files(videos, captions)
        check_prompt_lengths(load_tokenizer(model), captions.prompts, sampler)
        info = ClipsInfo(
            model_fingerprint(model),
            captions.prompts,
            sampler.negative_prompt,
            sampler.text_tokens,
            (),
        )
        pipe = load_pipeline(model, device)
        with new_folder(out) as folder, progress_bar(len(files), "clip") as bar:
            made = encode_clips(pipe, files, info, folder, lambda: bar.update(1) and None)
    typer.echo(f"wrote {out}: {len(made)} clips with latents of {json.dumps(made.info.shape)}")


def _sampler(model: Path, text_tokens: int | None, negative_prompt: str) -> SamplerSettings:
    """Return settings of which only those of the text are used."""
    if text_tokens is None:
        text_tokens = default_sampler(read_transformer_config(model)).text_tokens
    return SamplerSettings((16, 16), 1, 4, 1.0, text_tokens, negative_prompt)
