"""Run the toolkit's commands: each parses its arguments, calls the library and prints."""

from __future__ import annotations

import os
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import Tensor

from quant.calibration import sampler_options as options
from quant.calibration.calibrate import CalibrationPlan, run_calibration
from quant.calibration.checkpoint import Checkpoint
from quant.calibration.convergence import check_convergence, parse_share
from quant.calibration.preview_map import (
    DEFAULT_NAME,
    MIN_VIDEOS,
    PreviewMap,
    fit_preview_map,
    save_preview_map,
)
from quant.calibration.progress import CalibrationProgress
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler_options import sampler_of
from quant.calibration.sampling import (
    check_prompt_lengths,
    load_pipeline,
    load_tokenizer,
    make_latents,
)
from quant.calibration.scales import (
    Scales,
    check_replaceable,
    check_scales,
    load_scales,
    save_scales,
)
from quant.calibration.summary import convergence_of, describe_scales
from quant.console import errors_as_sentences, resumable
from quant.device import usable_device
from quant.errors import PreviewMapError, QuantError, ScalesError
from quant.numerics.code_table import codes_markdown
from quant.packed.convert import convert
from quant.recipe.recipe import DEFAULT_RECIPE, QuantRecipe
from quant.recipe.selection import select_linears
from quant.studies import cli as studies
from quant.studies.protection.proposal import resolve_recipe
from quant.transformer.import_original import import_original
from quant.transformer.lora.merge import read_loras
from quant.transformer.lora.source import Loras, LoraSource
from quant.transformer.meta_model import shared_meta_model
from quant.transformer.pipeline_weights import check_pipeline_weights
from quant.transformer.weight_scales import scales_of_weights
from quant.weights.fingerprint import (
    model_fingerprint,
    read_transformer_config,
    vae_fingerprint,
)
from quant.weights.model_folder import check_model_kind

app = typer.Typer(
    help="Quantize Wan transformers to HiFloat8.", no_args_is_help=True, add_completion=False
)

studies.register(app)

Folder = Annotated[Path, typer.Option(help="Pipeline folder in diffusers format.")]
_MAP_VIDEOS = 24
"""How many videos a preview map is fitted on and tried with, by default."""


