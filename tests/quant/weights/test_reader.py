"""Whatever the cut, every tensor arrives whole, with and without buffers on the way."""

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant.errors import WeightsError
from quant.weights import reader as copier_module
from quant.weights import transfer
from quant.weights.fastsafetensors_reader import FileReader, file_reader
from quant.weights.header import read_header, stored_tensors
from quant.weights.read_plan import ReadLimits, cut_into_runs
from quant.weights.reader import BackgroundReader, TensorReader
from quant.weights.transfer import FastSafetensorsTransfer, HostTransfer, PinnedTransfer, Transfer

CPU = torch.device("cpu")
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


@pytest.fixture(scope="module")
def library() -> FileReader:
    """The library's own threads, which on a CPU copy into its memory."""
    return FileReader(CPU)


@pytest.fixture(params=["in place", "by pinned buffers", "by file reader"])
def copier(request, library):
    """Makes a copier to the host that takes one of the ways, in runs of so many bytes."""

    def make(run_bytes: int) -> TensorReader:
        kinds: dict[str, Callable[..., Transfer]] = {
            "in place": HostTransfer,
            "by pinned buffers": partial(PinnedTransfer, CPU),
            "by file reader": partial(FastSafetensorsTransfer, CPU, library),
        }
        way = partial(kinds[request.param], run_bytes=run_bytes, gather_bytes=400)
        return TensorReader(CPU, way)

    return make


@pytest.mark.parametrize("run_bytes", [1024, 5000, 1 << 20])
@pytest.mark.parametrize("slice_bytes", [300, transfer.SLICE_BYTES])
def test_every_tensor_arrives(files, copier, run_bytes, slice_bytes, monkeypatch):
    monkeypatch.setattr(transfer, "SLICE_BYTES", slice_bytes)
    stored = stored_tensors(files)
    targets = {name: torch.full(s.shape, 77, dtype=s.dtype) for name, s in stored.items()}
    reader = copier(run_bytes)
    reader.read((stored[name], targets[name]) for name in stored)
    check(files, targets)


def test_reads_that_come_short_are_gone_on_with(files, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: whole(file, [views[0][:100]], at))
    stored = stored_tensors(files)
    targets = {name: torch.full(s.shape, 77, dtype=s.dtype) for name, s in stored.items()}
    TensorReader(CPU).read((stored[n], targets[n]) for n in stored)
    check(files, targets)


def test_what_is_stored_in_another_dtype_is_converted(files, copier):
    stored = {n: s for n, s in stored_tensors(files).items() if s.dtype is torch.float32}
    targets = {name: torch.empty(s.shape, dtype=torch.bfloat16) for name, s in stored.items()}
    reader = copier(1024)
    reader.read((stored[name], targets[name]) for name in stored)
    check(files, targets)


def test_any_choice_of_tensors_can_be_read(files, copier):
    stored = stored_tensors(files)
    chosen = list(stored)[::3][::-1]
    targets = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in chosen}
    reader = copier(2048)
    reader.read((stored[name], targets[name]) for name in chosen)
    check(files, targets)


@pytest.fixture
def submitted(library, monkeypatch) -> list[int]:
    """How many bytes the library's threads were asked for at a time."""
    sizes: list[int] = []

    def begin(file: int, start: int, nbytes: int, address: int) -> int:
        sizes.append(nbytes)
        return FileReader.begin(library, file, start, nbytes, address)

    monkeypatch.setattr(library, "begin", begin)
    return sizes


def test_what_lies_in_memory_as_in_the_file_is_read_at_once(tmp_path, library, submitted):
    file = tmp_path / "rows.safetensors"
    save_file({f"{n}": torch.randn(1000) for n in range(6)}, file)
    stored = sorted(stored_tensors([file]).values(), key=lambda each: each.start)
    memory = torch.full((8000,), 77.0)
    rows = [*memory[:3000].split(1000), *memory[4000:7000].split(1000)]
    wanted = list(zip(stored, rows, strict=True))
    way = partial(FastSafetensorsTransfer, CPU, library, gather_bytes=400)
    TensorReader(CPU, way).read(wanted)
    check([file], {each.name: row for each, row in wanted})
    assert submitted == [12_000, 12_000]
    assert (memory[3000:4000] == 77).all(), "between them is somebody else's"
    assert (memory[7000:] == 77).all()

    submitted.clear()
    memory.fill_(77)
    TensorReader(CPU, partial(way, run_bytes=9000)).read(wanted)
    check([file], {each.name: row for each, row in wanted})
    assert submitted == [8000, 4000, 8000, 4000]

    submitted.clear()
    TensorReader(CPU, way).read(wanted[::-1])
    assert submitted == [4000] * 6


