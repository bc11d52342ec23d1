"""Export the public names of the HiFloat8 quantization toolkit for Wan transformers.

A worker loads a recipe and its scales with `QuantRecipe.load` and `load_scales`, and compares the
scales with the model by `check_scales` and `model_fingerprint(folder)`. It then builds a quantized
tree with `quantize_transformer`, or with `load_packed` from a packed checkpoint, and puts the tree
on the kernels of its device with `fuse_quantized`. `apply_attention` lets the recipe's attention
change by the step, which `denoising_run` counts. The toolkit's own commands and the tests may
import the modules below this one directly.
"""

from quant.calibration.calibrate import CalibrationPlan, run_calibration
from quant.calibration.preview_map import PreviewMap, load_preview_map
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.scales import Scales, check_scales, load_scales, save_scales
from quant.errors import (
    CalibrationError,
    ConversionError,
    PackedMismatch,
    PreviewMapError,
    QuantError,
    RecipeError,
    ScalesError,
    ScalesMismatch,
    StudyError,
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
    load_packed_shared,
    open_packed,
)
from quant.recipe.recipe import QuantRecipe
from quant.transformer.attention.apply import apply_attention
from quant.transformer.attention.sparse import sparse_attention_of
from quant.transformer.attention.steps import attention_steps_of, denoising_run
from quant.transformer.conversion_report import ConversionReport, ConvertedLinear, weight_bytes
from quant.transformer.fuse import attention_scales, fuse_quantized, share_fused
from quant.transformer.lora.merge import LoraSet, read_loras
from quant.transformer.lora.source import LoraSource
from quant.transformer.quantize import quantize_transformer
from quant.transformer.weight_storage import WeightStorage, decode_weights, reads_decoded
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
    "LoraSet",
    "LoraSource",
    "PackedCheckpoint",
    "PackedMismatch",
    "PreviewMap",
    "PreviewMapError",
    "PromptSet",
    "QuantError",
    "QuantRecipe",
    "Reader",
    "RecipeError",
    "SamplerSettings",
    "Scales",
    "ScalesError",
    "ScalesMismatch",
    "StudyError",
    "TensorReader",
    "WeightStorage",
    "WeightsError",
    "apply_attention",
    "attention_scales",
    "attention_steps_of",
    "check_packed",
    "check_scales",
    "convert",
    "decode_weights",
    "denoising_run",
    "fuse_quantized",
    "has_transformer_weights",
    "load_packed",
    "load_packed_base",
    "load_packed_shared",
    "load_preview_map",
    "load_scales",
    "model_fingerprint",
    "open_packed",
    "parts_fingerprint",
    "quantize_transformer",
    "read_loras",
    "reads_decoded",
    "run_calibration",
    "save_scales",
    "share_fused",
    "sparse_attention_of",
    "sqnr_db",
    "weight_bytes",
]
