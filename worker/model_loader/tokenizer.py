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
from worker.model_loader.component_files import TOKENIZER, check_files, read_json

CONFIG = "tokenizer_config.json"
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
    none is cut.

    Raises:
        ModelUnusable: a file is missing, or cannot be read; it is named. Or none says which token
            of the vocabulary pads.
    """
    check_files(folder, TOKENIZER)
    file, config_file = folder / TOKENIZER, folder / CONFIG
    try:
        text = file.read_bytes()
        # Without a side and a token of ours, the library takes those of the file as they are.
        tokenize = PreTrainedTokenizerFast(
            tokenizer_file=str(file), padding_side="right", pad_token=None
        )
        padding = tokenize.backend_tokenizer.padding or {}
        tokenize("a")  # some broken files show here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model file {file} cannot be read: {reason}") from error
    config = read_json(config_file) if config_file.is_file() else {}
    named = config.get("pad_token") or padding.get("pad_token") or T5_PADDING
    tokenize.pad_token = _checked_padding(tokenize, named, file)
    return ModelTokenizer(tokenize, text, tokenizer_fingerprint(text))


def _checked_padding(tokenize: PreTrainedTokenizerBase, named: object, file: Path) -> str:
    """The token that pads. One that the file lacks the library would add, beyond the embedding."""
    # Some name it as an object around the text.
    token = named.get("content") if isinstance(named, dict) else named
    if not isinstance(token, str) or tokenize.backend_tokenizer.token_to_id(token) is None:
        raise ModelUnusable(
            f"{file} has no token {token!r} to pad with: name one that it has as pad_token in "
            f"{file.parent / CONFIG}"
        )
    return token