def test_neighbours_in_memory_only_are_not_read_at_once(tmp_path, library, submitted):
    file = tmp_path / "rows.safetensors"
    save_file({f"{n}": torch.randn(1000) for n in range(3)}, file)
    first, _, last = sorted(stored_tensors([file]).values(), key=lambda each: each.start)
    memory = torch.full((4000,), 77.0)
    rows = memory[:2000].split(1000)
    way = partial(FastSafetensorsTransfer, CPU, library, gather_bytes=400)
    TensorReader(CPU, way).read(zip([first, last], rows, strict=True))
    check([file], {first.name: rows[0], last.name: rows[1]})
    assert submitted == [4000, 4000]
    assert (memory[2000:] == 77).all()


def test_what_is_converted_lands_beside(tmp_path, library, submitted):
    file = tmp_path / "rows.safetensors"
    save_file({f"{n}": torch.randn(1000) for n in range(4)}, file)
    stored = sorted(stored_tensors([file]).values(), key=lambda each: each.start)
    memory = torch.full((4, 1000), 77.0, dtype=torch.bfloat16)
    targets = {each.name: row for each, row in zip(stored, memory, strict=True)}
    way = partial(FastSafetensorsTransfer, CPU, library, gather_bytes=400)
    TensorReader(CPU, way).read((each, targets[each.name]) for each in stored)
    check([file], targets)
    assert sum(submitted) == pytest.approx(16_000, abs=64)


def test_small_tensors_from_anywhere_in_a_file_are_read_together(tmp_path, library, submitted):
    file, generator = tmp_path / "mixed.safetensors", torch.Generator().manual_seed(0)
    sizes = [3, 40_000, 5, 7, 40_000, 11, 40_000]
    tensors = {f"{n}": torch.randn(size, generator=generator) for n, size in enumerate(sizes)}
    save_file(tensors, file)
    stored = stored_tensors([file])
    order = sorted(stored, key=lambda name: stored[name].nbytes)  # small ones first
    targets = {name: torch.full(stored[name].shape, 77.0) for name in order}
    runs = list(
        cut_into_runs(((stored[n], targets[n]) for n in order), ReadLimits(1 << 20, 400, True))
    )
    assert [len(run.pieces) for run in runs] == [4, 1, 1, 1]
    assert [len(run.spans) for run in runs] == [3, 1, 1, 1]
    way = partial(FastSafetensorsTransfer, CPU, library, gather_bytes=400)
    TensorReader(CPU, way).read((stored[name], targets[name]) for name in order)
    check([file], targets)
    assert submitted == [160_000] * 3


def test_as_much_is_begun_as_there_is_room_for(files, library, monkeypatch):
    """Where large tensors land beside, by their number; else by their bytes."""
    monkeypatch.setattr(transfer, "AHEAD_BYTES", 100_000)
    most = {"landing": 0, "bytes": 0}

    class Watched(FastSafetensorsTransfer):
        def has_room(self, under_way):
            landing = [run for run in under_way if run.address is None]
            if len(landing) == len(under_way):
                most["landing"] = max(most["landing"], len(landing))
            elif not landing:
                most["bytes"] = max(most["bytes"], sum(run.nbytes for run in under_way))
            return super().has_room(under_way)

    way = partial(Watched, CPU, library, run_bytes=8192, gather_bytes=1)
    stored = stored_tensors(files)
    for dtype in (None, torch.float64):
        targets = {n: torch.empty(s.shape, dtype=dtype or s.dtype) for n, s in stored.items()}
        TensorReader(CPU, way).read((stored[name], targets[name]) for name in stored)
        check(files, targets)
    assert most["landing"] == transfer.CHUNKS
    assert 100_000 <= most["bytes"] < 100_000 + 8192


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


def test_what_is_no_file_is_said_so(files, tmp_path, copier):
    folder = tmp_path / "a folder.safetensors"
    folder.mkdir()
    stored = next(iter(stored_tensors(files).values()))
    wanted = [(replace(stored, file=folder, shape=(4,)), torch.empty(4, dtype=stored.dtype))]
    with pytest.raises(WeightsError, match=r"a folder\.safetensors cannot be read: Is a directory"):
        copier(1024).read(wanted)


