"""Compare a device's kernels with their bit-true emulation, in every mode of the miniature.

`python -m benchmarks.quality.kernel_parity --device cuda`

The miniature's weights and scales run on one device with the kernels that a worker would use there,
and with the emulation (`quant.kernels.eager`), in bf16, in w8a8 and in w8a8 with FP8 attention:

- each block with the same input: the error of what the block adds, relative to what it adds;
- the whole forward pass: SQNR of the kernels' output against the emulation's;
- whole videos of the same seeds: PSNR. The goal is 40 dB in every mode;
- the shares of activations that saturate and that become zero, which differ between E4M3 and
  HiFloat8 (baseline: the emulation's). Counting them must not change a bit of the output.

The baselines compare the emulation on the device with the emulation on the CPU, which rounds in the
same way but sums in another order. Errors beyond them come from the kernels. On a CPU everything is
compared with itself, and the errors are 0.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import WanPipeline
from torch import Tensor, nn

import quant
from benchmarks import report
from benchmarks.quality.fp8_attention import RECIPES, load_recipe, prepare
from benchmarks.quality.miniature import MODEL, bootstrap, psnr_db
from mini.evaluate import GUIDANCE_SCALE, SAMPLING_STEPS, load_pipeline, sample
from mini.world.oracle import Frames
from mini.world.scenes import Split, captions_of
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import Kernels
from quant.kernels.selection import pick_kernels
from quant.transformer.wan_block import FusedWanBlock
from worker.engine.saturation import ActSample
from worker.interface import ActShares

RECORDED_STEPS = (0, 5, 10, 15, 19)
GOAL_DB = 40.0

Inputs = list[dict[str, Any]]
"""The keyword arguments of a pipeline's transformer, step by step."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A mode on one set of kernels, on one device."""

    pipeline: WanPipeline
    device: str

    @property
    def transformer(self) -> Any:
        """The pipeline's transformer."""
        return self.pipeline.transformer


