"""HiFloat8 quantization of Wan transformers: the toolkit's public names.

A worker needs four steps: `QuantRecipe.load`, `load_scales`, `check_scales` against
`model_fingerprint(folder)`, and `prepare_transformer` with the kernels of its device; without such,
`quantize_transformer`. Modules below this one may be used directly by the toolkit's own commands
and tests.
"""

from quant.calibration.calibrate import CalibrationPlan, run_calibration
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.scales import Scales, check_scales, load_scales, save_scales
from quant.errors import (
    CalibrationError,
    ConversionError,
    PackedMismatch,
    QuantError,
    RecipeError,
    ScalesError,
    ScalesMismatch,
    WeightsError,
)
from quant.numerics.linear import Hif8Linear
from quant.numerics.metrics import sqnr_db
from quant.packed.convert import convert
from quant.packed.load import (
    PackedCheckpoint,
    check_packed,
    load_packed,
    load_packed_base,
    load_packed_beside,
    open_packed,
)
from quant.recipe.recipe import QuantRecipe
from quant.transformer.conversion_report import ConversionReport, ConvertedLinear, weight_bytes
from quant.transformer.fuse import (
    PreparedTransformer,
    attention_scales,
    fuse_quantized,
    prepare_transformer,
)
from quant.transformer.quantize import quantize_transformer
from quant.weights.fingerprint import has_transformer_weights, model_fingerprint, parts_fingerprint
from quant.weights.reader import BackgroundReader, Reader, TensorReader

__all__ = [
    "BackgroundReader",
    "CalibrationError",
    "CalibrationPlan",
    "ConversionError",
    "ConversionReport",
    "ConvertedLinear",
    "Hif8Linear",
    "PackedCheckpoint",
    "PackedMismatch",
    "PreparedTransformer",
    "PromptSet",
    "QuantError",
    "QuantRecipe",
    "Reader",
    "RecipeError",
    "SamplerSettings",
    "Scales",
    "ScalesError",
    "ScalesMismatch",
    "TensorReader",
    "WeightsError",
    "attention_scales",
    "check_packed",
    "check_scales",
    "convert",
    "fuse_quantized",
    "has_transformer_weights",
    "load_packed",
    "load_packed_base",
    "load_packed_beside",
    "load_scales",
    "model_fingerprint",
    "open_packed",
    "parts_fingerprint",
    "prepare_transformer",
    "quantize_transformer",
    "run_calibration",
    "save_scales",
    "sqnr_db",
    "weight_bytes",
]
