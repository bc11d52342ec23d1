"""Check the weights of a whole pipeline against its configurations, before they are loaded.

The libraries load what fits by name and fill the rest with random numbers, with a warning at most.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415
    from transformers import UMT5Config, UMT5EncoderModel  # noqa: PLC0415

    encoder, vae = (read_object(folder / part / "config.json") for part in ("text_encoder", "vae"))
    try:
        with without_weights():
            text_encoder = UMT5EncoderModel(UMT5Config.from_dict(encoder))
            text_encoder.set_input_embeddings(text_encoder.shared)
            return text_encoder, AutoencoderKLWan.from_config(vae)
    except (
        *(TypeError, ValueError, LookupError, RuntimeError, AttributeError, ArithmeticError),
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise WeightsError(
            f"the configurations of text encoder and VAE in {folder} describe none: {reason}; "
            "take those that came with the weights"
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
