"""Every tensor arrives whole, whatever moves it and however it is cut."""

import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deploy.local.waiting import wait_until
from quant.errors import WeightsError
from quant.weights import header, transfer
from quant.weights import reader as reader_module
from quant.weights.header import read_header, stored_tensors
from quant.weights.reader import BackgroundReader, TensorReader
from quant.weights.transfer import (
    BUFFERS,
    FastSafetensorsTransfer,
    ThreadTransfer,
    Transfer,
    fastsafetensors,
)

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


@pytest.fixture(autouse=True)
def few_are_small(monkeypatch):
    monkeypatch.setattr(header, "SMALL_BYTES", 400)


@pytest.fixture(scope="module")
def library() -> FastSafetensorsTransfer:
    """The library's own threads, which on a CPU copy into its memory."""
    return by_library()


def by_library() -> FastSafetensorsTransfer:
    threads = fastsafetensors(CPU)
    assert threads is not None
    return FastSafetensorsTransfer(CPU, threads)


def threads(chunk_bytes: int, *, buffered: bool = False) -> ThreadTransfer:
    made = ThreadTransfer(CPU, buffered=buffered)
    made.chunk_bytes = chunk_bytes
    return made


@pytest.fixture(params=["threads", "threads and buffers", "library"])
def make_reader(request, library, monkeypatch):
    """Makes a reader to the host with one kind of transfer, in chunks of so many bytes."""

    def make(chunk_bytes: int) -> TensorReader:
        monkeypatch.setattr(library, "chunk_bytes", chunk_bytes, raising=False)
        kinds: dict[str, Callable[[], Transfer]] = {
            "threads": partial(threads, chunk_bytes),
            "threads and buffers": partial(threads, chunk_bytes, buffered=True),
            "library": lambda: library,
        }
        return TensorReader(CPU, kinds[request.param])

    return make


@pytest.mark.parametrize("chunk_bytes", [1024, 5000, 1 << 20])
@pytest.mark.parametrize("slice_bytes", [300, transfer.SLICE_BYTES])
def test_every_tensor_arrives(files, make_reader, chunk_bytes, slice_bytes, monkeypatch):
    monkeypatch.setattr(transfer, "SLICE_BYTES", slice_bytes)
    stored = stored_tensors(files)
    targets = {name: torch.full(s.shape, 77, dtype=s.dtype) for name, s in stored.items()}
    reader = make_reader(chunk_bytes)
    reader.read((stored[name], targets[name]) for name in stored)
    check(files, targets)


def test_reads_that_come_short_are_gone_on_with(files, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: whole(file, [views[0][:100]], at))
    stored = stored_tensors(files)
    targets = {name: torch.full(s.shape, 77, dtype=s.dtype) for name, s in stored.items()}
    TensorReader(CPU).read((stored[n], targets[n]) for n in stored)
    check(files, targets)


def test_what_is_stored_in_another_dtype_is_converted(files, make_reader):
    stored = {n: s for n, s in stored_tensors(files).items() if s.dtype is torch.float32}
    targets = {name: torch.empty(s.shape, dtype=torch.bfloat16) for name, s in stored.items()}
    reader = make_reader(1024)
    reader.read((stored[name], targets[name]) for name in stored)
    check(files, targets)


def test_any_choice_of_tensors_can_be_read(files, make_reader):
    stored = stored_tensors(files)
    chosen = list(stored)[::3][::-1]
    targets = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in chosen}
    reader = make_reader(2048)
    reader.read((stored[name], targets[name]) for name in chosen)
    check(files, targets)


@pytest.fixture
def submitted(library, monkeypatch) -> list[int]:
    """How many bytes the library's threads were asked for at a time."""
    sizes: list[int] = []
    begin = FastSafetensorsTransfer.begin

    def noted(file: int, start: int, target: torch.Tensor) -> tuple[int, int, int]:
        sizes.append(target.nbytes)
        return begin(library, file, start, target)

    monkeypatch.setattr(library, "begin", noted)
    return sizes


