"""Build a Wan pipeline of the real classes with four blocks that runs in milliseconds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from mini.architecture import TEXT_WIDTH, build_text_encoder, build_tokenizer, build_vae
from quant.calibration.calibrate import CalibrationPlan, run_calibration
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.sampling import load_pipeline
from quant.calibration.scales import Scales
from quant.recipe.recipe import QuantRecipe
from quant.weights.fingerprint import model_fingerprint

PROMPTS = tuple(f"a {colour} {shape}" for colour in ("red", "blue") for shape in "abcde")
BLOCKS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, because these tensors are too small to split over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_tiny_transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=BLOCKS,
    ).to(torch.bfloat16)


@pytest.fixture
def tiny_transformer() -> WanTransformer3DModel:
    return build_tiny_transformer().eval()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved pipeline."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def save_tiny_model(folder: Path) -> Path:
    """Save a pipeline into a new folder, and return it."""
    torch.manual_seed(1)
    WanPipeline(
        tokenizer=build_tokenizer(PROMPTS),
        text_encoder=build_text_encoder().to(torch.bfloat16),
        transformer=build_tiny_transformer(),
        vae=build_vae().to(torch.bfloat16),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipe(tiny_model: Path) -> WanPipeline:
    return load_pipeline(tiny_model, "cpu")


def tiny_recipe_dict() -> dict[str, object]:
    """Return the default recipe for four blocks, of which the outer two are protected."""
    data = QuantRecipe.load("boundary-hif8").to_dict()
    return data | {"name": "tiny", "total_blocks": BLOCKS, "protected_blocks": [0, BLOCKS - 1]}


@pytest.fixture
def recipe_dict() -> dict[str, object]:
    return tiny_recipe_dict()


@pytest.fixture(scope="session")
def tiny_recipe() -> QuantRecipe:
    return QuantRecipe.from_dict(tiny_recipe_dict())


@pytest.fixture(scope="session")
def tiny_plan(tiny_model: Path, tiny_recipe: QuantRecipe) -> CalibrationPlan:
    return CalibrationPlan(
        model_fingerprint=model_fingerprint(tiny_model),
        recipe=tiny_recipe,
        prompts=PromptSet(PROMPTS, "prompts.txt"),
        sampler=SamplerSettings((32, 32), 5, 4, 3.0, 16, timestep_groups=2),
    )


@pytest.fixture(scope="session")
def tiny_scales(tiny_pipe: WanPipeline, tiny_plan: CalibrationPlan) -> Scales:
    return run_calibration(tiny_pipe, tiny_plan)


@pytest.fixture(scope="session")
def fp8_recipe() -> QuantRecipe:
    return QuantRecipe.from_dict(tiny_recipe_dict() | {"name": "tiny-fp8", "attention": "fp8"})


@pytest.fixture(scope="session")
def fp8_scales(
    tiny_pipe: WanPipeline, tiny_plan: CalibrationPlan, fp8_recipe: QuantRecipe
) -> Scales:
    return run_calibration(tiny_pipe, replace(tiny_plan, recipe=fp8_recipe))
