"""A model's tokenizer, read from its `tokenizer.json` as that file describes it.

UMT5's has 256,300 tokens in 17 MB, and the library holds Python's lock all the while it reads them
(docs/decisions/014).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.catalog import tokenizer_fingerprint
from worker.errors import ModelUnusable
from worker.part_files import TOKENIZER, check_files, read_json

SETTINGS = ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length")
T5_TOKENS = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
"""What T5's class takes for what a configuration does not name."""


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A tokenizer and where it comes from.

    Attributes:
        tokenize: as diffusers' pipelines call it.
        text: of its file, UTF-8, by which the service counts the same tokens.
        fingerprint: the text's name in the catalog.
    """

    tokenize: PreTrainedTokenizerBase
    text: bytes = field(repr=False)
    fingerprint: str


def read_tokenizer(folder: Path) -> ModelTokenizer:
    """Read the tokenizer in `folder`.

    Not by the class that its configuration names (`T5Tokenizer`): that makes a tokenizer of its own
    from the file's vocabulary, in four times the time, and with its own idea of the unknown token.
    Nor by a `from_pretrained`, which in some versions reads the file twice.

    Raises:
        ModelUnusable: a file is missing, or cannot be read; it is named.
    """
    check_files(folder, TOKENIZER)
    file = folder / TOKENIZER
    try:
        text = file.read_bytes()
        settings = _settings(read_json(folder / "tokenizer_config.json"))
        tokenize = PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)
    except Exception as error:  # the library raises nothing narrower
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model file {file} cannot be read: {reason}") from error
    return ModelTokenizer(tokenize, text, tokenizer_fingerprint(text))


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration what counts for encoding and is not in the tokenizer's file."""
    named = T5_TOKENS | {name: config[name] for name in SETTINGS if config.get(name) is not None}
    # Some name a token as text, some as an object around it.
    return {
        name: each["content"] if isinstance(each, dict) else each for name, each in named.items()
    }