def test_neighbours_keep_what_lies_between_them(tmp_path, library, submitted):
    file = tmp_path / "rows.safetensors"
    save_file({f"{n}": torch.randn(1000) for n in range(6)}, file)
    stored = sorted(stored_tensors([file]).values(), key=lambda each: each.start)
    memory = torch.full((8000,), 77.0)
    rows = [*memory[:3000].split(1000), *memory[4000:7000].split(1000)]
    wanted = list(zip(stored, rows, strict=True))
    TensorReader(CPU, lambda: library).read(wanted)
    check([file], {each.name: row for each, row in wanted})
    assert submitted == [4000] * 6
    assert (memory[3000:4000] == 77).all(), "between them is somebody else's"
    assert (memory[7000:] == 77).all()


def test_small_tensors_from_anywhere_in_a_file_are_read_together(
    tmp_path, library, submitted, monkeypatch
):
    file, generator = tmp_path / "mixed.safetensors", torch.Generator().manual_seed(0)
    sizes = [3, 40_000, 5, 7, 40_000, 11, 40_000]
    tensors = {f"{n}": torch.randn(size, generator=generator) for n, size in enumerate(sizes)}
    save_file(tensors, file)
    stored = stored_tensors([file])
    order = sorted(stored, key=lambda name: stored[name].nbytes)  # small ones first
    targets = {name: torch.full(stored[name].shape, 77.0) for name in order}
    arrived: list[int] = []
    reads: list[int] = []
    read = transfer.read_bytes

    def noted(file: int, start: int, view: memoryview) -> None:
        reads.append(len(view))
        read(file, start, view)

    monkeypatch.setattr(reader_module, "read_bytes", noted)
    TensorReader(CPU, lambda: library).read(
        ((stored[name], targets[name]) for name in order), lambda some: arrived.append(len(some))
    )
    check([file], targets)
    assert submitted == [160_000] * 3
    assert arrived == [4, 1, 1, 1]
    assert len(reads) == 3, "5 and 7 lie close together"


def test_as_much_is_begun_as_there_is_room_for(files, library, monkeypatch):
    """Of what is converted on arrival, by its own bytes; else by those of everything."""
    monkeypatch.setattr(library, "chunk_bytes", 8192, raising=False)
    monkeypatch.setattr(library, "most_bytes", 100_000, raising=False)
    monkeypatch.setattr(reader_module, "CONVERTED_BYTES", 40_000)
    monkeypatch.setattr(header, "SMALL_BYTES", 1)
    in_flight, most = [0], [0]
    begin, finish = library.begin, library.finish

    def noted(file: int, start: int, target: torch.Tensor) -> object:
        in_flight[0] += target.nbytes
        most[0] = max(most[0], in_flight[0])
        return begin(file, start, target), target.nbytes

    def ended(begun) -> None:
        finish(begun[0])
        in_flight[0] -= begun[1]

    monkeypatch.setattr(library, "begin", noted)
    monkeypatch.setattr(library, "finish", ended)
    stored = stored_tensors(files)
    for dtype, bound in ((None, 100_000), (torch.float64, 40_000)):
        most[0] = 0
        targets = {n: torch.empty(s.shape, dtype=dtype or s.dtype) for n, s in stored.items()}
        TensorReader(CPU, lambda: library).read((stored[name], targets[name]) for name in stored)
        check(files, targets)
        assert bound <= most[0] < bound + 8192
    assert in_flight == [0]


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


def test_what_is_no_file_is_said_so(files, tmp_path, make_reader):
    folder = tmp_path / "a folder.safetensors"
    folder.mkdir()
    stored = next(iter(stored_tensors(files).values()))
    wanted = [(replace(stored, file=folder, shape=(4,)), torch.empty(4, dtype=stored.dtype))]
    with pytest.raises(WeightsError, match=r"a folder\.safetensors cannot be read: Is a directory"):
        make_reader(1024).read(wanted)


@pytest.mark.parametrize("wide_first", [False, True])
def test_of_one_dtype_in_the_file_some_may_be_wanted_in_another(tmp_path, make_reader, wide_first):
    """As a BF16 transformer is stored, some of which runs in FP32."""
    file = tmp_path / "bf16.safetensors"
    tensors = {f"{n:02}": torch.randn(100 + n).to(torch.bfloat16) for n in range(12)}
    save_file(tensors, file)
    wanted = [
        (s, torch.full(s.shape, 77.0, dtype=(torch.bfloat16, torch.float32)[(n + wide_first) % 2]))
        for n, s in enumerate(stored_tensors([file]).values())
    ]
    make_reader(1 << 20).read(wanted)
    for stored, target in wanted:
        assert torch.equal(target, tensors[stored.name].to(target.dtype)), stored.name


