"""Whatever the cut, every tensor arrives whole, with and without buffers on the way."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant.errors import WeightsError
from quant.kernels.copier import Copier, CopierBeside
from quant.safetensors_header import read_header, stored_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.float16)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two files with tensors of many sizes, from one element to several buffers, and an empty."""
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        tensors = {
            f"{number}.{size}.{dtype}": torch.randn(size, generator=generator).abs().to(dtype)
            for size in (0, 1, 3, 7, 100, 511, 4096, 9001)
            for dtype in DTYPES
        }
        tensors[f"{number}.scalar"] = torch.tensor(3.5 + number)
        tensors[f"{number}.matrix"] = torch.randn(70, 90, generator=generator)
        save_file(tensors, folder / f"{number}.safetensors")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("buffer_bytes", [1024, 5000, 1 << 20])
def test_every_tensor_arrives(files, staged, buffer_bytes):
    stored = stored_tensors(files)
    targets = {name: torch.full(s.shape, 77, dtype=s.dtype) for name, s in stored.items()}
    copier = Copier(torch.device("cpu"), buffer_bytes=buffer_bytes, staged=staged)
    copier.read((stored[name], targets[name]) for name in stored)
    check(files, targets)


@pytest.mark.parametrize("staged", [False, True])
def test_what_is_stored_in_another_dtype_is_converted(files, staged):
    stored = {n: s for n, s in stored_tensors(files).items() if s.dtype is torch.float32}
    targets = {name: torch.empty(s.shape, dtype=torch.bfloat16) for name, s in stored.items()}
    copier = Copier(torch.device("cpu"), buffer_bytes=1024, staged=staged)
    copier.read((stored[name], targets[name]) for name in stored)
    check(files, targets)


@pytest.mark.parametrize("staged", [False, True])
def test_any_choice_of_tensors_can_be_read(files, staged):
    stored = stored_tensors(files)
    chosen = list(stored)[::3][::-1]
    targets = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in chosen}
    copier = Copier(torch.device("cpu"), buffer_bytes=2048, staged=staged)
    copier.read((stored[name], targets[name]) for name in chosen)
    check(files, targets)


def check(files: list[Path], targets: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open  # noqa: PLC0415

    for file in files:
        with safe_open(file, framework="pt") as source:
            for name in set(source.keys()) & set(targets):
                wanted = source.get_tensor(name).to(targets[name].dtype)
                assert torch.equal(targets[name], wanted), name


def test_places_are_those_the_library_reads(files):
    for file in files:
        header = read_header(file)
        raw = file.read_bytes()
        from safetensors import safe_open  # noqa: PLC0415

        with safe_open(file, framework="pt") as source:
            assert {each.name for each in header.tensors} == set(source.keys())
            for each in header.tensors:
                data = source.get_tensor(each.name).reshape(-1).view(torch.uint8).numpy().tobytes()
                assert raw[each.start : each.start + each.nbytes] == data


@pytest.mark.parametrize("staged", [False, True])
def test_a_file_that_is_gone_is_named(files, tmp_path, staged):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([gone, files[1]])
    gone.unlink()
    copier = Copier(torch.device("cpu"), buffer_bytes=1024, staged=staged)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match=r"gone\.safetensors cannot be read: No such file"):
        copier.read(wanted)


@pytest.mark.parametrize("staged", [False, True])
def test_a_file_that_was_cut_since_is_named_with_the_tensor(files, tmp_path, staged):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files[0].read_bytes())
    stored = stored_tensors([cut])
    last = max(stored.values(), key=lambda each: each.start)
    os.truncate(cut, last.start + last.nbytes - 1)
    copier = Copier(torch.device("cpu"), buffer_bytes=1024, staged=staged)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match=rf"cut\.safetensors ends after .*{last.name}"):
        copier.read(wanted)


def test_beside_everything_arrives_in_turn(files):
    stored = stored_tensors(files)
    targets = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in stored.items()}
    taken = []
    with CopierBeside(Copier(torch.device("cpu"), buffer_bytes=1024)) as beside:
        for number in range(2):
            names = [name for name in stored if name.startswith(f"{number}.")]
            beside.read((stored[name], targets[name]) for name in names)
        after = beside.submit(lambda: taken.append(targets["1.scalar"].item()))
        beside.wait()
        after.result()
    assert taken == [4.5]
    check(files, targets)


def test_beside_a_fault_comes_with_the_waiting(files, tmp_path):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([gone])
    gone.unlink()
    with CopierBeside(Copier(torch.device("cpu"))) as beside:
        beside.read((s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values())
        with pytest.raises(WeightsError, match="No such file"):
            beside.wait()


def test_a_name_in_two_files_is_refused(files, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    with pytest.raises(WeightsError, match=r"is in 0\.safetensors and in copy\.safetensors"):
        stored_tensors([files[0], copy])