def main(
    count: Annotated[int, typer.Option(min=2, help="Videos per mode.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mode: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
) -> None:
    """Compare in every mode and write the result."""
    texts = captions_of(Split.EVALUATION, count)
    rows: list[report.Row] = []
    kernels: dict[str, str] = {}
    for name in mode or RECIPES:
        chosen = device_kernels(
            device,
            quantized=RECIPES[name] is not None,
            fp8_attention=name == "w8a8-fp8attn",
        )
        kernels[name] = chosen.name
        ours = make_variant(name, chosen, device)
        emulated = make_variant(name, EagerKernels(), device)
        on_cpu = make_variant(name, EagerKernels(), "cpu")
        rows += compare_tensors(name, ours, emulated, on_cpu, texts[0])
        rows += compare_videos(name, (ours, emulated, on_cpu), texts, batch)
        print(f"{name}: done", flush=True)
    report.print_table(rows)
    settings = {
        "captions": count,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "steps_looked_at": list(RECORDED_STEPS),
        "guidance_scale": GUIDANCE_SCALE,
        "model": quant.model_fingerprint(MODEL),
        "kernels": kernels,
    }
    device_name = device if device == "cpu" else torch.cuda.get_device_name(0)
    report.save(report.result("numerics", device_name, settings, rows))
    missed = [row.what for row in rows if "mean PSNR" in row.what and row.value < GOAL_DB]
    print(f"goal of {GOAL_DB:g} dB: {'missed by ' + ', '.join(missed) if missed else 'reached'}")


def device_kernels(device: str, *, quantized: bool, fp8_attention: bool) -> Kernels:
    """Return the kernels that a worker would use; exit if they would be a fallback."""
    choice = pick_kernels(torch.device(device), quantized=quantized, fp8_attention=fp8_attention)
    if choice.warning is not None:
        raise SystemExit(choice.warning)
    return choice.kernels


def make_variant(mode: str, kernels: Kernels, device: str) -> Variant:
    """Load the miniature in one mode on the given kernels."""
    pipeline = load_pipeline(MODEL, device)
    pipeline.transformer = prepare(pipeline.transformer, load_recipe(mode), kernels)
    pipeline.set_progress_bar_config(disable=True)
    return Variant(pipeline, device)


def compare_tensors(
    mode: str, ours: Variant, emulated: Variant, on_cpu: Variant, text: str
) -> list[report.Row]:
    """Compare blocks and whole passes, with the inputs that one video gives the emulation."""
    inputs = record_inputs(emulated, text)
    errors, cpu_errors = (block_errors(emulated, other, inputs) for other in (ours, on_cpu))
    recipe = load_recipe(mode)
    quantized = set(recipe.quantized_blocks) if recipe else set()
    rows = []
    for name, blocks in (
        ("BF16 blocks", [i for i in range(errors.shape[1]) if i not in quantized]),
        ("quantized blocks", sorted(quantized)),
    ):
        if blocks:
            what = f"{mode}, {name}, relative error"
            percent, baseline = 100 * errors[:, blocks], 100 * cpu_errors[:, blocks]
            rows += [
                report.Row(
                    f"{what}, median", percent.median().item(), "%", baseline.median().item()
                ),
                report.Row(f"{what}, largest", percent.max().item(), "%", baseline.max().item()),
            ]
    sqnr_db, cpu_db = (pass_sqnr_db(emulated, other, inputs) for other in (ours, on_cpu))
    rows.append(report.Row(f"{mode}, forward SQNR, lowest", min(sqnr_db), "dB", min(cpu_db)))
    if inexact := [m.flushed for m in ours.transformer.modules() if hasattr(m, "flushed")]:
        what = f"{mode}, weights E4M3 cannot hold, largest of any product"
        rows.append(report.Row(what, 100 * max(inexact), "%"))
    return rows + share_rows(mode, ours, emulated, inputs[len(inputs) // 2])


@torch.no_grad()
def record_inputs(variant: Variant, text: str) -> Inputs:
    """Record the transformer's inputs with the prompt at `RECORDED_STEPS`."""
    recorded: Inputs = []
    handle = variant.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: recorded.append(kwargs), with_kwargs=True
    )
    try:
        next(iter(sample(variant.pipeline, [text], [0], batch=1)))
    finally:
        handle.remove()
    # Each step has two passes: with the prompt, then with the negative prompt.
    return [recorded[2 * step] for step in RECORDED_STEPS]


@torch.no_grad()
def block_errors(reference: Variant, other: Variant, inputs: Inputs) -> Tensor:
    """Return ‖other − reference‖ / ‖reference − input‖ of block outputs: [steps, blocks]."""
    errors: list[float] = []

    def compare(index: int, args: tuple[Tensor, ...], output: Tensor) -> None:
        block: FusedWanBlock = other.transformer.blocks[index]
        theirs = block(*(to_device(each, other.device) for each in args))
        added = (output - args[0]).float()
        errors.append(((theirs.to(output.device) - output).float().norm() / added.norm()).item())

    def hook(index: int) -> Any:
        return lambda module, args, output: compare(index, args, output)

    blocks: nn.ModuleList = reference.transformer.blocks
    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        for each in inputs:
            reference.transformer(**each)
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor(errors).view(len(inputs), len(blocks))


@torch.no_grad()
def pass_sqnr_db(reference: Variant, other: Variant, inputs: Inputs) -> list[float]:
    """Return the SQNR in dB of the other's output of a whole pass, step by step."""
    found = []
    for each in inputs:
        theirs = other.transformer(**{k: to_device(x, other.device) for k, x in each.items()})[0]
        expected = reference.transformer(**each)[0]
        found.append(min(report.EQUAL_DB, quant.sqnr_db(expected, theirs.to(expected.device))))
    return found


def share_rows(
    mode: str, ours: Variant, emulated: Variant, inputs: dict[str, Any]
) -> list[report.Row]:
    """Compare the shares of lost activations that the kernels and the emulation count."""
    counted = [shares(each, inputs) for each in (ours, emulated)]
    if None in counted:
        return []
    own, other = (each for each in counted if each is not None)
    what = f"{mode}, activations that"
    return [
        report.Row(f"{what} saturate", 100 * own.saturated, "%", 100 * other.saturated),
        report.Row(f"{what} become zero", 100 * own.flushed, "%", 100 * other.flushed),
    ]


@torch.no_grad()
def shares(variant: Variant, inputs: dict[str, Any]) -> ActShares | None:
    """Count the activations that one pass loses, and check that counting changes no output."""
    arguments = {name: to_device(x, variant.device) for name, x in inputs.items()}
    out = variant.transformer(**arguments)[0]
    counting = ActSample(variant.transformer)
    counting.arm()
    if not torch.equal(variant.transformer(**arguments)[0], out):
        raise SystemExit("counting what roundings lose changes what the kernels compute")
    return counting.shares()


def compare_videos(
    mode: str, variants: tuple[Variant, Variant, Variant], texts: list[str], batch: int
) -> list[report.Row]:
    """Compare videos of the same seeds: of the kernels, the emulation, and that on the CPU."""
    ours, emulated, on_cpu = (
        list(sample(each.pipeline, texts, list(range(len(texts))), batch=batch))
        for each in variants
    )
    values, baseline = (psnr(videos, emulated) for videos in (ours, on_cpu))
    low, high = bootstrap(values)
    what, unit = f"{mode}, videos", f"dB, of {len(texts)}"
    mean, lowest = float(values.mean()), float(values.min())
    return [
        report.Row(f"{what}, mean PSNR", mean, unit, float(baseline.mean()), low, high),
        report.Row(f"{what}, lowest PSNR", lowest, unit, float(baseline.min())),
    ]


def psnr(videos: list[Frames], reference: list[Frames]) -> np.ndarray:
    """Return the PSNR of each video; 100 dB for equal ones."""
    return np.array([psnr_db(a, b) for a, b in zip(videos, reference, strict=True)])


def to_device(value: Any, device: str) -> Any:
    """Move tensors, also in tuples, to a device; return anything else unchanged."""
    if isinstance(value, tuple):
        return tuple(to_device(each, device) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value


if __name__ == "__main__":
    typer.run(main)