def test_what_the_library_does_not_bring_is_read_again(files, monkeypatch):
    """It takes a short read for a failed one; network file systems have such."""
    library = by_library()
    library.chunk_bytes = 5000
    reader = library._reader

    class Failing:
        submit_read = reader.submit_read

        def wait_read(self, number: int) -> int:
            reader.wait_read(number)
            return 0

    monkeypatch.setattr(library, "_reader", Failing())
    stored = stored_tensors(files)
    targets = {name: torch.full(s.shape, 77, dtype=s.dtype) for name, s in stored.items()}
    TensorReader(CPU, lambda: library).read((stored[name], targets[name]) for name in stored)
    check(files, targets)


def test_files_stay_open_until_nothing_reads_them(files, tmp_path):
    """Also after an error: a thread would read from whatever file has the number next."""
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([files[1], gone])
    gone.unlink()
    numbers: list[int] = []

    class Checked(ThreadTransfer):
        def begin(self, file, start, target):
            numbers.append(file)
            return super().begin(file, start, target)

        def close(self):
            for number in numbers:
                os.fstat(number)
            super().close()

    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match="No such file"):
        TensorReader(CPU, partial(Checked, CPU)).read(wanted)
    assert numbers


def test_two_readers_of_one_device_do_not_disturb_each_other(files):
    stored = stored_tensors(files)
    targets = [{n: torch.zeros(s.shape, dtype=s.dtype) for n, s in stored.items()} for _ in "ab"]

    def read(into: dict[str, torch.Tensor]) -> None:
        for _ in range(20):
            TensorReader(CPU, by_library).read((stored[name], into[name]) for name in stored)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(read, into) for into in targets]:
            done.result()
    for into in targets:
        check(files, into)


def test_a_file_that_is_gone_is_named(files, tmp_path, make_reader):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([gone, files[1]])
    gone.unlink()
    reader = make_reader(1024)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match=r"gone\.safetensors cannot be read: No such file"):
        reader.read(wanted)


def test_a_file_that_was_cut_since_is_named_with_the_tensor(files, tmp_path, make_reader):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files[0].read_bytes())
    stored = stored_tensors([cut])
    last = max(stored.values(), key=lambda each: each.start)
    os.truncate(cut, last.start + last.nbytes - 1)
    reader = make_reader(1024)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match=rf"cut\.safetensors ends after .*{last.name}"):
        reader.read(wanted)


@pytest.mark.parametrize("left", [0.3, 0.9])
@pytest.mark.parametrize(("small", "place"), [({"small": torch.ones(3)}, "before"), ({}, "within")])
def test_what_is_told_of_a_cut_file_is_where_it_ends(tmp_path, make_reader, left, small, place):
    """Small tensors are read first, wherever they lie."""
    cut = tmp_path / "cut.safetensors"
    save_file({f"{n}.large": torch.randn(1000) for n in range(5)} | small, cut)
    stored = stored_tensors([cut])
    size = int(cut.stat().st_size * left)
    os.truncate(cut, size)
    order = sorted(stored.values(), key=lambda each: each.nbytes)
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in order]
    with pytest.raises(WeightsError, match=rf"ends after {size:,} bytes, ") as caught:
        make_reader(1 << 20).read(wanted)
    lacking = [s for s in order if s.start + s.nbytes > size]
    named = next(s for s in lacking if repr(s.name) in str(caught.value))
    assert ("within" in str(caught.value)) == (named.start < size)
    assert place in str(caught.value)


def test_what_is_in_flight_is_waited_for_before_memory_goes(files, tmp_path, monkeypatch):
    library = by_library()
    reader, begun, ended = library._reader, [], []

    class Noting:
        def submit_read(self, *args: object) -> int:
            begun.append(reader.submit_read(*args))
            return begun[-1]

        def wait_read(self, number: int) -> int:
            ended.append(number)
            return reader.wait_read(number)

    monkeypatch.setattr(library, "_reader", Noting())
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    stored = stored_tensors([files[1], gone])
    gone.unlink()
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored.values()]
    with pytest.raises(WeightsError, match="No such file"):
        TensorReader(CPU, lambda: library).read(wanted)
    assert begun
    assert sorted(ended) == begun


