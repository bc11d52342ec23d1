"""Test that a tokenizer does what its file says, whatever class a configuration names."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.fixtures.fabricated_tokenizer import write_tokenizer
from jobs.catalog import tokenizer_fingerprint
from worker import startup
from worker.config import WorkerConfig
from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader import loader, mode_plan, tokenizer
from worker.model_loader.tokenizer import ModelTokenizer, read_tokenizer
from worker.startup import load_engine

TEXT = "a red ball <extra_id_3> over the 海 \u20ac"


@pytest.fixture
def umt5(tmp_path: Path) -> Path:
    """A tokenizer like that of Wan's folders, but small; `<unk>` is its fourth token."""
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder, 500, seed=3)
    return folder


def test_it_follows_its_file(umt5: Path) -> None:
    read = read_tokenizer(umt5)
    ids = Tokenizer.from_file(str(umt5 / "tokenizer.json")).encode(TEXT).ids
    assert read.tokenize(TEXT).input_ids == ids
    assert ids.count(3) == 2, "both unknown characters, and no other class' unknown token"
    assert ids[-1] == 1


def test_it_pads_and_cuts_as_pipelines_ask(umt5: Path) -> None:
    read = read_tokenizer(umt5)
    padded = read.tokenize(["red", TEXT], padding="max_length", max_length=12, truncation=True)
    assert [len(ids) for ids in padded.input_ids] == [12, 12]
    assert padded.input_ids[0][-1] == read.tokenize.pad_token_id == 0
    assert padded.attention_mask[0][-1] == 0
    assert padded.input_ids[1][-1] == 1, "the closing token stays"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True}},
    ],
    ids=["plain", "an object"],
)
def test_it_equals_the_librarys_tokenizer_of_the_folder(
    umt5: Path, change: dict[str, object]
) -> None:
    configure(umt5, change)
    library = PreTrainedTokenizerFast.from_pretrained(umt5)
    ours, theirs = (
        each(["</s><pad> x", TEXT], padding="max_length", max_length=12, truncation=True)
        for each in (read_tokenizer(umt5).tokenize, library)
    )
    assert ours.input_ids == theirs.input_ids
    assert ours.attention_mask == theirs.attention_mask


def configure(folder: Path, change: dict[str, object]) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | change
    config = {name: each for name, each in config.items() if each is not None}
    file.write_text(json.dumps(config), encoding="utf-8")


def rename_padding_token(folder: Path, name: str) -> None:
    """Rename the padding token in tokenizer.json only."""
    configure(folder, {"pad_token": None})
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8").replace('"<pad>"', f'"{name}"')
    file.write_text(text, encoding="utf-8")


def test_the_default_padding_token_is_t5s(umt5: Path) -> None:
    configure(umt5, {"pad_token": None})
    assert read_tokenizer(umt5).tokenize.pad_token_id == 0


def write_padding_section(folder: Path, **padding: object) -> None:
    """Write a padding section into the tokenizer's file."""
    file = folder / "tokenizer.json"
    section = {"strategy": "BatchLongest", "pad_id": 0, "pad_type_id": 0} | padding
    whole = json.loads(file.read_text(encoding="utf-8")) | {"padding": section}
    file.write_text(json.dumps(whole), encoding="utf-8")


def test_padding_is_on_the_right_whatever_the_files_say(umt5: Path) -> None:
    configure(umt5, {"padding_side": "left"})
    write_padding_section(umt5, direction="Left", pad_token="<pad>", pad_to_multiple_of=None)
    ids = read_tokenizer(umt5).tokenize("red", padding="max_length", max_length=12).input_ids
    assert ids[0] != 0 == ids[-1]


def test_padding_may_be_named_by_the_tokenizer_itself(umt5: Path) -> None:
    rename_padding_token(umt5, "[PAD]")
    write_padding_section(umt5, direction="Right", pad_token="[PAD]", pad_to_multiple_of=None)
    assert read_tokenizer(umt5).tokenize.pad_token_id == 0


@pytest.mark.parametrize("named", [None, "<pad>"])
def test_padding_of_the_file_does_not_grow_its_vocabulary(umt5: Path, named: str | None) -> None:
    size = len(read_tokenizer(umt5).tokenize)
    write_padding_section(umt5, direction="Right", pad_token="[NOPE]", pad_to_multiple_of=None)
    configure(umt5, {"pad_token": named})
    if named is None:
        with pytest.raises(ModelUnusable, match=r"has no token '\[NOPE\]' to pad with"):
            read_tokenizer(umt5)
    else:
        assert len(read_tokenizer(umt5).tokenize) == size


