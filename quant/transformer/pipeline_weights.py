"""Check the weights of a whole pipeline against its configurations, before they are loaded.

The libraries load what fits by name and fill the rest with random numbers, with a warning at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from quant.errors import WeightsError
from quant.transformer.meta_model import check_stored, shared_meta_model, without_weights
from quant.weights.fingerprint import read_transformer_config
from quant.weights.model_folder import read_object
from quant.weights.weight_files import stored_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel


def empty_encoder_and_vae(folder: Path) -> tuple[UMT5EncoderModel, AutoencoderKLWan]:
    """Build the text encoder and VAE of a pipeline on the meta device.

    Whatever the configuration says of tied embeddings: a text encoder has one, under two names.

    Raises:
        WeightsError: a configuration cannot be read, or describes none.
    """
    # Both take seconds to import, so they are imported only when a model is really built.
    from diffusers import AutoencoderKLWan  # noqa: PLC0415
    from transformers import UMT5Config, UMT5EncoderModel  # noqa: PLC0415

    with without_weights():
        with _described(folder / "text_encoder" / "config.json") as values:
            text_encoder = UMT5EncoderModel(UMT5Config.from_dict(values))
            text_encoder.set_input_embeddings(text_encoder.shared)
        with _described(folder / "vae" / "config.json") as values:
            vae = AutoencoderKLWan.from_config(values)
    return text_encoder, vae


@contextmanager
def _described(file: Path) -> Iterator[dict[str, Any]]:
    """Read a configuration, and name its file if no model can be built from it in the block."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415 (as above)

    values = read_object(file)
    try:
        yield values
    except (
        *(TypeError, ValueError, LookupError, RuntimeError, AttributeError, ArithmeticError),
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise WeightsError(
            f"no model can be built from {file}: {reason}; take the config.json that came with "
            "the weights"
        ) from error


def check_pipeline_weights(folder: Path) -> None:
    """Check that transformer, text encoder and VAE have exactly the tensors they need.

    Raises:
        WeightsError: names the tensor that is missing, has no place or has a wrong shape or dtype.
        QuantError: a configuration cannot be read.
    """
    encoder, vae = empty_encoder_and_vae(folder)
    parts: dict[str, nn.Module] = {
        "transformer": shared_meta_model(read_transformer_config(folder)),
        "text_encoder": encoder,
        "vae": vae,
    }
    for name, module in parts.items():
        required = module.state_dict(keep_vars=True)
        check_stored(
            required, stored_weights(folder / name), source=str(folder / name), exact=False
        )