@pytest.mark.parametrize("wide_first", [False, True])
def test_of_one_dtype_in_the_file_some_may_be_wanted_in_another(tmp_path, copier, wide_first):
    """As a BF16 transformer is stored, some of which runs in FP32."""
    file = tmp_path / "bf16.safetensors"
    tensors = {f"{n:02}": torch.randn(100 + n).to(torch.bfloat16) for n in range(12)}
    save_file(tensors, file)
    wanted = [
        (s, torch.full(s.shape, 77.0, dtype=(torch.bfloat16, torch.float32)[(n + wide_first) % 2]))
        for n, s in enumerate(stored_tensors([file]).values())
    ]
    copier(1 << 20).read(wanted)
    for stored, target in wanted:
        assert torch.equal(target, tensors[stored.name].to(target.dtype)), stored.name


def test_what_the_library_does_not_bring_is_read_again(files, library, monkeypatch):
    """It takes a short read for a failed one; network file systems have such."""
    monkeypatch.setattr(library, "wait", lambda number: FileReader.wait(library, number) and False)
    stored = stored_tensors(files)
    targets = {name: torch.full(s.shape, 77, dtype=s.dtype) for name, s in stored.items()}
    way = partial(FastSafetensorsTransfer, CPU, library, run_bytes=5000, gather_bytes=400)
    TensorReader(CPU, way).read((stored[name], targets[name]) for name in stored)
    check(files, targets)


def test_a_file_that_is_gone_is_named(files, tmp_path, copier):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([gone, files[1]])
    gone.unlink()
    reader = copier(1024)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match=r"gone\.safetensors cannot be read: No such file"):
        reader.read(wanted)


def test_a_file_that_was_cut_since_is_named_with_the_tensor(files, tmp_path, copier):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files[0].read_bytes())
    stored = stored_tensors([cut])
    last = max(stored.values(), key=lambda each: each.start)
    os.truncate(cut, last.start + last.nbytes - 1)
    reader = copier(1024)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match=rf"cut\.safetensors ends after .*{last.name}"):
        reader.read(wanted)


@pytest.mark.parametrize("left", [0.3, 0.9])
@pytest.mark.parametrize(("small", "place"), [({"small": torch.ones(3)}, "before"), ({}, "within")])
def test_what_is_told_of_a_cut_file_is_where_it_ends(tmp_path, copier, left, small, place):
    """Small tensors are read first, wherever they lie."""
    cut = tmp_path / "cut.safetensors"
    save_file({f"{n}.large": torch.randn(1000) for n in range(5)} | small, cut)
    stored = stored_tensors([cut])
    size = int(cut.stat().st_size * left)
    os.truncate(cut, size)
    order = sorted(stored.values(), key=lambda each: each.nbytes)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in order]
    with pytest.raises(WeightsError, match=rf"ends after {size:,} bytes, ") as caught:
        copier(1 << 20).read(wanted)
    lacking = [s for s in order if s.start + s.nbytes > size]
    named = next(s for s in lacking if repr(s.name) in str(caught.value))
    assert ("within" in str(caught.value)) == (named.start < size)
    assert place in str(caught.value)


def test_what_is_under_way_is_waited_for_before_memory_goes(files, tmp_path, library, monkeypatch):
    begun: list[int] = []
    ended: list[int] = []

    def begin(*args: int) -> int:
        begun.append(FileReader.begin(library, *args))
        return begun[-1]

    def wait(number: int) -> bool:
        ended.append(number)
        return FileReader.wait(library, number)

    monkeypatch.setattr(library, "begin", begin)
    monkeypatch.setattr(library, "wait", wait)
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([files[1], gone])
    gone.unlink()
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match="No such file"):
        TensorReader(CPU, partial(FastSafetensorsTransfer, CPU, library, gather_bytes=400)).read(
            wanted
        )
    assert begun
    assert sorted(ended) == begun


class Held(TensorReader):
    """Reads when it is let."""

    def __init__(self) -> None:
        super().__init__(CPU, partial(HostTransfer, run_bytes=1024))
        self.let = threading.Event()

    def read(self, wanted, arrived=None):
        assert self.let.wait(10)
        super().read(wanted, arrived)