@pytest.mark.parametrize(
    ("named", "shown"),
    [(None, "'<pad>'"), ("[PAD]", r"'\[PAD\]'"), ([1], r"\[1\]"), (3, "3")],
)
def test_padding_that_the_vocabulary_lacks_is_refused(
    umt5: Path, named: object, shown: str
) -> None:
    rename_padding_token(umt5, "[FILL]")
    configure(umt5, {"pad_token": named})
    with pytest.raises(ModelUnusable, match=rf"tokenizer\.json has no token {shown} to pad with"):
        read_tokenizer(umt5)


def test_a_padding_token_without_text_is_refused(umt5: Path) -> None:
    configure(umt5, {"pad_token": {"x": 1}})
    with pytest.raises(ModelUnusable, match="has no token None to pad with"):
        read_tokenizer(umt5)


def test_its_text_is_the_file(umt5: Path) -> None:
    read = read_tokenizer(umt5)
    read.tokenize("red", padding="max_length", max_length=9, truncation=True)
    assert read.text == (umt5 / "tokenizer.json").read_bytes()
    assert read.fingerprint == tokenizer_fingerprint(read.text)


PANICS = {"when it is read": "AAAA", "when it encodes": "BAAAAP////8="}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "99"}', *PANICS])
def test_a_broken_file_is_named(umt5: Path, text: str) -> None:
    file = umt5 / "tokenizer.json"
    if text in PANICS:
        normalizer = {"type": "Precompiled", "precompiled_charsmap": PANICS[text]}
        whole = json.loads(file.read_text(encoding="utf-8"))
        text = json.dumps(whole | {"normalizer": normalizer})
    file.write_text(text, encoding="utf-8")
    with pytest.raises(
        ModelUnusable, match=r"tokenizer/tokenizer\.json cannot be read: "
    ) as caught:
        read_tokenizer(umt5)
    assert "\n" not in str(caught.value)


def test_an_interrupt_is_not_caught(umt5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "PreTrainedTokenizerFast", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_tokenizer(umt5)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(umt5: Path, name: str) -> None:
    (umt5 / name).unlink()
    with pytest.raises(ModelUnusable, match=r"lacks a file"):
        read_tokenizer(umt5)


def test_it_is_read_while_kernels_are_tried(
    config: WorkerConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, tried = threading.Event(), threading.Event()
    choose = mode_plan.choose_kernels

    def read(folder: Path) -> ModelTokenizer:
        started.set()
        assert tried.wait(20), "kernels wait for the tokenizer"
        return read_tokenizer(folder)

    def choose_kernels(*args):
        assert started.wait(20), "the tokenizer is not being read"
        kernels = choose(*args)
        tried.set()
        return kernels

    monkeypatch.setattr(startup, "read_tokenizer", read)
    monkeypatch.setattr(startup, "choose_kernels", choose_kernels)
    engine = load_engine(config, device)
    assert engine.tokenizer_text == (config.model.path / "tokenizer/tokenizer.json").read_bytes()


@pytest.mark.parametrize("known", ["before weights are read", "meanwhile"])
def test_a_tokenizer_that_cannot_be_read_ends_the_start(
    config: WorkerConfig, device: Device, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    failing, loading_started = threading.Event(), threading.Event()
    choose, load = mode_plan.choose_kernels, loader.load_model

    def read(folder: Path) -> ModelTokenizer:
        if known == "meanwhile":
            assert loading_started.wait(20)
        failing.set()
        raise ModelUnusable(f"{folder} is no tokenizer")

    def choose_kernels(*args):
        if known != "meanwhile":
            assert failing.wait(20)
            time.sleep(0.1)  # for the thread to end
        return choose(*args)

    def load_model(*args):
        loading_started.set()
        return load(*args)

    monkeypatch.setattr(startup, "read_tokenizer", read)
    monkeypatch.setattr(startup, "choose_kernels", choose_kernels)
    monkeypatch.setattr(startup, "load_model", load_model)
    with pytest.raises(ModelUnusable, match="is no tokenizer"):
        load_engine(config, device)
    assert loading_started.is_set() == (known == "meanwhile")
