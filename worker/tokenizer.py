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
from worker.part_files import TOKENIZER, check_files, read_json

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

    What pads is all that is taken of the configuration: the pipeline needs texts at the left, and
    those that would be cut are refused.

    Raises:
        ModelUnusable: a file is missing, or cannot be read; it is named. Or none says which token
            of the vocabulary pads.
    """
    check_files(folder, TOKENIZER)
    file, config_file = folder / TOKENIZER, folder / "tokenizer_config.json"
    try:
        text = file.read_bytes()
        tokenize = PreTrainedTokenizerFast(tokenizer_file=str(file))
        tokenize("a")  # some broken files show here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model file {file} cannot be read: {reason}") from error
    named = read_json(config_file).get("pad_token") if config_file.is_file() else None
    tokenize.pad_token = _padding(tokenize, named, file)
    return ModelTokenizer(tokenize, text, tokenizer_fingerprint(text))


def _padding(tokenize: PreTrainedTokenizerBase, named: object, file: Path) -> str:
    """The token that pads. One that the file lacks the library would add, beyond the embedding."""
    token = named or tokenize.pad_token or T5_PADDING
    if isinstance(token, dict):  # some name it as an object around the text
        token = token.get("content")
    if not isinstance(token, str) or tokenize.backend_tokenizer.token_to_id(token) is None:
        raise ModelUnusable(
            f"{file} has no token {token!r} to pad with: name one that it has as pad_token in "
            f"{file.parent / 'tokenizer_config.json'}"
        )
    return token
