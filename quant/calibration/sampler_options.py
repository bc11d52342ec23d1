"""Define the options by which commands that sample are told how, and turn them into settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quant.calibration.sampler import SamplerSettings, resolve_sampler
from quant.calibration.service_config import read_service_config
from quant.console import parse_size
from quant.weights.fingerprint import read_transformer_config

Config = Annotated[
    Path | None,
    typer.Option(
        help="A worker's configuration: sample as its service does by default, with its negative "
        "prompt and flow shift. Options given beside it hold instead of its values."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps per prompt.")]
Size = Annotated[str | None, typer.Option(help="Width x height, like 832x480.")]
Frames = Annotated[int | None, typer.Option(help="Frames per video, 4k + 1.")]
GuidanceScale = Annotated[float | None, typer.Option(help="1 turns guidance off.")]
TextTokens = Annotated[int | None, typer.Option(help="Length prompts are padded to.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first prompt.")]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What guidance leads away from; by default nothing.")
]
FlowShift = Annotated[
    float | None, typer.Option(help="Of the noise schedule; by default the model's own.")
]


def sampler_of(
    model: Path,
    config: Path | None,
    *,
    size: str | None,
    **given: Any,
) -> SamplerSettings:
    """Return the settings to sample a model with: options, then the service's, then the model's.

    Args:
        config: a worker's configuration file, if one was given.
        size: such as 832x480.
        given: other settings of `SamplerSettings` by name; None for those that were not given.

    Raises:
        CalibrationError: a value is out of bounds, an unknown model needs more options, or the
            configuration cannot be read.
        QuantError: the model's configuration cannot be read.
        typer.BadParameter: the size is not of its form.
    """
    chosen = parse_size(size)
    service = {} if config is None else read_service_config(config).settings(chosen)
    options = {name: value for name, value in given.items() if value is not None}
    if chosen is not None:
        options["size"] = chosen
    return resolve_sampler(read_transformer_config(model), service | options)