class Held(TensorReader):
    """Reads when it is let."""

    def __init__(self) -> None:
        super().__init__(CPU, partial(threads, 1024))
        self.let = threading.Event()

    def read(self, wanted, arrived=None):
        assert self.let.wait(10)
        super().read(wanted, arrived)


def test_without_the_library_python_reads(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fastsafetensors", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with caplog.at_level("INFO"):  # not the cached function: what it answers here is for here only
        assert fastsafetensors.__wrapped__(torch.device("cuda", 0)) is None
    assert "fastsafetensors" in caplog.text
    assert "takes longer" in caplog.text


class Other(TensorReader):
    """Another make_reader, which notes when it is its turn."""

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


class Stepwise(ThreadTransfer):
    """Finishes one after the other when it is let."""

    chunk_bytes = 1024

    def __init__(self) -> None:
        super().__init__(CPU)
        self.let = threading.Semaphore(0)

    def finish(self, begun):
        assert self.let.acquire(timeout=10)
        super().finish(begun)


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


def test_beside_an_error_while_tensors_are_made_reads_nothing(files):
    stored = list(stored_tensors(files).values())
    targets = [torch.zeros(each.shape, dtype=each.dtype) for each in stored]

    def wanted():
        yield from zip(stored, targets, strict=True)
        raise MemoryError

    with pytest.raises(MemoryError), BackgroundReader(TensorReader(CPU)) as beside:
        beside.read(wanted())
    assert not any(target.any() for target in targets)


def test_beside_whoever_goes_on_after_a_fault_is_told_again(files, tmp_path):
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(files[0].read_bytes())
    wanted = [(s, torch.empty(s.shape, dtype=s.dtype)) for s in stored_tensors([gone]).values()]
    gone.unlink()

    def read_and_wait_twice() -> None:
        with BackgroundReader(TensorReader(CPU)) as beside:
            beside.read(wanted)
            with suppress(WeightsError):
                beside.wait_for([wanted[-2][1]])
            beside.wait_for([wanted[-1][1]])

    with pytest.raises(WeightsError, match="no more weights are read"):
        read_and_wait_twice()


def test_beside_an_error_in_its_context_ends_what_is_being_read(files):
    stored = [each for each in stored_tensors(files).values() for _ in range(20)]
    wanted = [(each, torch.zeros(each.shape, dtype=each.dtype)) for each in stored]
    ended: list[int] = []

    class Slow(ThreadTransfer):
        chunk_bytes = 1024

        def finish(self, begun):
            time.sleep(0.01)
            super().finish(begun)
            ended.append(1)

    way = partial(Slow, CPU)
    with pytest.raises(KeyError), BackgroundReader(TensorReader(CPU, way)) as beside:  # noqa: PT012
        beside.read(wanted)
        raise KeyError
    assert len(ended) < len(stored) / 2


def test_what_cannot_be_taken_leaves_nobody_waiting():
    with pytest.raises(TypeError, match="iterable"), BackgroundReader(TensorReader(CPU)) as beside:
        beside.read(5)  # type: ignore[arg-type]


def test_beside_what_has_arrived_is_not_kept(files):
    stored = list(stored_tensors(files).values())
    wanted = [(each, torch.zeros(each.shape, dtype=each.dtype)) for each in stored]
    first, last = weakref.ref(wanted[0][1]), weakref.ref(wanted[-1][1])
    way = Stepwise()
    with BackgroundReader(TensorReader(CPU, lambda: way)) as beside:
        beside.read(wanted)
        del wanted
        for _ in range(2 * BUFFERS):
            way.let.release()
        wait_until(lambda: first() is None, 10, "the first is forgotten")
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


@pytest.mark.parametrize("end", [4, 12])
def test_a_tensor_whose_place_is_not_as_long_as_its_shape_says_is_refused(tmp_path, end):
    fields = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, end]}}
    text = json.dumps(fields).encode()
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    message = f"tensor 'a' has 8 bytes by its shape and {end} by its place"
    with pytest.raises(WeightsError, match=message):
        read_header(file)
