"""A Wan folder with random weights: `python -m benchmarks.fabricate --out FOLDER --size 14b`

Loading, conversion, memory and speed depend on shapes and files, not on what a model has learned.
This writes what `Wan-AI/Wan2.1-T2V-14B-Diffusers` looks like to everything that reads it: UMT5-XXL,
VAE, scheduler, sharded weights, and a tokenizer of UMT5's size.
Only its videos are noise. 28.6 GB of transformer, 11.4 GB of text encoder, 0.5 GB of VAE.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
import typer
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks.fabricated_tokenizer import write_tokenizer
from benchmarks.fabricated_weights import Fabricator, made_ahead
from mini.scenes import Split, captions_of
from quant.calibration.calibrate import CalibrationPlan, load_pipeline, run_calibration
from quant.calibration.prompts import MIN_PROMPTS, PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.scales import save_scales
from quant.recipe.recipe import DEFAULT_RECIPE, QuantRecipe
from quant.transformer.meta_model import without_weights
from quant.weights.fingerprint import model_fingerprint
from quant.weights.writer import spec_of, split_into_shards, write_safetensors

SHARD_BYTES = 5_000_000_000
FABRICATED = "fabricated model, prompts of benchmarks.fabricate"

Size = Literal["mini", "14b"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the parts of one size are built from."""

    transformer: dict[str, int]
    tokens: int
    text_encoder: dict[str, int]
    vae: dict[str, Any]
    calibration_px: int


SHAPES: dict[Size, Shape] = {
    "14b": Shape(
        transformer={
            "num_attention_heads": 40,
            "attention_head_dim": 128,
            "ffn_dim": 13824,
            "text_dim": 4096,
            "freq_dim": 256,
        },
        tokens=256_300,
        text_encoder={
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
        },
        vae={},  # AutoencoderKLWan's own defaults are Wan 2.1's
        calibration_px=256,
    ),
    "mini": Shape(
        transformer={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ffn_dim": 64,
            "text_dim": 32,
            "freq_dim": 32,
        },
        tokens=500,
        text_encoder={
            "vocab_size": 512,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
        },
        vae={"base_dim": 16, "num_res_blocks": 1},
        calibration_px=32,
    ),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How to fabricate: what decides the weights, and what only decides how long it takes."""

    size: Size
    layers: int
    seed: int
    threads: int
    device: torch.device
    shard_bytes: int = SHARD_BYTES


def main(  # noqa: PLR0913, PLR0917 (typer's way: the signature is the command line)
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist yet.")],
    size: Annotated[Size, typer.Option(help="What to imitate.")] = "14b",
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 40,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = len(os.sched_getaffinity(0)),
    device: Annotated[str, typer.Option(help="Where the numbers are drawn.")] = "cpu",
    scales: Annotated[Path | None, typer.Option(help="Calibrate, briefly, into this file.")] = None,
    recipe: Annotated[str, typer.Option(help="What to calibrate for.")] = DEFAULT_RECIPE,
) -> None:
    """Write the folder, and scales that fit it if they are asked for."""
    if out.exists():
        raise typer.BadParameter(f"{out} exists already: remove it first", param_hint="--out")
    started = time.perf_counter()
    written = fabricate(out, Plan(size, layers, seed, threads, torch.device(device)))
    seconds = time.perf_counter() - started
    print(f"wrote {out}: {written:,} bytes of weights in {seconds:.1f} s")
    if scales is not None:
        scales.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        calibrate_briefly(out, size, QuantRecipe.load(recipe), scales, device)
        print(f"wrote {scales} in {time.perf_counter() - started:.1f} s")


def fabricate(out: Path, plan: Plan) -> int:
    """Write a pipeline folder and return the bytes of its weights; half a folder is removed."""
    shape = SHAPES[plan.size]
    with without_weights():
        transformer = WanTransformer3DModel(
            **shape.transformer,
            num_layers=plan.layers,
            in_channels=16,
            out_channels=16,
            patch_size=(1, 2, 2),
        )
        text_encoder = UMT5EncoderModel(UMT5Config(**shape.text_encoder, dtype="bfloat16"))
        vae = AutoencoderKLWan(**shape.vae)
    text_encoder.tie_weights()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each tensor has a thread of its own
    try:
        written = _write_part(out / "transformer", transformer.bfloat16(), plan)
        written += _write_part(out / "text_encoder", text_encoder.bfloat16(), plan)
        written += _write_part(out / "vae", vae, plan)
        _write_rest(out, vae)
        write_tokenizer(out / "tokenizer", shape.tokens, plan.seed)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    return written


def calibrate_briefly(
    folder: Path, size: Size, recipe: QuantRecipe, out: Path, device: str
) -> None:
    """Real scales by the real calibration, from as few and as small forwards as it allows."""
    side = SHAPES[size].calibration_px
    plan = CalibrationPlan(
        model_fingerprint=model_fingerprint(folder),
        recipe=recipe,
        prompts=PromptSet(tuple(captions_of(Split.TRAIN, MIN_PROMPTS)), FABRICATED),
        sampler=SamplerSettings((side, side), 5, 1, 5.0, 512, timestep_groups=1),
    )
    save_scales(run_calibration(load_pipeline(folder, device), plan), out)


def _write_part(folder: Path, module: Any, plan: Plan) -> int:
    """Write one part's configuration and weights, in shards as the libraries name them."""
    folder.mkdir(parents=True)
    is_text_encoder = isinstance(module, UMT5EncoderModel)
    if is_text_encoder:
        module.config.architectures = ["UMT5EncoderModel"]
        module.config.save_pretrained(folder)
    else:
        module.save_config(folder)
    stem = "model" if is_text_encoder else "diffusion_pytorch_model"
    maker = Fabricator(folder.name, plan.seed, plan.layers, plan.device)
    # A parameter under two names is stored under the first.
    specs = [spec_of(name, parameter) for name, parameter in module.named_parameters()]
    # As the safetensors library orders a file, which neighbours in one depend on.
    shards = [
        sorted(shard, key=lambda spec: (-spec[1].itemsize, spec[0]))
        for shard in split_into_shards(specs, plan.shard_bytes)
    ]
    metadata = {"format": "pt", "fabricated": f"seed {plan.seed}, benchmarks.fabricate"}
    places: dict[str, str] = {}
    with made_ahead([spec for shard in shards for spec in shard], maker.make, plan.threads) as give:
        for number, shard in enumerate(shards, 1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = folder / f"{stem}{suffix}.safetensors"
            write_safetensors(file, shard, metadata, give, sync=False)
            places |= {name: file.name for name, _, _ in shard}
    total: int = sum(parameter.nbytes for parameter in module.parameters())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
    return total


def _write_rest(out: Path, vae: AutoencoderKLWan) -> None:
    """Scheduler, and the index that names all parts."""
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_config(out / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", type(vae).__name__],
    }
    _write_json(out / "model_index.json", index)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
