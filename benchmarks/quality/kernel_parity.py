"""Do kernels compute what the emulation does? `python -m benchmarks.quality.kernel_parity --device
cuda`

The miniature's own weights and scales on one device, once on the kernels the device is given and
once on those that emulate (`quant.kernels.eager`), in bf16, in w8a8 and in w8a8 with FP8 attention:

- per block, given the same input: the error of what the block adds, relative to that;
- the whole forward pass: SQNR of the kernels' output against the emulation's;
- whole videos of the same seeds: PSNR. The goal is 40 dB in every mode;
- the shares of activations that saturate and that become zero, which E4M3 and HiFloat8 have each
  their own of (baseline: the emulation's), and that counting them changes no bit.

The baselines compare the emulation on the device with the emulation on the CPU: the same roundings,
only sums in another order. What the kernels add to that is their own. On a CPU everything is
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
from benchmarks.quality.fp8_attention import RECIPES, prepared
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

STEPS_LOOKED_AT = (0, 5, 10, 15, 19)
GOAL_DB = 40.0

Inputs = list[dict[str, Any]]
"""What a pipeline gives its transformer, step by step."""


@dataclass(frozen=True, slots=True)
class Way:
    """A mode on one kind of kernels, on one device."""

    pipeline: WanPipeline
    device: str

    @property
    def transformer(self) -> Any:
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
        chosen = device_kernels(device, quantized=RECIPES[name] is not None)
        kernels[name] = chosen.name
        ours = way(name, chosen, device)
        emulated = way(name, EagerKernels(), device)
        elsewhere = way(name, EagerKernels(), "cpu")
        rows += compare_tensors(name, ours, emulated, elsewhere, texts[0])
        rows += compare_videos(name, (ours, emulated, elsewhere), texts, batch)
        print(f"{name}: done", flush=True)
    report.print_table(rows)
    settings = {
        "captions": count,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "steps_looked_at": list(STEPS_LOOKED_AT),
        "guidance_scale": GUIDANCE_SCALE,
        "model": quant.model_fingerprint(MODEL),
        "kernels": kernels,
    }
    where = device if device == "cpu" else torch.cuda.get_device_name(0)
    report.keep(report.result("numerics", where, settings, rows))
    missed = [row.what for row in rows if "mean PSNR" in row.what and row.value < GOAL_DB]
    print(f"goal of {GOAL_DB:g} dB: {'missed by ' + ', '.join(missed) if missed else 'reached'}")


def device_kernels(device: str, *, quantized: bool) -> Kernels:
    """The kernels a worker would run on; without a fall-back, which would prove nothing."""
    choice = pick_kernels(torch.device(device), quantized=quantized)
    if choice.warning is not None:
        raise SystemExit(choice.warning)
    return choice.kernels


def way(mode: str, kernels: Kernels, device: str) -> Way:
    """The miniature in one mode on some kernels."""
    pipeline = load_pipeline(MODEL, device)
    pipeline.transformer = prepared(pipeline.transformer, RECIPES[mode], kernels)
    pipeline.set_progress_bar_config(disable=True)
    return Way(pipeline, device)


def compare_tensors(
    mode: str, ours: Way, emulated: Way, elsewhere: Way, text: str
) -> list[report.Row]:
    """Blocks and whole passes, on the inputs that one video gives the emulation."""
    inputs = recorded_inputs(emulated, text)
    own, order = (block_errors(emulated, other, inputs) for other in (ours, elsewhere))
    recipe = RECIPES[mode]
    quantized = set(quant.QuantRecipe.load(recipe).quantized_blocks) if recipe else set()
    rows = []
    for name, blocks in (
        ("BF16 blocks", [i for i in range(own.shape[1]) if i not in quantized]),
        ("quantized blocks", sorted(quantized)),
    ):
        if blocks:
            what = f"{mode}, {name}, relative error"
            mine, other = 100 * own[:, blocks], 100 * order[:, blocks]
            rows += [
                report.Row(f"{what}, median", mine.median().item(), "%", other.median().item()),
                report.Row(f"{what}, largest", mine.max().item(), "%", other.max().item()),
            ]
    own_db, order_db = (pass_sqnr_db(emulated, other, inputs) for other in (ours, elsewhere))
    rows.append(report.Row(f"{mode}, forward SQNR, lowest", min(own_db), "dB", min(order_db)))
    if inexact := [m.flushed for m in ours.transformer.modules() if hasattr(m, "flushed")]:
        what = f"{mode}, weights E4M3 cannot hold, largest of any product"
        rows.append(report.Row(what, 100 * max(inexact), "%"))
    return rows + share_rows(mode, ours, emulated, inputs[len(inputs) // 2])


@torch.no_grad()
def recorded_inputs(one: Way, text: str) -> Inputs:
    """What the transformer is given with the prompt, at the steps that are looked at."""
    seen: Inputs = []
    handle = one.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        next(iter(sample(one.pipeline, [text], [0], batch=1)))
    finally:
        handle.remove()
    return [seen[2 * step] for step in STEPS_LOOKED_AT]


@torch.no_grad()
def block_errors(reference: Way, other: Way, inputs: Inputs) -> Tensor:
    """‖theirs − the reference's‖ / ‖the reference's − its input‖: [steps, blocks]."""
    errors: list[float] = []

    def compare(index: int, args: tuple[Tensor, ...], output: Tensor) -> None:
        block: FusedWanBlock = other.transformer.blocks[index]
        theirs = block(*(moved(each, other.device) for each in args))
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
def pass_sqnr_db(reference: Way, other: Way, inputs: Inputs) -> list[float]:
    """Of a whole pass, step by step."""
    found = []
    for each in inputs:
        theirs = other.transformer(**{k: moved(x, other.device) for k, x in each.items()})[0]
        mine = reference.transformer(**each)[0]
        found.append(min(report.SAME_DB, quant.sqnr_db(mine, theirs.to(mine.device))))
    return found


def share_rows(mode: str, ours: Way, emulated: Way, inputs: dict[str, Any]) -> list[report.Row]:
    """What operators see of one pass, by the kernels' own count and by the emulation's."""
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
def shares(one: Way, inputs: dict[str, Any]) -> ActShares | None:
    """Count during one pass, which has to give what it gives without."""
    given = {name: moved(x, one.device) for name, x in inputs.items()}
    out = one.transformer(**given)[0]
    counting = ActSample(one.transformer)
    counting.arm()
    if not torch.equal(one.transformer(**given)[0], out):
        raise SystemExit("counting what roundings lose changes what the kernels compute")
    return counting.shares()


def compare_videos(
    mode: str, ways: tuple[Way, Way, Way], texts: list[str], batch: int
) -> list[report.Row]:
    """Videos of the same seeds: the kernels', the emulation's, and the emulation's elsewhere."""
    ours, emulated, elsewhere = (
        list(sample(each.pipeline, texts, list(range(len(texts))), batch=batch)) for each in ways
    )
    own, order = (psnr(made, emulated) for made in (ours, elsewhere))
    low, high = bootstrap(own)
    what, unit = f"{mode}, videos", f"dB, of {len(texts)}"
    mean, lowest = float(own.mean()), float(own.min())
    return [
        report.Row(f"{what}, mean PSNR", mean, unit, float(order.mean()), low, high),
        report.Row(f"{what}, lowest PSNR", lowest, unit, float(order.min())),
    ]


def psnr(made: list[Frames], reference: list[Frames]) -> np.ndarray:
    """PSNR of each video; 100 dB stands for equal ones."""
    return np.array([psnr_db(a, b) for a, b in zip(made, reference, strict=True)])


def moved(value: Any, device: str) -> Any:
    """Tensors, also in tuples, on another device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value


if __name__ == "__main__":
    typer.run(main)