def test_beside_threads_take_turns_more_often_and_as_before_afterwards():
    before = sys.getswitchinterval()
    with BackgroundReader(TensorReader(CPU)):
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == before


def test_without_the_library_python_reads(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fastsafetensors", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with caplog.at_level("INFO"):  # not the cached function: what it answers here is for here only
        assert file_reader.__wrapped__(torch.device("cuda", 0)) is None
    assert "fastsafetensors" in caplog.text
    assert "takes longer" in caplog.text


class Other(TensorReader):
    """Another copier, which notes when it is its turn."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__(CPU)
        self.note = note

    def read(self, wanted, arrived=None):
        self.note()
        super().read(wanted, arrived)


def test_beside_everything_arrives_in_turn(files):
    stored = stored_tensors(files)
    targets = {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in stored.items()}
    held, taken = Held(), []
    with BackgroundReader(held) as beside:
        for number in range(2):
            names = [name for name in stored if name.startswith(f"{number}.")]
            beside.read((stored[name], targets[name]) for name in names)
        beside.read([], Other(lambda: taken.append(targets["1.scalar"].item())))
        assert not any(target.any() for target in targets.values()), "read returns at once"
        held.let.set()
        beside.wait()
        assert taken == [4.5]
    check(files, targets)


class Stepwise(HostTransfer):
    """Ends a run when it is let."""

    def __init__(self) -> None:
        super().__init__(run_bytes=1024)
        self.let = threading.Semaphore(0)

    def end(self, run, begun):
        assert self.let.acquire(timeout=10)
        super().end(run, begun)


def test_beside_what_has_arrived_can_be_had_while_the_rest_is_coming(files):
    stored = stored_tensors(files[:1])
    wanted = [(each, torch.zeros(each.shape, dtype=each.dtype)) for each in stored.values()]
    wanted.sort(key=lambda each: each[0].start)
    way = Stepwise()
    with BackgroundReader(TensorReader(CPU, lambda: way)) as beside:
        beside.read(wanted)
        for each, target in wanted:
            waiting = threading.Thread(target=beside.wait_for, args=([target],))
            waiting.start()
            while waiting.is_alive():
                way.let.release()
                waiting.join(0.005)
            check(files, {each.name: target})
        beside.wait_for([torch.zeros(1)])  # nobody reads that


def test_beside_the_first_is_read_while_the_last_is_still_taken(files):
    stored = [s for s in stored_tensors(files).values() for _ in range(3) if s.nbytes]
    assert len(stored) > 2 * copier_module.BATCH
    targets = [torch.zeros(each.shape, dtype=each.dtype) for each in stored]

    def wanted():
        for number, each in enumerate(zip(stored, targets, strict=True)):
            if number == 2 * copier_module.BATCH:
                beside.wait_for([targets[0]])
                check(files, {stored[0].name: targets[0]})
            yield each

    way = partial(HostTransfer, run_bytes=1024, gather_bytes=1)
    with BackgroundReader(TensorReader(CPU, way)) as beside:
        beside.read(wanted())


@pytest.mark.parametrize("later", [False, True])
def test_beside_an_error_elsewhere_ends_what_is_being_read(files, later):
    """No more than what is under way is waited for."""
    stored = list(stored_tensors(files).values())
    targets = [torch.zeros(each.shape, dtype=each.dtype) for each in stored]
    wanted = list(zip(stored, targets, strict=True))
    way = Stepwise()

    def read_and_fail() -> None:
        with BackgroundReader(TensorReader(CPU, lambda: way)) as beside:
            try:
                beside.read(_failing(wanted))
            except MemoryError:
                way.let.release(1000)
                if not later:
                    raise
            beside.wait_for(targets)

    # Whoever goes on after it is told that not everything is there.
    expected = WeightsError if later else MemoryError
    with pytest.raises(expected):
        read_and_fail()
    last = targets[copier_module.BATCH - 1]
    assert last.numel() > 0
    assert not last.any()


def test_beside_whoever_goes_on_without_the_last_is_told_at_the_end(files):
    def read_and_go_on() -> None:
        with BackgroundReader(TensorReader(CPU)) as beside, suppress(MemoryError):
            beside.read(_failing(wanted, after_s=0.2))  # in which all that was taken is begun

    stored = list(stored_tensors(files).values())
    wanted = [(each, torch.zeros(each.shape, dtype=each.dtype)) for each in stored]
    with pytest.raises(WeightsError, match="no more weights are read"):
        read_and_go_on()


def _failing(wanted, after_s=0.0):
    yield from wanted[: copier_module.BATCH]
    time.sleep(after_s)
    raise MemoryError


def test_beside_an_error_in_its_context_ends_what_is_being_read(files):
    stored = [each for each in stored_tensors(files).values() for _ in range(20)]
    wanted = [(each, torch.zeros(each.shape, dtype=each.dtype)) for each in stored]
    ended: list[int] = []

    class Slow(HostTransfer):
        def end(self, run, begun):
            time.sleep(0.01)
            super().end(run, begun)
            ended.append(1)

    way = partial(Slow, run_bytes=1024, gather_bytes=1)
    with pytest.raises(KeyError), BackgroundReader(TensorReader(CPU, way)) as beside:  # noqa: PT012
        beside.read(wanted)
        raise KeyError
    assert len(ended) < len(stored) / 2


def test_what_cannot_be_taken_leaves_nobody_waiting():
    with pytest.raises(TypeError, match="iterable"), BackgroundReader(TensorReader(CPU)) as beside:
        beside.read(5)  # type: ignore[arg-type]


def test_beside_a_fault_while_taking_ends_it(files):
    stored = list(stored_tensors(files).values())
    targets = [torch.zeros(each.shape, dtype=each.dtype) for each in stored * 3]
    held = Held()

    def wanted():
        for number, each in enumerate(zip(stored * 3, targets, strict=True)):
            if number == copier_module.BATCH + 1:
                threading.Timer(0.1, held.let.set).start()
                raise MemoryError
            yield each

    with pytest.raises(MemoryError), BackgroundReader(held) as beside:
        beside.read(wanted())
    assert not any(target.any() for target in targets), "nothing was under way yet"


def test_beside_what_has_arrived_is_not_kept(files):
    stored = list(stored_tensors(files).values())
    wanted = [(each, torch.zeros(each.shape, dtype=each.dtype)) for each in stored]
    first, last = weakref.ref(wanted[0][1]), weakref.ref(wanted[-1][1])
    way = Stepwise()
    with BackgroundReader(TensorReader(CPU, lambda: way)) as beside:
        beside.read(wanted)
        del wanted
        for _ in range(2 * transfer.BUFFERS):
            way.let.release()
        deadline = time.monotonic() + 10
        while first() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert first() is None
        assert last() is not None, "it is still coming"
        way.let.release(1000)


def test_whoever_waits_for_a_tensor_is_told_of_a_fault(files, tmp_path):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([gone])
    gone.unlink()
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]

    def read_and_wait() -> None:
        with BackgroundReader(TensorReader(CPU)) as beside:
            beside.read(wanted)
            beside.wait_for([wanted[-1][1]])
            pytest.fail("it was not told")

    with pytest.raises(WeightsError, match="No such file"):
        read_and_wait()


def test_leaving_it_waits(files):
    stored = stored_tensors(files)
    targets = {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in stored.items()}
    held = Held()
    with BackgroundReader(held) as beside:
        beside.read((stored[name], targets[name]) for name in stored)
        threading.Timer(0.1, held.let.set).start()
    check(files, targets)


def test_an_error_elsewhere_ends_what_has_not_begun():
    held, done = Held(), []
    with pytest.raises(KeyError), BackgroundReader(held) as beside:  # noqa: PT012
        beside.read([])
        beside.read([], Other(lambda: done.append(1)))
        threading.Timer(0.1, held.let.set).start()
        raise KeyError
    assert not done


@pytest.mark.parametrize("waiting", [False, True])
def test_beside_a_fault_ends_the_rest_and_is_told(files, tmp_path, waiting):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([gone])
    gone.unlink()
    done = []

    def read_and_leave() -> None:
        with BackgroundReader(TensorReader(CPU)) as beside:
            beside.read((s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values())
            beside.read([], Other(lambda: done.append(1)))
            if waiting:
                beside.wait()

    with pytest.raises(WeightsError, match="No such file"):
        read_and_leave()
    assert not done


def test_a_name_in_two_files_is_refused(files, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    with pytest.raises(WeightsError, match=r"is in 0\.safetensors and in copy\.safetensors"):
        stored_tensors([files[0], copy])
