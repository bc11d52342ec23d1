"""A model's tokenizer, read from its `tokenizer.json` as that file describes it.

UMT5's has 256,300 tokens in 17 MB, and the library holds Python's lock all the while it reads them
(docs/decisions/014).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.catalog import tokenizer_fingerprint
from worker.errors import ModelUnusable
from worker.part_files import TOKENIZER, check_files


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

    Raises:
        ModelUnusable: a file is missing, or cannot be read; it is named.
    """
    check_files(folder, TOKENIZER)
    file = folder / TOKENIZER
    try:
        text = file.read_bytes()
        tokenize = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises nothing narrower
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model file {file} cannot be read: {reason}") from error
    return ModelTokenizer(tokenize, text, tokenizer_fingerprint(text))