@app.command("calibrate")
def calibrate_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Folder,
    out: Annotated[Path, typer.Option(help="Scales file to write.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt per line, UTF-8; an INT8 recipe needs none."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name or file.")] = DEFAULT_RECIPE,
    analysis: Annotated[
        Path | None,
        typer.Option(help="Folder of `analyze`, for a recipe with protect = 'auto'."),
    ] = None,
    config: options.Config = None,
    steps: options.Steps = None,
    size: options.Size = None,
    frames: options.Frames = None,
    guidance_scale: options.GuidanceScale = None,
    text_tokens: options.TextTokens = None,
    negative_prompt: options.NegativePrompt = None,
    flow_shift: options.FlowShift = None,
    seed: options.Seed = None,
    lora: Loras = [],  # noqa: B006
    until: Annotated[
        str | None,
        typer.Option(help="End once this share of the scales has settled, like 99%."),
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(help="Use only so many of the prompts, the first ones.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda", "npu"], typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Run MODEL over PROMPTS in BF16 and write the scales of RECIPE to OUT.

    Size, frames, steps and text tokens default to what the model was trained for, or, with CONFIG,
    to what its service uses. After Ctrl-C or a fault the same command goes on with the first prompt
    that was not finished. A preview map is written as well, unless one is beside OUT or in MODEL.

    A recipe without static scales of activations, such as boundary-int8, needs no PROMPTS. Without
    them nothing is run: its scales come from the weights. A recipe with protect = "auto", such as
    auto-hif8, protects what ANALYSIS proposes; OUT keeps its evidence, and `inspect` shows it.
    Scales of a mode with LoRAs need the same --lora here, in the same order.
    """
    with errors_as_sentences():
        _check_out(out, ScalesError)
        checkpoint = Checkpoint.beside(out)
        check_model_kind(model)
        loras = read_loras(model, map(LoraSource.parse, lora))
        fingerprint = loras.fingerprint(model_fingerprint(model))
        loaded, evidence = resolve_recipe(QuantRecipe.load(recipe), analysis, out, fingerprint)
        check_replaceable(out, fingerprint, loaded)
        if prompts is None:
            found = scales_of_weights(model, loaded, usable_device(device), loras=loras)
            save_scales(replace(found, protection=evidence), out)
            typer.echo(f"wrote {out}: the scales of the weights, no prompts were needed")
            return
        sampler = sampler_of(
            model,
            config,
            size=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            text_tokens=text_tokens,
            negative_prompt=negative_prompt,
            flow_shift=flow_shift,
            seed=seed,
        )
        plan = CalibrationPlan(
            model_fingerprint=fingerprint,
            recipe=loaded,
            prompts=PromptSet.read(prompts),
            sampler=sampler,
            until=parse_share(until),
        )
        if max_prompts is not None:
            plan = replace(plan, prompts=plan.prompts.first(max_prompts))
        _check_before_loading(model, plan)
        check_pipeline_weights(model)
        pipe = load_pipeline(model, device)
        loras.merge(pipe.transformer)
        latents: deque[Tensor] = deque(maxlen=_MAP_VIDEOS)
        scales = _calibrate(pipe, plan, checkpoint, latents)
        save_scales(replace(scales, protection=evidence), out)
        checkpoint.delete()
        _fit_beside(out, model, pipe, latents)
    typer.echo(f"wrote {out}: {len(scales.linears)} linears, {scales.num_prompts} prompts")
    if plan.until is not None:
        _print_convergence(scales, plan.until)


@app.command("preview-map")
def preview_map_command(  # noqa: PLR0913, PLR0917 (as above)
    model: Folder,
    out: Annotated[
        Path | None, typer.Option(help="File to write, by default scales/preview-map.json in it.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt per line; by default calibration-prompts.txt in it."),
    ] = None,
    videos: Annotated[
        int, typer.Option(min=MIN_VIDEOS, help="How many of the prompts to make videos of.")
    ] = _MAP_VIDEOS,
    config: options.Config = None,
    steps: options.Steps = None,
    size: options.Size = None,
    frames: options.Frames = None,
    text_tokens: options.TextTokens = None,
    negative_prompt: options.NegativePrompt = None,
    flow_shift: options.FlowShift = None,
    device: Annotated[Literal["cpu", "cuda", "npu"], typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Fit the map by which a worker shows previews: from latents of MODEL's VAE to pictures.

    MODEL makes videos of PROMPTS in BF16. The map is fitted on two thirds of them; the others say
    how close it comes to what the VAE decodes.
    """
    out = out or model / DEFAULT_NAME
    with errors_as_sentences():
        _check_out(out, PreviewMapError)
        check_model_kind(model)
        fingerprint = vae_fingerprint(model)
        sampler = sampler_of(
            model,
            config,
            size=size,
            num_frames=frames,
            num_inference_steps=steps,
            text_tokens=text_tokens,
            negative_prompt=negative_prompt,
            flow_shift=flow_shift,
        )
        prompt_set = PromptSet.read(prompts or model / "calibration-prompts.txt")
        check_prompt_lengths(load_tokenizer(model), prompt_set.prompts[:videos], sampler)
        check_pipeline_weights(model)
        pipe = load_pipeline(model, device)
        latents = make_latents(pipe, prompt_set, sampler, videos, _print_steps)
        fitted = fit_preview_map(pipe.vae.float(), latents, fingerprint)
        save_preview_map(fitted, out)
    _print_map(out, fitted)


@app.command("convert")
def convert_command(
    model: Folder,
    scales: Annotated[Path, typer.Option(help="Scales file made for MODEL and RECIPE.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist yet.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name or file.")] = DEFAULT_RECIPE,
    lora: Loras = [],  # noqa: B006
    device: Annotated[
        Literal["cpu", "cuda", "npu"], typer.Option(help="Where to quantize.")
    ] = "cpu",
) -> None:
    """Pack MODEL's transformer, quantized by RECIPE, into OUT, which a worker loads as it is."""
    with errors_as_sentences():
        report = convert(
            model,
            QuantRecipe.load(recipe),
            scales,
            out,
            device=usable_device(device),
            loras=read_loras(model, map(LoraSource.parse, lora)),
            on_tensor=_print_tensors,
        )
    typer.echo(f"wrote {out}: {report}")


@app.command("import")
def import_command(
    source: Annotated[
        Path, typer.Option("--from", help="Safetensors file, or folder of them, to convert.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist yet.")],
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, if no config.json says it.")
    ] = None,
) -> None:
    """Convert a Wan2.1 text-to-video transformer with its original or ComfyUI's names.

    OUT is then the folder `transformer` of a pipeline; the other folders are those of
    Wan-AI/Wan2.1-T2V-14B-Diffusers.
    """
    with errors_as_sentences():
        report = import_original(source, out, heads=heads, on_tensor=_print_tensors)
    typer.echo(f"wrote {out}: {report}")


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A scales file.")],
    model: Annotated[Path | None, typer.Option(help="Check that the scales fit it.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Check that the scales fit it.")] = None,
    lora: Loras = [],  # noqa: B006
) -> None:
    """Show what a scales file holds and what it fits; with --model or --recipe, check that."""
    if lora and model is None:
        raise typer.BadParameter("a LoRA is merged into a model: give --model", param_hint="--lora")
    with errors_as_sentences():
        if model is not None:
            check_model_kind(model)
        scales = load_scales(file, model_folder=model, loras=lora)
        typer.echo(describe_scales(scales, file))
        fingerprint = scales.model_fingerprint
        if model is not None:
            fingerprint = read_loras(model, map(LoraSource.parse, lora)).fingerprint(
                model_fingerprint(model)
            )
        check_scales(
            scales,
            model_fingerprint=fingerprint,
            recipe=QuantRecipe.load(recipe) if recipe else scales.recipe,
            path=file,
            model_folder=model,
            loras=lora,
        )
    for subject in filter(None, (model and f"model {model}", recipe and f"recipe {recipe}")):
        typer.echo(f"fits {subject}")


@app.command("codes")
def codes_command() -> None:
    """Print the table of HiFloat8 codes that docs/numerics.md shows."""
    typer.echo(codes_markdown())


def _calibrate(
    pipe: Any, plan: CalibrationPlan, checkpoint: Checkpoint, latents: deque[Tensor]
) -> Scales:
    """Calibrate with a progress bar; Ctrl-C ends the command with one sentence."""
    progress = CalibrationProgress(len(plan.prompts.prompts))
    with resumable(), closing(progress):
        scales = run_calibration(
            pipe, plan, progress, checkpoint, lambda made: latents.append(made.cpu())
        )
    return scales


def _check_out(out: Path, kind: type[QuantError]) -> None:
    """Refuse a place where no file can be written, before hours are spent on its content."""
    if not out.absolute().parent.is_dir():
        raise kind(f"folder {out.parent} for {out.name} does not exist: create it first")
    if out.is_dir():
        raise kind(f"{out} is a folder: name a file in it, such as {out / 'NAME'}")
    if not os.access(out.absolute().parent, os.W_OK):
        raise kind(f"folder {out.parent} for {out.name} cannot be written: choose another place")


def _check_before_loading(model: Path, plan: CalibrationPlan) -> None:
    """Refuse what can be known without weights: recipe, prompts' lengths, `until`."""
    select_linears(shared_meta_model(read_transformer_config(model)), plan.recipe)
    if plan.until is not None:
        check_convergence(plan.recipe)
    check_prompt_lengths(load_tokenizer(model), plan.prompts.prompts, plan.sampler)


def _print_convergence(scales: Scales, until: float) -> None:
    convergence = convergence_of(scales)
    assert convergence is not None, "check_convergence refuses `until` otherwise"
    typer.echo(convergence.table())
    if not convergence.is_reached(until):
        settled = convergence.settled[-1]
        typer.echo(
            f"only {settled:.1%} of the scales have settled, not the {until:.1%} asked for: give "
            "more prompts, or accept these scales",
            err=True,
        )


def _fit_beside(out: Path, model: Path, pipe: Any, latents: deque[Tensor]) -> None:
    """Fit a preview map to the latents that a calibration has made, if there is none yet.

    A worker reads the one in the model's folder, so that one beside OUT would be of no use then.

    The scales are written by now: that this fails must not fail the command.
    """
    path = out.parent / DEFAULT_NAME.name
    if path.exists() or (model / DEFAULT_NAME).exists() or len(latents) < MIN_VIDEOS:
        return
    try:
        fitted = fit_preview_map(pipe.vae.float(), latents, vae_fingerprint(model))
        save_preview_map(fitted, path)
    except (QuantError, RuntimeError) as error:  # torch's, out of memory for instance
        typer.echo(f"no preview map was made: {error}", err=True)
    else:
        _print_map(path, fitted)


def _print_map(path: Path, fitted: PreviewMap) -> None:
    typer.echo(
        f"wrote {path}: fitted on {fitted.videos} videos, explains {fitted.r2:.1%} of others, RMS "
        f"error {fitted.rms_error:.1f} of 255"
    )


def _print_steps(done: int, total: int) -> None:
    if done % 10 == 0:
        typer.echo(f"step {done} of {total}", err=True)


def _print_tensors(done: int, total: int) -> None:
    if done % 100 == 0:
        typer.echo(f"tensor {done} of {total}", err=True)
