"""HiFloat8 quantization of Wan transformers: the toolkit's public names.

A worker needs four steps: `QuantRecipe.load`, `load_scales`, `check_scales` against
`model_fingerprint(folder)`, and `prepare_transformer` with the kernels of its device; without such,
`quantize_transformer`. Modules below this one may be used directly by the toolkit's own commands
and tests.
"""

from quant.apply import quantize_transformer
from quant.calibrate import CalibrationPlan, run_calibration
from quant.errors import (
    CalibrationError,
    ConversionError,
    QuantError,
    RecipeError,
    ScalesError,
    ScalesMismatch,
)
from quant.fingerprint import model_fingerprint
from quant.linear import Hif8Linear
from quant.metrics import sqnr_db
from quant.prepare import (
    PreparedTransformer,
    attention_scales,
    fuse_quantized,
    prepare_transformer,
)
from quant.prompts import PromptSet
from quant.recipe import QuantRecipe
from quant.report import ConversionReport, ConvertedLinear, weight_bytes
from quant.sampler import SamplerSettings
from quant.scales import Scales, check_scales, load_scales, save_scales

__all__ = [
    "CalibrationError",
    "CalibrationPlan",
    "ConversionError",
    "ConversionReport",
    "ConvertedLinear",
    "Hif8Linear",
    "PreparedTransformer",
    "PromptSet",
    "QuantError",
    "QuantRecipe",
    "RecipeError",
    "SamplerSettings",
    "Scales",
    "ScalesError",
    "ScalesMismatch",
    "attention_scales",
    "check_scales",
    "fuse_quantized",
    "load_scales",
    "model_fingerprint",
    "prepare_transformer",
    "quantize_transformer",
    "run_calibration",
    "save_scales",
    "sqnr_db",
    "weight_bytes",
]
