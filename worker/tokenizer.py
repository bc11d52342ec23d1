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

CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")
SETTINGS = ("model_max_length", "padding_side", "truncation_side")
T5_PADDING = "<pad>"


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A tokenizer and where it comes from.

    Attributes:
        tokenize: as diffusers' pipelines call it. Of special tokens it names only the padding.
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
        ModelUnusable: a file is missing, or cannot be read; it is named. Or none says which token
            of the vocabulary pads.
    """
    check_files(folder, TOKENIZER)
    file, config = folder / TOKENIZER, _read_config(folder)
    settings = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    try:
        text = file.read_bytes()
        tokenize = PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)
    except BaseException as error:  # the library's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model file {file} cannot be read: {reason}") from error
    tokenize.pad_token = _padding(tokenize, config, file)
    return ModelTokenizer(tokenize, text, tokenizer_fingerprint(text))


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in CONFIGS:
        if (folder / name).is_file():
            config |= read_json(folder / name)
    return config


def _padding(tokenize: PreTrainedTokenizerBase, config: dict[str, Any], file: Path) -> str:
    """The token that pads. One that the file lacks the library would add, beyond the embedding."""
    named = config.get("pad_token")
    if isinstance(named, dict):  # some name it as an object around the text
        named = named.get("content")
    token = named or tokenize.pad_token or T5_PADDING
    if not isinstance(token, str) or tokenize.backend_tokenizer.token_to_id(token) is None:
        raise ModelUnusable(
            f"{file} has no token {token!r} to pad with: name one that it has as pad_token in "
            f"{file.parent / CONFIGS[-1]}"
        )
    return token
