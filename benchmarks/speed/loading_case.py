"""Measure one start in this process and print it as JSON, for `benchmarks.speed.loading`."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

import quant
from quant.packed.format import SCALES_FILE
from quant.transformer.meta_model import empty_transformer, load_weights
from quant.weights.fingerprint import read_transformer_config
from quant.weights.header import stored_tensors
from worker.config import WorkerConfig, load_config
from worker.device import Device, pick_device
from worker.engine.wan_engine import WanEngine
from worker.model_loader.components import ComponentLoader
from worker.model_loader.loader import load_model, load_modes
from worker.model_loader.memory_plan import place_model
from worker.model_loader.mode_plan import (
    check_folder,
    choose_kernels,
    fingerprint_model,
    plan_modes,
)
from worker.model_loader.tokenizer import read_tokenizer
from worker.startup import paused_gc

COPY_BYTES = 1 << 30
COPY_ROUNDS = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Start:
    """The seconds and bytes of one start.

    Attributes:
        imports_s: from the start of the process until torch and the worker were imported.
        device_s: the first access to the device.
        checks_s: the checks of fingerprint, recipes, scales and headers, and of the memory.
        kernels_s: the trial of the device's kernels, which is done once per process and does not
            depend on the checkpoint. Meanwhile, readers of weights are prepared, and a thread reads
            the tokenizer.
        tokenizer_s: the time of that thread. If it takes longer than the kernels, the rest is part
            of model_s.
        model_s: loading the modes onto the kernels, and their shared components in parallel.
        transformer_bytes: of all modes together.
        components_bytes: of the text encoder and the VAE.
        pinned_bytes_per_s: the rate of a copy from pinned memory to the device.
        library_bytes_per_s: the rate of the safetensors library with the same files. Both rates are
            NaN if baselines were not measured.
        compared_tensors: the number of tensors that were found equal to the library's.
    """

    device: str
    imports_s: float
    device_s: float
    checks_s: float
    kernels_s: float
    tokenizer_s: float
    model_s: float
    transformer_bytes: int
    components_bytes: int
    peak_bytes: int
    pinned_bytes_per_s: float = math.nan
    library_bytes_per_s: float = math.nan
    compared_tensors: int = 0

    @property
    def loading_s(self) -> float:
        """From a process with a tried device and kernels to a worker that is ready."""
        return self.checks_s + self.model_s

    @property
    def whole_s(self) -> float:
        """From the start of the process to a worker that is ready."""
        return self.imports_s + self.device_s + self.kernels_s + self.loading_s


def main(
    config_file: Path,
    started: Annotated[float, typer.Option(help="When the process was started, UNIX time.")],
    wanted: Annotated[str, typer.Option("--device")] = "cuda",
    only_modes: Annotated[bool, typer.Option(help="Leave out what the modes share.")] = False,
    baselines: Annotated[bool, typer.Option(help="Measure them, too.")] = True,
) -> None:
    """Load what a configuration names, as a worker does, and print the measurements as JSON.

    With baselines, every tensor is loaded once more and must equal what the library reads.
    """
    imported = time.time()
    device = pick_device("cpu" if wanted == "cpu" else "cuda")
    start = measure_start(config_file, device, only_modes, started, imported)
    if baselines:
        gc.unfreeze()
        gc.collect()  # frees what was loaded, including reference cycles
        config = load_config(config_file)
        files = files_of(config.model.path, config, only_modes)
        device.empty_cache()
        speed, compared = compare_with_library(files, config, device)
        start = replace(
            start,
            pinned_bytes_per_s=copy_rate(device),
            library_bytes_per_s=speed,
            compared_tensors=compared,
        )
    print(json.dumps(asdict(start)))


def measure_start(
    config_file: Path, device: Device, only_modes: bool, started: float, imported: float
) -> Start:
    """Start as a worker does, measure each phase, and free all memory."""
    torch.zeros(1, device=device.torch_device)
    laps = [imported]

    def lap() -> None:
        device.synchronize()
        laps.append(time.time())

    lap()
    with paused_gc():
        config = load_config(config_file)
        path = config.model.path
        check_folder(path)
        fingerprint = fingerprint_model(config)
        plans = plan_modes(config, fingerprint)
        recipes, loras = [plan.recipe for plan in plans], [plan.loras for plan in plans]
        placement = place_model(config, recipes, device, device.available_bytes(), loras=loras)
        lap()
        shared_bytes, tokenizer_s = 0, 0.0
        with ThreadPoolExecutor(1) as executor:
            folder = path / "tokenizer"
            reading = None if only_modes else executor.submit(timed, read_tokenizer, folder)
            choices = choose_kernels(plans, device)
            lap()
            if reading is None:
                modes = load_modes(path, plans, device, choices)
            else:
                modes, components = load_model(
                    path, plans, device, placement, choices, lambda: reading.result()[0]
                )
                WanEngine(config.model, fingerprint, device, components, modes)
                shared_bytes = quant.weight_bytes(components.text_encoder, components.vae)
                tokenizer_s = reading.result()[1]
    lap()
    seconds = [after - before for before, after in pairwise(laps)]
    memory = device.memory()
    return Start(
        device=device.name,
        imports_s=imported - started,
        device_s=seconds[0],
        checks_s=seconds[1],
        kernels_s=seconds[2],
        tokenizer_s=tokenizer_s,
        model_s=seconds[3],
        transformer_bytes=quant.weight_bytes(*(mode.transformer for mode in modes)),
        components_bytes=shared_bytes,
        peak_bytes=0 if memory is None else memory.peak_bytes,
    )


def timed(make: Callable[[Path], T], path: Path) -> tuple[T, float]:
    """Return `make(path)` and the seconds it took."""
    started = time.perf_counter()
    result = make(path)
    return result, time.perf_counter() - started


def files_of(model: Path, config: WorkerConfig, only_modes: bool) -> list[Path]:
    """Return the weight files that a start reads."""
    folders = {mode.packed or model / "transformer" for mode in config.modes}
    if not only_modes:
        folders |= {model / "text_encoder", model / "vae"}
    found = [file for folder in sorted(folders) for file in sorted(folder.glob("*.safetensors"))]
    return [file for file in found if file.name != SCALES_FILE]


def compare_with_library(
    files: list[Path], config: WorkerConfig, device: Device
) -> tuple[float, int]:
    """Read files with the safetensors library and compare with what a worker loads, bit by bit.

    Returns:
        The library's bytes per second from the files to the device, and the number of tensors.

    Raises:
        RuntimeError: a tensor differs; the error names the first one.
    """
    seconds, compared, folder = 0.0, 0, Path()
    ours: Mapping[str, Tensor] = {}
    for file in files:
        if file.parent != folder:
            ours, folder = {}, file.parent  # frees the folder before, as there is no memory for two
            ours = load_again(folder, config, device)
        device.synchronize()
        started = time.perf_counter()
        tensors = load_file(file, device=str(device.torch_device))
        device.synchronize()
        seconds += time.perf_counter() - started
        for name, tensor in tensors.items():
            if not torch.equal(bits(ours[name]), bits(tensor.to(ours[name].dtype))):
                raise RuntimeError(f"{name!r} on the device is not what {file} holds")
        compared += len(tensors)
        del tensors, tensor
    return sum(file.stat().st_size for file in files) / seconds, compared


def bits(tensor: Tensor) -> Tensor:
    """View a tensor as [bytes] uint8, because as numbers 0 equals -0 and NaN differs from NaN."""
    return tensor.reshape(-1).view(torch.uint8)


def load_again(folder: Path, config: WorkerConfig, device: Device) -> Mapping[str, Tensor]:
    """Load a component's tensors as a worker does, without fusing them onto kernels; by name."""
    if folder.name in {"text_encoder", "vae"}:
        components = ComponentLoader(config.model.path, device)
        components.copy()
        module: nn.Module = getattr(components, folder.name)
        return module.state_dict()
    with quant.BackgroundReader(quant.TensorReader(device.torch_device)) as reader:
        if folder == config.model.path / "transformer":
            tree: nn.Module = empty_transformer(read_transformer_config(config.model.path))
            load_weights(tree, stored_tensors(sorted(folder.glob("*.safetensors"))), reader)
        else:
            tree = quant.load_packed(quant.open_packed(folder), reader)
    return tree.state_dict()


def copy_rate(device: Device) -> float:
    """Return the bytes per second of a large copy from pinned memory: the best of a few."""
    on_gpu = device.memory() is not None
    size = COPY_BYTES if on_gpu else COPY_BYTES >> 4
    source = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu).fill_(1)
    target = torch.empty(size, dtype=torch.uint8, device=device.torch_device)
    rates = []
    for _ in range(COPY_ROUNDS):
        device.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        device.synchronize()
        rates.append(size / (time.perf_counter() - started))
    return max(rates)


def run() -> None:
    """Run this module's command line."""
    typer.run(main)
